"""Tensors that the GPU reads in the CPU's memory."""

import gc

import pytest
import torch
import torch.nn.functional as F
from nanogrpo.grpo.memory import weight_bytes
from nanogrpo.rollout.host_memory import in_host_memory
from nanogrpo.rollout.random_weights import random_policy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_gathered_from_the_cpu(dtype):
    table = torch.randn(5000, 96, device="cuda").to(dtype)
    torch.cuda.synchronize()
    gc.collect()
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


@pytest.mark.parametrize(
    "name, quantize, far",
    [("tiny-phi3", "nf4", True), ("tiny-phi3", None, False), ("tiny-qwen2", "nf4", False)],
)
def test_embeddings_that_are_no_head_stay_with_the_cpu(name, quantize, far):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    policy = random_policy(name, quantize, None, "cuda")
    weights = weight_bytes(policy.config, quantize, 2)
    table = policy.model.embedding.nbytes
    rest = torch.cuda.memory_allocated() - before - weights
    assert 0 <= rest < 2**20 < table, "up to what the allocator rounds up"
    assert weight_bytes(policy.config, quantize, 2, "cpu") - weights == far * table
    ids = torch.randint(1000, (2, 40))
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, 20:] = True
    logprobs = policy.score(ids, mask)
    policy.model.embedding = policy.model.embedding.clone()
    assert torch.equal(policy.score(ids, mask), logprobs)
