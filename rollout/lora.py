"""What adapters a policy has, and their files in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT's names are those of the model as Hugging Face has it. Phi-3's q, k and v are one module there, and so are its
gate and up: their n adapters of rank r are written as one of rank n r, the lora_a's stacked, the lora_b's block by
block on the diagonal, which is the same function.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..kernels.lora_linear import MAX_RANK
from .checkpoint import FUSED
from .linear import LINEARS

LORA_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): rank r, scaling alpha / r, on the linears named in ``targets``.

    dtype: of their parameters, "float32" or the model's own: half the memory, but updates smaller than a rounding
    are lost.
    """

    r: int = 16
    alpha: float = 16
    targets: tuple[str, ...] = LINEARS
    dtype: str = "float32"

    def __post_init__(self):
        if not isinstance(self.r, int) or not 1 <= self.r <= MAX_RANK:
            raise ValueError(f"LoRA r must be an integer from 1 to {MAX_RANK}, got {self.r!r}")
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < math.inf:
            raise ValueError(f"LoRA alpha must be positive and finite, got {self.alpha!r}")
        if self.dtype not in LORA_DTYPES:
            raise ValueError(f"LoRA dtype must be one of {', '.join(LORA_DTYPES)}, got {self.dtype!r}")
        unknown = [target for target in self.targets if target not in LINEARS]
        if unknown or not self.targets:
            raise ValueError(f"LoRA targets must be some of {', '.join(LINEARS)}; got {unknown or 'none'}")


DEFAULT_LORA = LoraConfig()


def fused_projections(architecture):
    """{module: its parts} of the projections that Hugging Face's class of this architecture has as one."""
    return FUSED if architecture == "phi3" else {}


def check_targets(lora, architecture):
    """ValueError where the adapters could not be written in the names of the model's own class."""
    for whole, parts in fused_projections(architecture).items():
        chosen = [part for part in parts if part in lora.targets]
        if chosen and len(chosen) < len(parts):
            raise ValueError(
                f"LoRA targets must have all of {', '.join(parts)} or none, since {architecture} has them as one "
                f"{whole}; got {', '.join(chosen)}"
            )


def write_adapter(folder, lora, tensors, *, base, architecture):
    """tensors: PEFT's names of the separate projections to CPU tensors; base: name of the base model.

    Raises OSError where the folder cannot be written or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    targets, ranks, alphas = list(lora.targets), {}, {}
    for whole, parts in fused_projections(architecture).items():
        if parts[0] not in targets:
            continue
        tensors = _fuse(tensors, whole, parts)
        targets = [target for target in targets if target not in parts] + [whole]
        ranks[whole], alphas[whole] = lora.r * len(parts), lora.alpha * len(parts)
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    # Whole or not at all: a full disk leaves what was there before.
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    partial = [path.with_name(path.name + ".partial") for path in files]
    try:
        save_file(tensors, partial[0], metadata={"format": "pt"})
        partial[1].write_text(json.dumps(description, indent=2) + "\n")
        for written, path in zip(partial, files, strict=True):
            os.replace(written, path)
    except (OSError, SafetensorError) as error:
        for path in partial:
            path.unlink(missing_ok=True)
        raise OSError(f"adapter {folder} could not be written: {error}") from error


def read_adapter(folder, shapes, *, architecture):
    """(LoraConfig, tensors of the separate projections) of a folder that this project or PEFT wrote.

    shapes: name of a linear to the (N, K) of its weight, as in ``Transformer.linears``.
    """
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} is no adapter folder: it has no {file}")
    try:
        description = json.loads((folder / "adapter_config.json").read_text())
        r, alpha, targets = (description[key] for key in ("r", "lora_alpha", "target_modules"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/adapter_config.json is no LoRA configuration: {error!r}") from error
    if not isinstance(targets, list):
        raise ValueError(f"{folder} has target_modules {targets!r}, expected a list of names")
    fused = {whole: parts for whole, parts in fused_projections(architecture).items() if whole in targets}
    stacked = {
        pattern: {whole: value * len(parts) for whole, parts in fused.items()}
        for pattern, value in (("rank_pattern", r), ("alpha_pattern", alpha))
    }
    for setting in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if description.get(setting) and description[setting] != stacked.get(setting):
            raise ValueError(f"{folder} sets {setting}, expected a plain LoRA adapter")
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder}/adapter_model.safetensors is damaged: {error}") from error
    targets = list(targets)
    for whole, parts in fused.items():
        try:
            tensors = _separate(tensors, whole, parts, shapes, r if description.get("rank_pattern") else None)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{folder}: the adapter of {whole} does not fit this model: {error}") from error
        targets = [target for target in targets if target != whole] + list(parts)
    try:
        return LoraConfig(r=r, alpha=alpha, targets=tuple(targets)), tensors
    except ValueError as error:
        raise ValueError(f"{folder}/adapter_config.json: {error}") from error


def _fuse(tensors, whole, parts):
    joined = {}
    for name, lora_a in tensors.items():
        owner = next((part for part in parts if f".{part}." in name), None)
        if owner is None:
            joined[name] = lora_a
        elif owner == parts[0] and ".lora_A." in name:
            names = [name.replace(f".{owner}.", f".{part}.") for part in parts]
            fused = name.replace(f".{owner}.", f".{whole}.")
            joined[fused] = torch.cat([tensors[n] for n in names])
            blocks = [tensors[n.replace(".lora_A.", ".lora_B.")] for n in names]
            joined[fused.replace(".lora_A.", ".lora_B.")] = torch.block_diag(*blocks)
    return joined


def _separate(tensors, whole, parts, shapes, r):
    """Undo ``_fuse`` with rank r a part; r None: one adapter for all parts, which then share its lora_a."""
    separate = {}
    for name, lora_a in tensors.items():
        if f".{whole}." not in name:
            separate[name] = lora_a
        elif ".lora_A." in name:
            lora_b = tensors[name.replace(".lora_A.", ".lora_B.")]
            names = [name.replace(f".{whole}.", f".{part}.") for part in parts]
            modules = [n.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for n in names]
            rows = lora_b.split([shapes[module][0] for module in modules])
            for index, (part, block) in enumerate(zip(names, rows, strict=True)):
                columns = slice(None) if r is None else slice(index * r, (index + 1) * r)
                if r is not None and block.count_nonzero() != block[:, columns].count_nonzero():
                    raise ValueError(f"{name}: its parts share ranks, expected lora_B block by block")
                separate[part] = lora_a[columns].clone()
                separate[part.replace(".lora_A.", ".lora_B.")] = block[:, columns].clone()
    return separate
