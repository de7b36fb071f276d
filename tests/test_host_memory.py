"""Tensors that the GPU reads in the CPU's memory."""

import gc

import pytest
import torch
import torch.nn.functional as F
from nanogrpo.rollout.host_memory import in_host_memory

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_gathered_from_the_cpu(dtype):
    table = torch.randn(5000, 96, device="cuda").to(dtype)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    far = in_host_memory(table)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert (far.device, far.dtype, far.shape) == (table.device, dtype, table.shape)
    ids = torch.randint(5000, (300,), device="cuda")
    expected = F.embedding(ids, table)
    assert torch.equal(F.embedding(ids, far), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = F.embedding(ids, far)
    graph.replay()
    assert torch.equal(rows, expected)
