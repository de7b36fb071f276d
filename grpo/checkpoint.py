"""Checkpoints of a run: trained parameters and optimiser state, written whole or not at all, read without pickle.

All other randomness of a run is keyed by (seed, step), so these tensors and the step number are its whole state.
"""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(folder, step, parameters, optimizer, *, keep=2):
    """Write ``folder/step-XXXXXX`` under a temporary name, rename it, and drop all but the last ``keep``.

    parameters: dict of names to the trained parameters, all of the optimiser's.
    """
    folder = Path(folder)
    final, partial = folder / f"step-{step:06d}", folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach().cpu()
        for moment in MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu()
                tensors["optimizer_step"] = optimizer.state[parameter]["step"].cpu()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "state.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step}) + "\n")
    for file in partial.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(folder):
    """The complete checkpoints under ``folder``, oldest first."""
    return sorted(Path(folder).glob("step-*"))


def load_checkpoint(path, parameters, optimizer):
    """Put a checkpoint into ``parameters`` (dict of names) and their optimiser, and return its step.

    Raises ValueError naming the checkpoint when it is damaged or does not fit, before anything is changed.
    """
    path = Path(path)
    try:
        step = json.loads((path / "state.json").read_text())["step"]
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from error
    saved = {
        name.removeprefix("parameter."): t for name, t in tensors.items() if name.startswith("parameter.")
    }
    if set(saved) != set(parameters):
        odd = sorted(set(saved) ^ set(parameters))[:3]
        raise ValueError(f"checkpoint {path} does not fit this run, first differences: {odd}")
    moments = {(m, name): tensors.get(f"{m}.{name}") for m in MOMENTS for name in parameters}
    started = any(moment is not None for moment in moments.values())
    for name, parameter in parameters.items():
        for what, tensor in [(name, saved[name])] + [
            (f"{m}.{name}", moments[m, name]) for m in MOMENTS if started
        ]:
            got, expected = None if tensor is None else tuple(tensor.shape), tuple(parameter.shape)
            if got != expected:
                raise ValueError(f"checkpoint {path}: {what} has shape {got}, expected {expected}")
    if started and "optimizer_step" not in tensors:
        raise ValueError(f"checkpoint {path} is damaged: it has no optimizer_step")
    for name, parameter in parameters.items():
        parameter.data.copy_(saved[name])
        if started:
            state = {moment: moments[moment, name].to(parameter.device) for moment in MOMENTS}
            # The fused optimiser counts its steps on the parameter's device, in a tensor of each parameter's own.
            state["step"] = tensors["optimizer_step"].clone().to(parameter.device)
            optimizer.state[parameter] = state
    return step
