"""Kernels that start early must wait before they touch memory; cards without the feature must compile without it."""

import importlib
import os
import re
from unittest import mock

import pytest
import torch
from cross_compile import every_card, recorded_launches
from nanogrpo.kernels.decode_rows import _advance_triton
from nanogrpo.kernels.dependent_launch import MIN_ARCH
from nanogrpo.kernels.head_sampling import _sample_from_head_triton
from nanogrpo.kernels.kv_store import _store_kv_triton
from nanogrpo.kernels.lora_decode import add_update, few_rows
from nanogrpo.kernels.packed_matmul import Update
from nanogrpo.kernels.quantization import quantize_4bit
from nanogrpo.kernels.rms_norm import _rms_norm_triton
from nanogrpo.kernels.rotary import _rotary_triton
from nanogrpo.kernels.swiglu import _swiglu_triton
from nanogrpo.kernels.token_sampling import _sample_tokens_triton

decode = importlib.import_module("nanogrpo.kernels.paged_decode")
TOUCH = re.compile(r"\b(ld|st|atom|red|cp\.async)\S*\.(global|shared\.global)")
REGISTER = re.compile(r"%[a-z]+\d+")
TABLES = {"context_lens", "block_table", "addresses", "k_cache", "v_cache"}
# What a kernel may touch before it waits, and why: what the kernel before has promised, or its caller vouches for.
EARLY = {"_parts_kernel": TABLES, "_merge_kernel": TABLES | {"q", "k", "v", "cos", "sin"}}
KERNELS = {
    "_advance_kernel", "_chunk_kernel", "_draw_kernel", "_draw_part_kernel", "_merge_kernel", "_parts_kernel",
    "_rms_norm_kernel", "_rotary_kernel", "_slice_kernel", "_store_kv_kernel", "_swiglu_kernel",
}  # fmt: skip


def touched(compiled, code):
    """Names of the pointers among a kernel's arguments from which this PTX computes what it loads and stores."""
    kinds = [kind for kind in compiled.src.signature.items() if kind[1] != "constexpr"]
    # None stands behind a tuple, which takes more than one place.
    pointers = {i: name for i, (name, kind) in enumerate(kinds) if str(kind).startswith("*")}
    origins, found = {}, set()
    for _ in range(2):  # what a loop carries comes round once more
        for line in re.sub(r"//.*", "", code).split(";"):
            line = re.sub(r"@!?%p\d+", "", line)
            used, inside = REGISTER.findall(line), REGISTER.findall(line.partition("[")[2])
            known = {pointers[i] for i in map(int, re.findall(r"\[\w+_param_(\d+)", line)) if i in pointers}
            known = known.union(*(origins.get(name, ()) for name in used))
            if TOUCH.search(line):
                own = set().union(*(origins.get(name, ()) for name in inside))
                found |= own or {"what it has loaded"}
            elif used and (not inside or "ld.param" in line):
                for name in used if "{" in line else used[:1]:
                    origins[name] = origins.get(name, set()) | known
    return found


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
    _store_kv_triton(k, k, *caches, slots, None, None, None)
    table = torch.zeros(3, 16, dtype=torch.int32)
    for shared in (False, True):
        with mock.patch.object(decode, "shares", lambda *_, shared=shared: shared):
            for early in (False, True):
                decode.paged_decode(
                    q, k, k, angles, angles, *caches, None, None, table, lens, 0.1, None, early
                )
            decode.paged_decode(q, *(None,) * 4, *caches, None, None, table, lens, 0.1, None)
    logits, rows = torch.zeros(3, 5000), torch.arange(3)
    for keys, temperature in (([rows] * 4, 1.0), ([], 0.0)):
        _sample_tokens_triton(logits, rows, None, keys, temperature)
        _sample_from_head_triton(x, torch.zeros(500, 256, dtype=dtype), None, keys, temperature, 2**20)
    state = torch.zeros(4, 3, dtype=torch.int64), lens, torch.zeros(2, 3, 3, dtype=torch.float64)
    _advance_triton(rows, logits[:, 0], None, logits[0] > 0, *state, rows[:1])


@every_card
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, so needs the compiler")
def test_launched_early_means_waiting_first(cc):
    with recorded_launches(cc) as launches:
        decode_step()
    assert {name for name, _ in launches} == KERNELS
    seen = set()
    for name, compiled in launches:
        before, wait, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
        assert compiled.metadata.launch_pdl == bool(wait) == (cc >= MIN_ARCH), name
        assert TOUCH.search(after if wait else before), f"{name} touches no memory: does the pattern fit?"
        early = touched(compiled, before) if wait else set()
        assert early <= EARLY.get(name, set()), f"{name} touches {early} before it waits"
        assert bool(early) == bool(wait and TOUCH.search(before)), f"{name}: whose memory is touched?"
        seen = seen | {(name, touch) for touch in early}
    # The tracing finds what is there: early decode reads tables and keys before it waits, and no queries.
    if cc >= MIN_ARCH:
        assert seen >= {("_parts_kernel", x) for x in TABLES - {"addresses"}}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, so needs the compiler")
@pytest.mark.parametrize("gated", [False, True])
def test_an_update_reads_early_what_the_product_before_it_has_promised(gated):
    """The tiled product waits before it lets the update start, which then reads B alone before it waits."""
    codes, scales, *layout = quantize_4bit(torch.randn(128, 256), "nf4").packed().operands()
    x, a, b = torch.zeros(40, 256).bfloat16(), torch.zeros(32, 256), torch.zeros(128, 16)
    columns = [0, 64, 64, 128]
    with recorded_launches(90) as launches:
        few_rows(x, [codes, *scales], a, b, columns, 0.5, None, *layout, gated, None)
        update = Update(torch.zeros(2, 40, 32), b, 0.5, tuple(columns), gated)
        add_update(torch.zeros(40, 128).bfloat16(), None, update, torch.bfloat16, True)
    (product, tiled), (early, up), (late, other) = launches
    assert (product, early, late) == ("tiled_kernel", "_up_kernel", "_up_kernel")
    order = re.findall(r"griddepcontrol\.(wait|launch_dependents)", tiled.asm["ptx"])
    assert order == ["wait", "launch_dependents"] * 2, "in the programs of W and in those of A"
    before = [kernel.asm["ptx"].partition("griddepcontrol.wait")[0] for kernel in (up, other)]
    assert touched(up, before[0]) == {"b"} and touched(other, before[1]) == set()
