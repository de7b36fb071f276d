"""What CUDA takes beside tensors."""

import ctypes
import os

import pytest
import torch
from nanogrpo.kernels._runtime import bound_workspaces
from nanogrpo.rollout.cuda_context import lean_cuda


def test_workspaces_are_small_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that what is set below is taken back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    bound_workspaces()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:2:16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    bound_workspaces()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.gpu
def test_stacks_are_given_back_and_taken_where_needed():
    lean_cuda(torch.device("cuda"))
    free = torch.cuda.mem_get_info()[0]
    lean_cuda(torch.device("cuda"))
    x = torch.randn(100_000, device="cuda")
    assert torch.equal(x.sort().values.cpu(), x.cpu().sort().values)
    assert free - torch.cuda.mem_get_info()[0] < 100 * 2**20
    size = ctypes.c_size_t(1)
    assert ctypes.CDLL("libcuda.so.1").cuCtxGetLimit(ctypes.byref(size), 0) == 0 and size.value == 0
