"""Checkpoints of a run: trained parameters and optimiser state, written whole or not at all, read without pickle.

All other randomness of a run is keyed by (seed, step), so these tensors and the step number are its whole state: the
sampler's counters, the data position and the rollouts of the next step follow from them.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file

from .optimizer import moment_shapes, restore, step_tensor


def save_checkpoint(folder, step, parameters, optimizer, *, keep=2):
    """Write ``folder/step-XXXXXX`` under a temporary name, rename it, and drop all but the last ``keep``.

    parameters: dict of names to the trained parameters, all of the optimiser's. Raises OSError, with the checkpoints
    before it untouched, where the folder cannot be written or the disk is full.
    """
    folder = Path(folder)
    final, partial = folder / f"step-{step:06d}", folder / "partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = {}
        for name, parameter in parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach().cpu()
            if parameter in optimizer.state and step_tensor(optimizer, parameter) > 0:
                for moment in moment_shapes(optimizer, parameter):
                    tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu()
                tensors["optimizer_step"] = step_tensor(optimizer, parameter)
        state = partial / "state.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, state)
        (partial / "state.json").write_text(json.dumps({"step": step, "sha256": _sha256(state)}) + "\n")
        for file in partial.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint {final} could not be written: {error}") from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(folder):
    """The complete checkpoints under ``folder``, oldest first."""
    return sorted(Path(folder).glob("step-*"))


def choose_checkpoint(folder, step=None):
    """The last checkpoint under ``folder``, or that of ``step``; None where there is none yet.

    Raises ValueError, naming those there are, where ``step`` has none.
    """
    known = list_checkpoints(folder)
    if step is None:
        return known[-1] if known else None
    for path in known:
        if path.name == f"step-{step:06d}":
            return path
    names = ", ".join(path.name for path in known) or "none"
    raise ValueError(f"{folder} has no checkpoint of step {step}, only {names}")


def load_checkpoint(path, parameters, optimizer):
    """Put a checkpoint into ``parameters`` (dict of names) and their optimiser, and return its step.

    Raises ValueError naming the checkpoint, and the one before it, when it is damaged or does not fit, before
    anything is changed.
    """
    path = Path(path)
    with _named_damage(path):
        return _load(path, parameters, optimizer)


def read_parameters(path):
    """(step, {name: tensor} of the trained parameters) of a checkpoint; ValueError naming it where it is damaged."""
    path = Path(path)
    with _named_damage(path):
        step, tensors = _read(path)
    return step, _parameters(tensors)


@contextlib.contextmanager
def _named_damage(path):
    """Turn what goes wrong in reading ``path`` into a ValueError that names it and the one before it."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = str(error)
        if not isinstance(error, ValueError) or "checkpoint" not in reason:
            reason = f"checkpoint {path} is damaged: {error}"
        earlier = [other for other in list_checkpoints(path.parent) if other < path]
        if earlier:
            step = int(earlier[-1].name.removeprefix("step-"))
            reason += f"; to go on from the one before it, ask for it: --resume-step {step}"
        raise ValueError(reason) from error


def _read(path):
    """(step, every tensor) of a checkpoint that is as it was written."""
    saved_as = json.loads((path / "state.json").read_text())
    data = (path / "state.safetensors").read_bytes()
    tensors = load(data)
    if hashlib.sha256(data).hexdigest() != saved_as["sha256"]:
        raise ValueError(f"checkpoint {path} is damaged: state.safetensors is not what was written")
    return int(saved_as["step"]), tensors


def _parameters(tensors):
    return {
        name.removeprefix("parameter."): t for name, t in tensors.items() if name.startswith("parameter.")
    }


def _load(path, parameters, optimizer):
    step, tensors = _read(path)
    saved = _parameters(tensors)
    if set(saved) != set(parameters):
        odd = sorted(set(saved) ^ set(parameters))[:3]
        raise ValueError(f"checkpoint {path} does not fit this run, first differences: {odd}")
    moments = {
        name: {moment: tensors.get(f"{moment}.{name}") for moment in moment_shapes(optimizer, parameter)}
        for name, parameter in parameters.items()
    }
    started = any(tensor is not None for found in moments.values() for tensor in found.values())
    for name, parameter in parameters.items():
        expected = {name: tuple(parameter.shape)}
        got = {name: tuple(saved[name].shape)}
        if started:
            for moment, shape in moment_shapes(optimizer, parameter).items():
                tensor = moments[name][moment]
                expected[f"{moment}.{name}"] = shape
                got[f"{moment}.{name}"] = None if tensor is None else tuple(tensor.shape)
        for what, shape in expected.items():
            if got[what] != shape:
                raise ValueError(f"checkpoint {path}: {what} has shape {got[what]}, expected {shape}")
    if started and "optimizer_step" not in tensors:
        raise ValueError(f"checkpoint {path} is damaged: it has no optimizer_step")
    for name, parameter in parameters.items():
        parameter.data.copy_(saved[name])
        if started:
            restore(optimizer, parameter, moments[name], tensors["optimizer_step"])
    return step


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
