"""What CUDA and its libraries take of a card beside all tensors, and how to have it be less."""

import ctypes

import torch

from ..kernels._runtime import bound_workspaces


def lean_cuda(device):
    """Have CUDA and cuBLAS take less of the card. Call it before anything else uses ``device``.

    The stacks that CUDA keeps for every thread a GPU can run are given back: 264 MiB on an H200. A kernel that has a
    stack still gets it: the driver then takes what that kernel needs. cuBLAS works in ``bound_workspaces``.
    """
    bound_workspaces()
    torch.zeros((), device=device)  # a context to ask of
    with torch.cuda.device(device):
        status = ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(0, ctypes.c_size_t(0))  # CU_LIMIT_STACK_SIZE
    if status:
        raise RuntimeError(f"CUDA refused to change its stack size, error {status}")
