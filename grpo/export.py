"""The adapter of a run, at any of its checkpoints, as a folder in PEFT's format; no weight of the model is read."""

from pathlib import Path

from ..rollout import LoraConfig, open_checkpoint, resolve_checkpoint
from ..rollout.lora import write_adapter
from ..rollout.random_weights import find_shape
from .checkpoint import choose_checkpoint, read_parameters
from .config import GRPOConfig


def export_adapter(run, folder, step=None):
    """Write the adapter of the run folder ``run`` to ``folder``; returns the step that it is of.

    step: default the last checkpoint's. Raises ValueError where there is no run or no such checkpoint, or where it is
    damaged.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} holds no run: it has no config.json")
    config = GRPOConfig.load(run / "config.json")
    checkpoint = choose_checkpoint(run / "checkpoints", step)
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint yet")
    step, parameters = read_parameters(checkpoint)
    adapters = {name: tensor for name, tensor in parameters.items() if name.startswith("base_model.")}
    if config.random_weights is None:
        opened = open_checkpoint(resolve_checkpoint(config.model))
        base, model = str(opened.path), opened.config
    else:
        base, model = find_shape(config.random_weights)
    lora = LoraConfig(r=config.lora_r, alpha=config.lora_alpha, dtype=config.lora_dtype)
    write_adapter(folder, lora, adapters, base=base, architecture=model.architecture)
    return step
