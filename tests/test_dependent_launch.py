"""Kernels that start early must wait before they touch memory; cards without the feature must compile without it."""

import os
import re

import pytest
import torch
from cross_compile import every_card, recorded_launches
from nanogrpo.kernels.decode_rows import _advance_triton
from nanogrpo.kernels.dependent_launch import MIN_ARCH
from nanogrpo.kernels.kv_store import _store_kv_triton
from nanogrpo.kernels.paged_decode import paged_decode
from nanogrpo.kernels.rms_norm import _rms_norm_triton
from nanogrpo.kernels.rotary import _rotary_triton
from nanogrpo.kernels.swiglu import _swiglu_triton
from nanogrpo.kernels.token_sampling import _sample_tokens_triton

TOUCH = re.compile(r"\b(ld|st|atom|red|cp\.async)\S*\.(global|shared\.global)")
KERNELS = {
    "_advance_kernel", "_chunk_kernel", "_draw_kernel", "_merge_kernel", "_parts_kernel", "_rms_norm_kernel",
    "_rotary_kernel", "_store_kv_kernel", "_swiglu_kernel",
}  # fmt: skip


def decode_step(dtype=torch.bfloat16):
    """Every launch of a decode step that is not a linear, with and without what is optional in it."""
    x, weight = torch.zeros(3, 256, dtype=dtype), torch.ones(256, dtype=dtype)
    q, k = torch.zeros(3, 4, 64, dtype=dtype), torch.zeros(3, 2, 64, dtype=dtype)
    angles, slots = torch.zeros(3, 32), torch.arange(3)
    caches = [torch.zeros(64, 16, 2, 64, dtype=dtype) for _ in range(2)]
    lens = torch.ones(3, dtype=torch.int32)
    for residual in (None, x):
        _rms_norm_triton(x, residual, weight, 1e-6)
    _rotary_triton(q, k, angles, angles, False)
    _swiglu_triton(x)
    _store_kv_triton(k, k, *caches, slots, None)
    for width in (1, 64):
        table = torch.zeros(3, width, dtype=torch.int32)
        paged_decode(q, k, k, angles, angles, *caches, table, lens, 0.1, None)
        paged_decode(q, *(None,) * 4, *caches, table, lens, 0.1, None)
    logits, rows = torch.zeros(3, 5000), torch.arange(3)
    for keys, temperature in (([rows] * 4, 1.0), ([], 0.0)):
        _sample_tokens_triton(logits, rows, None, keys, temperature)
    state = torch.zeros(4, 3, dtype=torch.int64), lens, torch.zeros(2, 3, 3, dtype=torch.float64)
    _advance_triton(rows, logits[:, 0], None, logits[0] > 0, *state, rows[:1])


@every_card
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, so needs the compiler")
def test_launched_early_means_waiting_first(cc):
    with recorded_launches(cc) as launches:
        decode_step()
    assert {name for name, _ in launches} == KERNELS
    for name, compiled in launches:
        before, wait, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
        assert compiled.metadata.launch_pdl == bool(wait) == (cc >= MIN_ARCH), name
        assert TOUCH.search(after if wait else before), f"{name} touches no memory: does the pattern fit?"
        assert not (wait and TOUCH.search(before)), f"{name} touches memory before it waits"
