"""Every setting of a run in one place, checked before anything is loaded."""

import dataclasses
import json
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

from .advantages import ESTIMATORS
from .algorithms import ALGORITHMS, find_algorithm
from .optimizer import OPTIMIZERS
from .rewards import REWARDS, parse_rewards
from .tasks import TASKS, find_task

MAX_SEED = 2**31
KV_DTYPES = (None, "int8")  # those of the sampler


KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def setting(default, help):
    return field(default=default, metadata={"help": help})


def kind_of(field):
    """The type of a setting's values: ``int`` for a field annotated ``int | None``."""
    return next(kind for kind in (typing.get_args(field.type) or (field.type,)) if kind is not types.NoneType)


@dataclass(frozen=True)
class GRPOConfig:
    """A GRPO run. Every field is a flag of ``nanogrpo train``."""

    model: str | None = setting(
        None, "hub name, folder or .gguf file; default: the packaged SmolLM2-135M-Instruct"
    )
    random_weights: str | None = setting(
        None,
        "instead of a model, a published shape with random weights, to measure: qwen2.5-1.5b, phi-4, ...",
    )
    task: str = setting(
        "larger", f"what to learn: {', '.join(TASKS)}, gsm8k, gsm8k:FOLDER, reasoning_gym:NAME"
    )
    rewards: str | None = setting(
        None, f"name:weight, ...; default: the task's own; names: {', '.join(REWARDS)}"
    )
    reward_timeout: float = setting(60.0, "seconds that one call of a reward function may take")
    reward_processes: int = setting(
        0, "processes that call the reward functions and can be killed; 0: threads of this one"
    )
    steps: int | None = setting(None, "optimiser steps; default: what the task takes")
    group_size: int = setting(8, "completions a prompt (G)")
    prompts_per_step: int = setting(8, "prompts a step")
    max_completion_length: int | None = setting(
        None, "tokens a completion at most; default: what the task takes"
    )
    temperature: float = setting(1.2, "sampling temperature")
    algorithm: str = setting("grpo", f"what to train by: {', '.join(ALGORITHMS)}")
    estimator: str | None = setting(
        None, f"advantages: gdpo, {', '.join(ESTIMATORS)}; default: as the algorithm has them"
    )
    kl_coef: float = setting(0.1, "weight of the KL penalty against the base model")
    kl_place: str | None = setting(
        None, "where that penalty stands: loss or reward; default: as the algorithm has it"
    )
    sampler_correction: str | None = setting(
        None,
        "weigh the loss by trainer / sampler probability: token-truncate, sequence-mask, ...; default: no",
    )
    truncated: str = setting(
        "keep", "completions cut off at the limit: keep, mask (not learned from), drop (nor in the baseline)"
    )
    overlong_buffer: int = setting(
        0, "tokens below the limit over which DAPO's punishment grows to -1; 0: none"
    )
    dynamic_sampling: int = setting(1, "rounds of sampling a step at most, to replace groups without signal")
    gamma: float = setting(1.0, "discount a token (ppo)")
    gae_lambda: float = setting(0.95, "lambda of generalised advantage estimation (ppo)")
    value_coef: float = setting(0.1, "weight of the value loss (ppo)")
    value_clip: float = setting(0.2, "a value may move this far a step (ppo)")
    dpo_beta: float = setting(0.1, "weight of the drift from the base model in a preference (online_dpo)")
    optimizer: str = setting(
        "adamw",
        "adamw; adamw8bit (bitsandbytes): moments in 8 bits; adamw_offload: float32 adapters, gradients and moments "
        "in CPU memory, the adapters on the GPU in the model's dtype",
    )
    num_iterations: int = setting(1, "optimiser steps on each batch of rollouts")
    lora_r: int = setting(16, "rank of the adapters")
    lora_alpha: float = setting(32.0, "adapters are scaled by alpha / r")
    lora_dtype: str = setting(
        "float32", "of the adapters and their gradients: float32, or the model's for half the memory"
    )
    lr: float = setting(4e-4, "peak learning rate of AdamW")
    warmup_steps: int = setting(10, "steps of linear warm-up")
    min_lr_ratio: float = setting(0.1, "the linear decay ends at this share of lr")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    token_budget: int = setting(
        2048, "packed tokens a micro-batch, or the longest sequence; lower it to save memory"
    )
    share_prefix: bool = setting(True, "compute what sequences have in common once in training")
    checkpoint_layers: bool | None = setting(
        None, "keep a layer's input alone and compute it again in the backward pass; default: on cuda"
    )
    offload_checkpoints: bool = setting(
        False, "on cuda, let those inputs wait in CPU memory: for long sequences"
    )
    held_out: int = setting(200, "held-out questions that measure the result")
    seed: int = setting(0, "of data, adapters and sampling")
    device: str | None = setting(None, "cpu or cuda; default: cuda where there is one")
    dtype: str | None = setting(
        None, "float32, bfloat16 or float16; default: bfloat16 on cuda, float32 on the CPU"
    )
    quantize: str | None = setting(None, "4-bit format of the frozen linears: nf4 or int4; default: dense")
    vram_limit: float | None = setting(
        None, "GiB of the card that the process may take, CUDA's own included; default: no limit"
    )
    kv_memory: float | None = setting(
        None, "GiB for keys and values while sampling; default: what a step needs"
    )
    kv_dtype: str | None = setting(
        None,
        "int8: keys and values as 8-bit codes, nearly twice the tokens in the same memory; default: the model's",
    )
    save_every: int = setting(1, "steps between checkpoints")
    keep_checkpoints: int = setting(2, "checkpoints that are kept, the last ones")
    save_batches: bool = setting(False, "keep the rollouts of every step, to be replayed")
    tensorboard: bool = setting(False, "write the metrics as TensorBoard files too")
    out: str | None = setting(None, "run folder; default: runs/TASK-seedSEED")

    def __post_init__(self):
        for known in dataclasses.fields(self):
            value, kind = getattr(self, known.name), kind_of(known)
            if value is None and known.type is not kind:
                continue
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{known.name} must be {KINDS[kind]}, got {value!r}")
            if kind is float and math.isinf(value):
                raise ValueError(f"{known.name} must be finite, got {value}")
        task = find_task(self.task)
        for name in ("steps", "rewards", "max_completion_length"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(task, name))
        parse_rewards(self.rewards)
        if self.random_weights is not None:
            if self.model is not None:
                raise ValueError(
                    f"model and random_weights exclude each other, got {self.model!r} and {self.random_weights!r}"
                )
            from ..rollout.random_weights import find_shape  # here: the settings alone need no model's code

            find_shape(self.random_weights)
        algorithm = find_algorithm(self.algorithm)
        for name in ("estimator", "kl_place"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(algorithm.loss, name))
        at_least = {
            "steps": 1,
            "prompts_per_step": 1,
            "max_completion_length": 1,
            "num_iterations": 1,
            "lora_r": 1,
            "warmup_steps": 0,
            "kl_coef": 0,
            "dynamic_sampling": 1,
            "overlong_buffer": 0,
            "value_coef": 0,
            "token_budget": 1,
            "held_out": 1,
            "save_every": 1,
            "keep_checkpoints": 1,
            "reward_processes": 0,
            "seed": 0,
        }
        for name, low in at_least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in (
            "lr",
            "temperature",
            "lora_alpha",
            "max_grad_norm",
            "value_clip",
            "dpo_beta",
            "reward_timeout",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.group_size < (1 if algorithm.objective == "ppo" else 2):
            raise ValueError(
                f"group_size must be at least 2, got {self.group_size}: {self.algorithm} compares the completions of "
                "a prompt with each other"
            )
        if self.seed >= MAX_SEED:
            raise ValueError(f"seed must be below {MAX_SEED}, got {self.seed}")
        fitting = ["gdpo", *ESTIMATORS] if algorithm.objective == "policy" else [algorithm.loss.estimator]
        if self.estimator not in fitting:
            raise ValueError(
                f"estimator of {self.algorithm} must be one of {', '.join(fitting)}, got {self.estimator!r}"
            )
        choices_of = {
            "kl_place": ("loss", "reward"),
            "truncated": ("keep", "mask", "drop"),
            "optimizer": OPTIMIZERS,
            "lora_dtype": ("float32", "bfloat16", "float16"),
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be int8 or left out, got {self.kv_dtype!r}")
        if self.optimizer == "adamw_offload" and self.lora_dtype != "float32":
            raise ValueError(
                f"adamw_offload keeps float32 originals of the adapters, got lora_dtype {self.lora_dtype}"
            )
        if self.offload_checkpoints and self.checkpoint_layers is False:
            raise ValueError("offload_checkpoints needs checkpoint_layers, got false")
        for name in ("gamma", "gae_lambda", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.overlong_buffer > self.max_completion_length:
            raise ValueError(
                f"overlong_buffer must be at most max_completion_length = {self.max_completion_length}, "
                f"got {self.overlong_buffer}"
            )
        if algorithm.objective == "online_dpo" and self.sampler_correction is not None:
            raise ValueError("sampler_correction is for losses with a ratio; online_dpo has none")
        self.loss_config()
        if self.quantize not in (None, "nf4", "int4"):
            raise ValueError(f"quantize must be nf4 or int4, got {self.quantize!r}")
        if self.device is not None and not re.fullmatch(r"(cpu|cuda)(:\d+)?", self.device):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        for name in ("vram_limit", "kv_memory"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a positive number of GiB, got {getattr(self, name)}")

    def loss_config(self):
        """The ``LossConfig`` of the algorithm, with this run's KL term and length."""
        changes = {"kl_coef": self.kl_coef, "max_completion_length": self.max_completion_length}
        changes["sampler_correction"] = self.sampler_correction
        if self.kl_place != find_algorithm(self.algorithm).loss.kl_place:
            # What stands in the other place is the default KL of that place.
            reward = {"kl_estimator": "k1", "kl_gradient": "plain"}
            changes |= (
                reward if self.kl_place == "reward" else {"kl_estimator": "k3", "kl_gradient": "corrected"}
            )
        return replace(find_algorithm(self.algorithm).loss, kl_place=self.kl_place, **changes)

    def learning_rate(self, step):
        """Learning rate of ``step`` (from 1): linear warm-up, then linear decay to min_lr_ratio * lr."""
        if step <= self.warmup_steps:
            return self.lr * step / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps - 1) / max(1, self.steps - self.warmup_steps)
        return self.lr * (1 - (1 - self.min_lr_ratio) * progress)

    def save(self, path):
        """Write as JSON, at once: a reader or a kill never meets half of it."""
        partial = Path(f"{path}.partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path):
        """Read what ``save`` wrote; ValueError naming the file if it does not parse or has unknown settings."""
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no run configuration: {error}") from error
