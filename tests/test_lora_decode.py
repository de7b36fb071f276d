"""Few rows of a linear layer with adapters: every way it ends, against float64 and against separate operations."""

import os
import re

import pytest
import torch
import torch.nn.functional as F
from cross_compile import assert_compiles, assert_resident, every_card, recorded_launches, resource_usage
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import dequantize_4bit, quantize_4bit, swiglu
from nanogrpo.kernels.lora_decode import few_rows
from numerics import EPS, assert_no_worse_than

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
reaches_kernel = pytest.mark.skipif(not INTERPRET, reason="reaches the kernels only under the interpreter")


def problem(
    M, K, sizes, r, *, gaps=None, format="nf4", dtype=torch.float16, adapters=torch.float32, device="cpu",
    bias=True, seed=0,
):  # fmt: skip
    """Operands of ``few_rows``, the dense weight, and a residual (M, N), all of order 1. gaps: outputs before each
    part that have no adapter."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape, scale=1.0, dtype=dtype: (torch.randn(*shape, generator=generator) * scale).to(
        device, dtype
    )
    gaps = gaps or [0] * len(sizes)
    columns, stop = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        columns += [stop + gap, stop + gap + size]
        stop += gap + size
    N = stop
    a = draw(len(sizes) * r, K, scale=K**-0.5, dtype=adapters)
    b = draw(sum(sizes), r, scale=r**-0.5, dtype=adapters)
    dense = draw(N, K, scale=K**-0.5)
    weight, layout = [dense], (0, 0)
    if format is not None:
        double_quant = format == "nested"
        q = quantize_4bit(dense.float(), "nf4" if double_quant else format, double_quant=double_quant)
        dense = dequantize_4bit(q, torch.float32)
        codes, scales, *layout = (q.packed() if K % 128 == 0 else q).operands()
        weight = [codes, *scales]
    operands = weight, a, b, columns, 0.7, draw(N) if bias else None, *layout
    return draw(M, K), operands, dense, draw(M, N)


def reference(x, operands, dense, dtype):
    """y in ``dtype``, part by part."""
    _, a, b, columns, scaling, bias, *_ = operands
    x, r, row = x.to(dtype), b.shape[1], 0
    y = F.linear(x, dense.to(dtype), None if bias is None else bias.to(dtype))
    for p, (start, stop) in enumerate(zip(columns[::2], columns[1::2], strict=True)):
        h = x @ a[p * r : p * r + r].to(dtype).T
        y[:, start:stop] += scaling * h @ b[row : row + stop - start].to(dtype).T
        row += stop - start
    return y


def check(x, operands, dense, residual):
    """Values against float64; what follows y, bit by bit, against the operations that it stands for."""
    y = few_rows(x, *operands)
    truth = reference(x, operands, dense, torch.float64)
    plain = reference(x, operands, dense, x.dtype)
    assert y.dtype == x.dtype
    # floor: one rounding of the result
    assert_no_worse_than(y, plain, truth, floor=EPS[x.dtype] / 2)
    added = few_rows(x, *operands, residual=residual)
    assert torch.equal(added, residual + y)
    if y.shape[1] % 2 == 0:
        gated, separate = few_rows(x, *operands, gated=True), swiglu(y)
        # one unit in the last place: the exponential may be contracted otherwise
        torch.testing.assert_close(gated, separate, rtol=EPS[x.dtype], atol=2.0**-20)


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.sampled_from([1, 16, 45, 64]), min_size=1, max_size=3))
    gaps = draw(st.lists(st.sampled_from([0, 0, 3, 32]), min_size=len(sizes), max_size=len(sizes)))
    rows, K = draw(st.sampled_from([1, 7, 16, 17, 40, 70])), draw(st.sampled_from([128, 384, 640]))
    options = {"format": draw(st.sampled_from(["nf4", "int4", "nf4", None])), "bias": draw(st.booleans())}
    options["adapters"] = draw(st.sampled_from([torch.float32, torch.float16]))
    r, seed = draw(st.sampled_from([1, 5, 16, 64, 100])), draw(st.integers(0, 2**31))
    return problem(rows, K, sizes, r, gaps=gaps, seed=seed, **options)


@reaches_kernel
@given(problems())
def test_values_and_what_follows(case):
    check(*case)


@reaches_kernel
@pytest.mark.parametrize("M", [3, 70])
@pytest.mark.parametrize("K", [4096, 4160])
def test_a_long_row(M, K):
    """K is split over programs of the ranks, of the base, or over 16 warps; 4160 has no packed codes."""
    check(*problem(M, K, (32,), 16))


@reaches_kernel
@pytest.mark.parametrize("format", ["nf4", None])
def test_a_row_depends_on_no_other_row(format):
    x, operands, *_ = problem(16, 384, (32, 16), 8, format=format)
    operands[0][0] = operands[0][0] if format else torch.zeros_like(operands[0][0])
    together = few_rows(x, *operands)
    for rows in (slice(0, 1), slice(5, 14)):
        assert torch.equal(few_rows(x[rows], *operands), together[rows])


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
def test_kernels_compile_for_every_card(cc, tmp_path):
    def launch():
        cases = (
            (8, 256, 64, "nf4", torch.bfloat16),
            (16, 4096, 16, "int4", torch.float16),
            (64, 256, 128, "nf4", torch.bfloat16),
            (64, 1024, 64, "int4", torch.bfloat16),
            (200, 256, 64, "nf4", torch.float16),
            (40, 256, 64, None, torch.bfloat16),
        )
        for index, (M, K, r, format, dtype) in enumerate(cases):
            adapters, gated = (torch.float32, dtype)[index % 2], index % 2 == 0
            x, operands, _, residual = problem(
                M, K, (48, 16), r, format=format, dtype=dtype, adapters=adapters
            )
            few_rows(x, *operands, gated=gated, residual=None if gated else residual)

    tiled = {"tiled_kernel"} if cc == 90 else set()
    down = {"_down_kernel", "_tiled_down_kernel"}
    launches = assert_compiles(launch, cc, {"_up_kernel", "packed_kernel"} | down | tiled)
    assert_resident(launches, tmp_path)


def barriers_in_loops(ptx):
    """Barriers between each label of ``ptx`` and a branch back to it."""
    lines = ptx.splitlines()
    place = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L")}
    back = [
        (place[m[1]], i)
        for i, line in enumerate(lines)
        if (m := re.search(r"bra(?:\.uni)?\s+(\$L\w+)", line))
    ]
    return [sum("bar.sync" in line for line in lines[start:end]) for start, end in back if start < end]


@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_operands_go_straight_to_registers(adapters, gated):
    """Wider loads of adapters would change the layout of the codes, which then pass through shared memory."""
    x, operands, _, residual = problem(8, 4096, (48, 16), 64, dtype=torch.bfloat16, adapters=adapters)
    with recorded_launches(90) as launches:
        few_rows(x, *operands, gated=gated, residual=None if gated else residual)
    assert [name for name, _ in launches] == ["_down_kernel", "packed_kernel"]
    for name, compiled in launches:
        barriers = barriers_in_loops(compiled.asm["ptx"])
        assert barriers and not any(barriers), f"{name}: {barriers} barriers in its loops"


@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("format", ["nf4", "nested", "int4"])
def test_a_multiprocessor_has_the_registers_of_wide_programs(format, tmp_path):
    """A kernel with too many is refused by the card alone, when it is launched."""

    def launch():
        for dtype, M, K in ((torch.bfloat16, 16, 4096), (torch.float16, 8, 6272)):
            for gated in (False, True):
                x, operands, _, residual = problem(M, K, (48, 16), 64, format=format, dtype=dtype)
                few_rows(x, *operands, gated=gated, residual=None if gated else residual)

    with recorded_launches(90) as launches:
        launch()
    wide = [launched for launched in launches if launched[0] == "packed_kernel"]
    assert {compiled.metadata.num_warps for _, compiled in wide} == {8}
    assert_resident(launches, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "format, dtype, adapters",
    [
        ("nf4", torch.bfloat16, torch.bfloat16),
        ("nf4", torch.bfloat16, torch.float32),
        ("int4", torch.float16, torch.float16),
        (None, torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("M", [1, 16, 17, 33, 64, 200])
@pytest.mark.parametrize(
    "K, sizes", [(1536, (1536, 256, 256)), (1536, (1536,)), (1536, (8960, 8960)), (8960, (1536,))]
)
def test_real_shapes_on_cuda(M, K, sizes, dtype, adapters, format):
    options = {"dtype": dtype, "adapters": adapters, "format": format, "device": "cuda"}
    x, operands, dense, residual = problem(M, K, sizes, 64, **options)
    check(x, operands, dense, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [8, 64, 200])
def test_repeats_in_a_graph_and_reads_the_adapters_live(M, monkeypatch):
    """A chain in which each layer reads what the one before has just written: a race would show."""
    monkeypatch.setattr(
        torch.utils.deterministic, "fill_uninitialized_memory", False
    )  # by launches in between
    cases = [problem(M, 1536, (1536,), 64, dtype=torch.bfloat16, device="cuda", seed=i) for i in range(12)]
    x = cases[0][0]

    def chain():
        y = x
        for _, operands, *_ in cases:
            y = few_rows(y, *operands)
        return y

    def slowly():
        y = x
        for _, operands, *_ in cases:
            y = few_rows(y, *operands)
            torch.cuda.synchronize()
        return y

    expected = slowly()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for step in range(50):
        if step == 25:
            for _, operands, *_ in cases:
                operands[2].mul_(-1.5)
            expected = slowly()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("r", [64, 128])
@pytest.mark.parametrize("M", [40, 200])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_a_gated_update_spills_no_registers(M, r, adapters, tmp_path):
    x, operands, *_ = problem(M, 256, [4096, 4096], r, dtype=torch.bfloat16, adapters=adapters)
    with recorded_launches(90) as launches:
        few_rows(x, *operands, gated=True)
    ((_, kernel),) = [launch for launch in launches if launch[0] == "_up_kernel"]
    assert resource_usage(kernel, tmp_path)["STACK"] == 0
    # ptxas before CUDA 13.3 gives registers of a running product away: nothing may come between it and its wait
    lines = [line for line in kernel.asm["ptx"].split("\n") if "wgmma" in line]
    assert bool(lines) == (r == 64)
    after = [lines[i + 1] for i, line in enumerate(lines) if "commit_group" in line]
    assert all(re.search(r"wait_group\.sync\.aligned\s+0;", line) for line in after)
