"""Whole GRPO steps on one GPU and on two: the same prompts, and half of them on one, which is what each of two has.

Each runs in processes of its own, under torchrun, on random weights. On two NCCL carries the gradients, so the
optimiser is one that leaves them on the cards. Every rank must end with the same adapters, bit for bit. No peer takes
part, as in bench_step.
"""

import hashlib
import json
import math
import string
import sys
import time
from dataclasses import replace

import cases
import measurement
import pytest
import torch
from bench_step import (
    DEVICE,
    LIMITS,
    SLOWEST,
    LongPrompt,
    checked,
    phases,
    settings_of,
    steps_of,
    trainer_of,
)
from comparison import in_process
from nanogrpo.grpo import GRPOConfig
from nanogrpo.grpo.distributed import launched

OPTIMIZER = "adamw"


class LongPrompts(LongPrompt):
    """Questions of one length that have nothing but the system's prompt in common."""

    def draw(self, sets, count, key):
        [message] = self.example.messages
        text = message["content"]
        return [
            replace(self.example, messages=({**message, "content": f"{letter} {text}"},))
            for letter in string.ascii_lowercase[:count]
        ]


def digest(adapters):
    """A hash of every bit of a dict of tensors."""
    found = hashlib.sha256()
    for tensor in adapters.values():
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def main(settings, prompt):
    """Run the steps of a config, given as JSON, with prompts of so many tokens, as one of the ranks that torchrun
    started. The first prints the metrics of each step as a line of JSON, then the digests of all ranks' adapters."""
    began, config = time.perf_counter(), GRPOConfig(**json.loads(settings))
    with launched(config.device) as ranks:
        trainer = trainer_of(config, LongPrompts(int(prompt)), ranks)
        for metrics in steps_of(trainer, began):
            if ranks.main:
                print(json.dumps(metrics), flush=True)
        digests = ranks.gather(digest(trainer.policy.adapters()))
        if ranks.main:
            print(json.dumps({"digests": digests}), flush=True)


def measured(case, ranks, prompts):
    """Metrics of the measured steps of so many ``ranks``, with so many prompts in all."""
    settings = settings_of(case, prompts_per_step=prompts, optimizer=OPTIMIZER)
    lines = in_process(__file__, settings, case.rollout.sizes["prompt"], seconds=2 * SLOWEST, ranks=ranks)
    assert lines and "digests" in lines[-1], f"{case} on {ranks} has not ended in {2 * SLOWEST} seconds"
    *steps, last = lines
    assert len(last["digests"]) == ranks and len(set(last["digests"])) == 1, "adapters differ between ranks"
    assert all(math.isfinite(done["loss"]) and done["grad_norm"] > 0 for done in steps)
    return steps[case.warmup :] or steps[-1:]


@pytest.mark.parametrize("scaling", cases.ranks(DEVICE), ids=str)
def test_ranks(record, scaling):
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    sizes = scaling.rollout.sizes
    case = scaling.rollout.case(DEVICE, "{prompts} x ({prompt} + {group} x {completion}) tokens")
    runs = {
        "ours": (2, sizes["prompts"]),
        "ours, on one": (1, sizes["prompts"]),
        "ours, half of it on one": (1, sizes["prompts"] // 2),
    }
    contenders, by_phase = {}, {}
    for name, (ranks, prompts) in runs.items():
        steps = measured(scaling, ranks, prompts)
        # A completion is never longer: all of every rank's share were sampled to the end.
        tokens = prompts * sizes["group"] * sizes["completion"]
        difference = checked(steps, tokens, LIMITS[case.dtype])
        contenders[name] = {
            "version": None, "errors": {"sampler - trainer log-prob": difference}, "work": tokens,
            "extra": max(done.get("memory_allocated", 0) for done in steps),
            **measurement.spread([1e3 * done["seconds"] for done in steps]),
        }  # fmt: skip
        by_phase[f"ms of a step, {name}"] = phases(steps)
    rate = {name: result["work"] / result["ms"] for name, result in contenders.items()}
    record({
        "case": case.name, "mode": f"whole step on 2, {OPTIMIZER}", "dtype": case.dtype,
        "shape": case.shape | scaling.settings, "flops": 0, "bytes": 0, "floor": None, "ours": "ours",
        "work": ["tokens", contenders["ours"]["work"]], "contenders": contenders,
        "facts": {f"tokens/s ÷ {name}": rate["ours"] / rate[name] for name in rate if name != "ours"} | by_phase,
    })  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
