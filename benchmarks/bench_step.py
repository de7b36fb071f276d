"""Whole GRPO steps: seconds by phase and memory, in a process of their own whose share of the card is limited.

One prompt and its group of completions, LoRA on every linear, KL against the base model, random weights
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
from nanogrpo.grpo.memory import plan_memory
from nanogrpo.grpo.rewards import WeightedReward
from nanogrpo.grpo.tasks import Example
from nanogrpo.rollout.checkpoint import open_checkpoint, resolve_checkpoint
from nanogrpo.rollout.random_weights import find_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIMIZER = "adamw_offload"
SLOWEST = 240  # seconds that a case may take: then the steps done so far count
# Sampler and trainer round differently; a log-prob that differs by more is plainly wrong.
LIMITS = {"bfloat16": 0.5, "float32": 1e-4}


class LongPrompt:
    """A task of one question, of at least so many ``tokens``."""

    description = "one prompt"

    def __init__(self, tokens):
        tokenizer, words = open_checkpoint(resolve_checkpoint()).tokenizer, 1
        while (missing := tokens - len(tokenizer.apply_chat_template(self._messages(words)))) > 0:
            words += missing  # a token each
        self.tokens = len(tokenizer.apply_chat_template(self._messages(words)))
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


def trainer_of(config, task, ranks=None):
    """A trainer whose completions all have the config's length."""
    trainer = GRPOTrainer(config, task=task, rewards=[WeightedReward(mean_token, 1.0)], ranks=ranks)
    trainer.policy.tokenizer.eos_token_ids = ()  # random weights end a completion once in a while
    return trainer


def steps_of(trainer, began):
    """Make the steps of a trainer's config, until ``SLOWEST`` seconds after ``began``; of each its metrics, with its
    seconds."""
    for _ in range(trainer.config.steps):
        start = time.perf_counter()
        metrics = trainer.step()
        now = time.perf_counter()
        yield metrics | {"seconds": now - start}
        if trainer.ranks.any(now - began + (now - start) > SLOWEST):
            return


def settings_of(case, **settings):
    """Those of ``GRPOConfig`` for a ``cases.Step`` or ``cases.Scaling``, as JSON."""
    rollout = case.rollout
    shared = {
        "random_weights": rollout.model, "quantize": rollout.quantize, "lora_r": rollout.r, "device": DEVICE,
        "steps": case.warmup + case.steps, "group_size": rollout.sizes["group"], "temperature": 1.0,
        "max_completion_length": rollout.sizes["completion"], "kl_coef": 0.04, "lr": 1e-5,
    }  # fmt: skip
    return json.dumps(shared | settings | case.settings)


def main(settings, prompt):
    """Run the steps of a config, given as JSON, after a prompt of so many tokens; the metrics of each as a line of
    JSON, with the memory that was planned."""
    began = time.perf_counter()
    config, task = GRPOConfig(**json.loads(settings)), LongPrompt(int(prompt))
    planned = plan_memory(find_shape(config.random_weights)[1], config, task.tokens).total
    for metrics in steps_of(trainer_of(config, task), began):
        print(json.dumps(metrics | {"memory_planned": planned}), flush=True)


def measured(case):
    """Metrics of the measured steps, run in a process of their own; and bytes of the card in use before it."""
    settings = settings_of(
        case, prompts_per_step=1, optimizer=OPTIMIZER, vram_limit=case.limit / 1024 or None
    )
    used = 0
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        used = total - free
    steps = in_process(__file__, settings, case.rollout.sizes["prompt"], seconds=SLOWEST)
    assert steps, f"{case} has not done a step in {SLOWEST} seconds"
    return steps[case.warmup :] or steps[-1:], used


def median(steps, name):
    return measurement.spread([step[name] for step in steps])["ms"]


def phases(steps):
    """{phase: milliseconds of a step} (medians), with what lies between the phases."""
    found = {phase: 1e3 * median(steps, f"seconds_{phase}") for phase in PHASES}
    return found | {"other": max(0.0, 1e3 * median(steps, "seconds") - sum(found.values()))}


def facts(steps, used):
    """Milliseconds by phase (median) and, on a GPU, MiB: what the allocator gave out and held, the card's own, and
    what was planned for it."""
    found = {
        "ms of a step": phases(steps),
        "sampled tokens/s": median(steps, "completion_tokens") / median(steps, "seconds_rollout"),
        "steps before": steps[0]["step"] - 1,
    }
    if "memory_card" in steps[0]:
        most = {
            name: max(step[f"memory_{name}"] for step in steps)
            for name in ("allocated", "reserved", "card", "planned")
        }
        most["card"] -= used  # by others, this benchmark's own process among them
        found |= {f"MiB {name}": size / 2**20 for name, size in most.items()}
    return found


def checked(steps, tokens, limit):
    """The sampler's largest distance from the trainer, after an assertion that no step was cut short or skipped."""
    assert all(done["completion_tokens"] == tokens for done in steps)
    difference = max(done["sampler_logprob_diff_max"] for done in steps)
    assert not any(done["skipped"] for done in steps) and difference <= limit
    return difference


@pytest.mark.parametrize("step", cases.step(DEVICE), ids=str)
def test_step(record, step):
    steps, used = measured(step)
    case = step.rollout.case(DEVICE, "{prompt} + {group} x {completion} tokens")
    shape = case.shape | {"limit, MiB": step.limit} | step.settings
    tokens = case.shape["group"] * case.shape["completion"]
    difference = checked(steps, tokens, LIMITS[case.dtype])
    times = measurement.spread([1e3 * done["seconds"] for done in steps])
    extra = max(done.get("memory_allocated", 0) for done in steps)
    record({
        "case": case.name, "mode": f"whole step, {OPTIMIZER}", "dtype": case.dtype, "shape": shape,
        "flops": 0, "bytes": 0, "floor": None, "ours": "ours", "work": ["tokens", tokens],
        "facts": facts(steps, used),
        "contenders": {
            "ours": {"version": None, "errors": {"sampler - trainer log-prob": difference}, "extra": extra, **times}
        },
    })  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
