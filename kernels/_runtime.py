"""Where the kernels meet the runtime: operator registration, the interpreter flag, argument checks.

The only file of the package that reads the environment. A vendored copy should change ``LIB``: two copies
that register the same name silently override each other.
"""

import contextlib
import functools
import os

import torch

LIB = "nanogrpo"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
CHECK = os.environ.get("NANOGRPO_CHECK") == "1"  # look at values on CUDA too, which waits for the device


def check(condition, message):
    """Raise ``ValueError(message)`` unless ``condition`` holds; the message says what was got and expected."""
    if not condition:
        raise ValueError(message)


def register(name, *, triton_impl, torch_impl, fake, backward=None, setup_context=None):
    """Make ``torch.ops.<LIB>.<name>``: Triton on CUDA; plain torch on the CPU, or Triton under the interpreter.

    The schema is read from the annotations of ``triton_impl``, which allocates and returns its outputs.
    ``fake`` gives their shapes to ``torch.compile``; ``backward`` and ``setup_context`` are those of
    ``torch.library.register_autograd``. A device with no kernel raises in the dispatcher: no fallback.
    """
    op = torch.library.custom_op(f"{LIB}::{name}", triton_impl, mutates_args=(), device_types="cuda")
    op.register_kernel("cpu")(triton_impl if INTERPRET else torch_impl)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    return op


@functools.cache
def arch(device):
    """Compute capability of ``device`` as an integer (90 for sm_90); 80 on the CPU, the smallest target."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device):
    """Multiprocessors of ``device``; 2 on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def launch_on(tensor):
    """Context in which a Triton launch goes to the device of ``tensor``; to enter one costs what a launch does."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def bound_workspaces():
    """Have cuBLAS work in areas of 8 MiB, with which its results repeat, not 32; to be called before its first use.

    An environment that says otherwise stays as it is.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
