"""Which implementation of a registered operator runs, where asking torch's dispatcher costs more than the kernel."""

import torch

from . import _runtime
from .quantized_weight import DTYPES


def route(op, triton_impl, torch_impl, device):
    """The implementation itself where nothing traces, else the operator: a small kernel takes less than its call."""
    if torch.compiler.is_compiling() or device.type not in ("cpu", "cuda"):
        return op
    return triton_impl if device.type == "cuda" or _runtime.INTERPRET else torch_impl


def check_floating(name, tensor):
    """Raise ValueError unless ``tensor`` has a dtype that the kernels take; float64 is the CPU's alone."""
    if tensor.dtype not in DTYPES and not (tensor.dtype == torch.float64 and tensor.device.type == "cpu"):
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, expected one of {DTYPES}, or float64 on the CPU"
        )


def wide(tensor):
    """``tensor`` in the dtype that the references compute in: float32, or float64 for float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
