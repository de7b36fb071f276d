"""Tensors that the GPU reads in the CPU's memory."""

import gc

import pytest
import torch
import torch.nn.functional as F
from nanogrpo.grpo.memory import weight_bytes
from nanogrpo.kernels import dequantize_4bit, quantize_4bit
from nanogrpo.rollout.host_memory import ALIGNMENT, in_host_memory, laid_out_again
from nanogrpo.rollout.random_weights import random_policy

gpu = pytest.mark.gpu


@gpu
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


@gpu
@pytest.mark.parametrize(
    "name, quantize, far",
    [("tiny-phi3", "nf4", True), ("tiny-phi3", None, False), ("tiny-qwen2", "nf4", False)],
)
def test_embeddings_that_are_no_head_stay_with_the_cpu(name, quantize, far):
    gc.collect()
    before = torch.cuda.memory_allocated()
    policy = random_policy(name, quantize, None, "cuda")
    weights = weight_bytes(policy.config, quantize, 2)
    table = policy.model.embedding.nbytes
    gc.collect()
    rest = torch.cuda.memory_allocated() - before - weights
    assert 0 <= rest < 2**21 < table, "up to what the allocator rounds up"
    assert weight_bytes(policy.config, quantize, 2, "cpu") - weights == far * table
    ids = torch.randint(1000, (2, 40))
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, 20:] = True
    logprobs = policy.score(ids, mask)
    policy.model.embedding = policy.model.embedding.clone()
    assert torch.equal(policy.score(ids, mask), logprobs)


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_weights_are_laid_out_in_one_piece(format):
    generator = torch.Generator().manual_seed(0)
    dense = {name: torch.randn(5, 192, generator=generator) for name in "abcd"}
    weights = {
        name: dense[name].bfloat16() if name in "ad" else quantize_4bit(dense[name], format) for name in dense
    }
    before, far = dict(weights), weights["d"]
    assert laid_out_again(weights, torch.device("cpu"), but="d") is weights
    assert weights["d"] is far and list(weights) == list(before)
    parts = lambda weight: {"": weight} if isinstance(weight, torch.Tensor) else weight.tensors()
    places = []
    for name in "abc":
        got, want = parts(weights[name]), parts(before[name])
        assert got.keys() == want.keys()
        for field, part in got.items():
            assert part.dtype == want[field].dtype and torch.equal(part, want[field])
            places.append((part.data_ptr() - weights["a"].data_ptr(), part.nbytes))
    assert (
        len({part.untyped_storage().data_ptr() for name in "abc" for part in parts(weights[name]).values()})
        == 1
    )
    for (start, size), (following, _) in zip(places, places[1:], strict=False):
        assert start % ALIGNMENT == 0 and 0 <= following - (start + size) < ALIGNMENT
    assert weights["a"].untyped_storage().nbytes() < places[-1][0] + places[-1][1] + ALIGNMENT


@gpu
def test_weights_are_laid_out_without_gaps():
    gc.collect(), torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    weights = {}
    for index in range(20):  # what is quantised and what is left of it, as a loader makes them
        dense = torch.randn(1536, 4096 + 64 * index, device="cuda").bfloat16()
        weights[str(index)] = quantize_4bit(dense, "nf4") if index else dense
    del dense
    expected = [weights[str(i)] if i == 0 else dequantize_4bit(weights[str(i)]).cpu() for i in range(20)]
    kept = weights["0"].data_ptr()
    weights = laid_out_again(weights, torch.device("cuda"), but="0")
    gc.collect(), torch.cuda.empty_cache()
    size = sum(w.nbytes for w in weights.values())
    assert (
        size <= torch.cuda.memory_reserved() - reserved <= size + 4 * 2**20
        and weights["0"].data_ptr() == kept
    )
    for found, want in zip(list(weights.values())[1:], expected[1:], strict=True):
        assert found.device.type == "cuda" and torch.equal(dequantize_4bit(found).cpu(), want)
