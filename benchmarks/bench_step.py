"""Whole GRPO steps: seconds by phase and memory, in a process of their own whose share of the card is limited.

One prompt of 128 tokens and its group of completions, LoRA on every linear, KL against the base model, random weights
(neither speed nor memory depends on the values), rewards that differ within the group. The limit is what
``--vram-limit`` enforces: the allocator refuses more. No peer takes part: TRL and Unsloth bring their own samplers
and processes, and cannot take turns with this one.
"""

import json
import sys
import time

import cases
import measurement
import pytest
import torch
from comparison import in_process
from nanogrpo.grpo import GRPOConfig, GRPOTrainer
from nanogrpo.grpo.measurement import PHASES
from nanogrpo.grpo.rewards import WeightedReward
from nanogrpo.grpo.tasks import Example
from nanogrpo.rollout.checkpoint import open_checkpoint, resolve_checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARMUP, STEPS = 3, 8  # kernels compile and graphs are captured in the first ones
PROMPT = 128  # tokens, about
# Sampler and trainer round differently; a log-prob that differs by more is plainly wrong.
LIMITS = {"bfloat16": 0.5, "float32": 1e-4}


class LongPrompt:
    """A task of one question, as long as asked for."""

    description = "one prompt"

    def __init__(self, tokens):
        tokenizer, words = open_checkpoint(resolve_checkpoint()).tokenizer, 1
        while (missing := tokens - len(tokenizer.apply_chat_template(self._messages(words)))) > 0:
            words += missing  # a token each
        self.example = Example(tuple(self._messages(words)), "1", 1, (1,))

    def _messages(self, words):
        return [{"role": "user", "content": "Count the words: " + "one " * words}]

    def split(self, held_out):
        return (), ()

    def draw(self, sets, count, key):
        return [self.example] * count


def mean_token(completion, example):
    """A reward that differs within a group of random completions."""
    return sum(completion.token_ids) / len(completion.token_ids) / 1e5


def main(settings):
    """Run the steps of a config, given as JSON, and print the metrics of each as a line of JSON."""
    config = GRPOConfig(**json.loads(settings))
    trainer = GRPOTrainer(config, task=LongPrompt(PROMPT), rewards=[WeightedReward(mean_token, 1.0)])
    for _ in range(config.steps):
        start = time.perf_counter()
        metrics = trainer.step()
        print(json.dumps(metrics | {"seconds": time.perf_counter() - start}), flush=True)


def steps_of(rollout):
    """Metrics of the measured steps, run in a process of their own; and bytes of the card in use before it."""
    settings = {
        "random_weights": rollout.model, "quantize": rollout.quantize, "lora_r": rollout.r, "device": DEVICE,
        "steps": WARMUP + STEPS, "group_size": rollout.sizes["group"], "prompts_per_step": 1, "temperature": 1.0,
        "max_completion_length": rollout.sizes["completion"], "kl_coef": 0.04, "lr": 1e-5,
        "optimizer": "adamw8bit" if measurement.installed("bitsandbytes") and DEVICE == "cuda" else "adamw",
        "vram_limit": rollout.sizes["limit"] / 1024 or None,
    }  # fmt: skip
    used = 0
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        used = total - free
    return in_process(__file__, json.dumps(settings))[WARMUP:], used


def facts(steps, used):
    """Milliseconds by phase (median) and, on a GPU, MiB: what the allocator gave out and held, and the card's own."""
    median = lambda name: measurement.spread([step[name] for step in steps])["ms"]
    found = {"ms of a step": {phase: 1e3 * median(f"seconds_{phase}") for phase in PHASES}}
    found["ms of a step"]["other"] = max(0.0, 1e3 * median("seconds") - sum(found["ms of a step"].values()))
    found["sampled tokens/s"] = median("completion_tokens") / median("seconds_rollout")
    if "memory_card" in steps[0]:
        most = {
            name: max(step[f"memory_{name}"] for step in steps) for name in ("allocated", "reserved", "card")
        }
        most["card"] -= used  # by others, this benchmark's own process among them
        found |= {f"MiB {name}": size / 2**20 for name, size in most.items()}
    return found


@pytest.mark.parametrize("rollout", cases.step(DEVICE), ids=lambda rollout: f"{rollout}, {rollout.sizes}")
def test_step(record, rollout):
    steps, used = steps_of(rollout)
    case = rollout.case(DEVICE, "{group} completions of {completion} tokens")
    difference = max(step["sampler_logprob_diff_max"] for step in steps)
    assert all(step["completion_tokens"] == case.shape["group"] * case.shape["completion"] for step in steps)
    assert not any(step["skipped"] for step in steps) and difference <= LIMITS[case.dtype]
    times = measurement.spread([1e3 * step["seconds"] for step in steps])
    extra = max(step.get("memory_allocated", 0) for step in steps)
    record({
        "case": case.name, "mode": "whole step", "dtype": case.dtype, "shape": case.shape, "flops": 0, "bytes": 0,
        "floor": None, "ours": "ours", "work": ["tokens", case.shape["group"] * case.shape["completion"]],
        "facts": facts(steps, used),
        "contenders": {
            "ours": {"version": None, "errors": {"sampler - trainer log-prob": difference}, "extra": extra, **times}
        },
    })  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
