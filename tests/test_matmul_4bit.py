"""x @ W.T on 4-bit weights: values and gradients against float64, exact integer witnesses, both routes."""

import os
from dataclasses import replace
from unittest import mock

import pytest
import sweep_matmul_4bit as sweep
import torch
from cross_compile import SHARED_LIMIT, assert_compiles, every_card, recorded_launches
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import _runtime
from nanogrpo.kernels.matmul_4bit import CONFIGS, VECTOR_CONFIGS, _matmul_triton, matmul_4bit, matmul_4bit_ref
from nanogrpo.kernels.quantization import QuantizedWeight, dequantize_4bit_ref, quantize_4bit
from numerics import EPS, assert_no_worse_than
from torch.autograd import grad

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# the interpreter is silently wrong in bf16
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRET)
FORMATS = [("nf4", False), ("nf4", True), ("int4", False)]
every_format = pytest.mark.parametrize("format, double_quant", FORMATS)


@pytest.fixture(autouse=True)
def full_precision_sums():
    """The library's matmul adds partial sums in float32, not in x's dtype: the exact witnesses need it."""
    cublas = torch.backends.cuda.matmul
    before = cublas.allow_bf16_reduced_precision_reduction, cublas.allow_fp16_reduced_precision_reduction
    cublas.allow_bf16_reduced_precision_reduction = cublas.allow_fp16_reduced_precision_reduction = False
    yield
    cublas.allow_bf16_reduced_precision_reduction, cublas.allow_fp16_reduced_precision_reduction = before


def made(N, K, format, double_quant=False, seed=0, block=64):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / K**0.5
    return quantize_4bit(weight, format, 64 if format == "int4" else block, double_quant)


def integers(N, K, format, double_quant=False, seed=0):
    """A weight of small integers: every product and every partial sum is exact in float32."""
    q = made(N, K, format, double_quant, seed)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, like: torch.randint(low, high, like.shape, generator=generator).to(like.dtype)
    q.codes = draw(0, 256, q.codes)
    if format == "int4":
        q.scale, q.minimum = draw(1, 3, q.scale), draw(-15, 0, q.minimum)
        return q
    q.code_book = torch.arange(-8.0, 8.0)
    q.scale = draw(0, 256, q.scale) if double_quant else draw(1, 4, q.scale)
    if double_quant:
        q.nested_code, q.nested_scale = draw(0, 2, q.nested_code), draw(1, 3, q.nested_scale)
        q.nested_offset = torch.tensor(1.0)
    return q


def check_against_float64(x, q, bias, device="cpu"):
    """Values and every gradient; the truth sees the weights rounded to x's dtype, as the operation defines."""
    x, bias = x.to(device).requires_grad_(), None if bias is None else bias.to(device).requires_grad_()
    inputs = (x,) if bias is None else (x, bias)
    ours, plain = matmul_4bit(x, q.to(device), bias), matmul_4bit_ref(x, q.to(device), bias)
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    weight = dequantize_4bit_ref(q, x.dtype).double().cpu()
    truth = exact[0] @ weight.T + (exact[1] if bias is not None else 0)
    dy = torch.randn(truth.shape, generator=torch.Generator().manual_seed(7)).to(x.dtype)
    # one rounding to the output dtype, half a unit in the last place of values up to max|truth|
    floor = EPS[x.dtype] / 2
    assert_no_worse_than(ours, plain, truth, floor=floor, name="y")
    assert ours.dtype == x.dtype
    got, from_torch, true = (
        dict(zip(("dx", "dbias"), grad(y, args, g), strict=False))
        for y, args, g in (
            (ours, inputs, dy.to(device)),
            (plain, inputs, dy.to(device)),
            (truth, exact, dy.double()),
        )
    )
    for name in true:
        assert_no_worse_than(got[name], from_torch[name], true[name], floor=floor, name=name)
        assert got[name].dtype == x.dtype


@every_format
@given(data=st.data())
def test_values_and_gradients(format, double_quant, data):
    block = data.draw(st.sampled_from([32, 64, 128, 512]))  # 512 is more than a step of K
    N, K = data.draw(st.integers(1, 70)), block * data.draw(st.integers(1, 10))
    shape = data.draw(st.sampled_from([(1,), (4,), (5,), (17,), (64,), (65,), (2, 3), (2, 1, 5), (300,)]))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, K, generator=generator).to(dtype)
    if data.draw(st.booleans()):
        x = torch.stack((x, -x), -1)[..., 0]  # strides of two
    bias = torch.randn(N, generator=generator).to(dtype) if data.draw(st.booleans()) else None
    check_against_float64(x, made(N, K, format, double_quant, seed, block), bias)


@every_format
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 16, 17, 32, 33, 64, 65])
@pytest.mark.parametrize("N, K", [(37, 128), (96, 1152)])
def test_integers_are_exact(device, format, double_quant, M, N, K):
    """No rounding can hide a wrong product: the witness against a miscompiled dot, for every tile."""
    if INTERPRET and M not in (1, 3, 5, 33):
        pytest.skip("one of each tile is enough where no compiler runs")
    q = integers(N, K, format, double_quant, seed=M)
    x = torch.randint(-8, 9, (M, K), generator=torch.Generator().manual_seed(M))
    bias = torch.randint(-99, 100, (N,), generator=torch.Generator().manual_seed(N))
    truth = x.double() @ dequantize_4bit_ref(q, torch.float64).T + bias
    assert truth.abs().max() < 2**24
    for dtype in (torch.float16,) if INTERPRET else (torch.float16, torch.bfloat16):
        y = matmul_4bit(x.to(device, dtype), q.to(device), bias.to(device, dtype))
        assert torch.equal(y.cpu(), truth.to(dtype))


@every_format
def test_rows_of_the_weight(device, format, double_quant):
    q = integers(150, 320, format, double_quant).rows(53, 131)
    x = torch.randint(-8, 9, (5, 320), generator=torch.Generator().manual_seed(0)).half()
    truth = x.double() @ dequantize_4bit_ref(q, torch.float64).T
    assert torch.equal(matmul_4bit(x.to(device), q.to(device)).cpu(), truth.half())


def test_a_row_does_not_depend_on_its_batch(device):
    q = made(96, 1152, "nf4").to(device)
    x = torch.randn(64, 1152, generator=torch.Generator().manual_seed(0)).half().to(device)
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("torch's CPU matmul makes no such promise")
    together = matmul_4bit(x, q)
    if not INTERPRET:  # where products are numpy's, which round a row by its place
        for rows in (slice(3, 19), slice(40, 63), slice(20, 29)):
            assert torch.equal(matmul_4bit(x[rows], q), together[rows])
    few = matmul_4bit(x[:4], q)
    for rows in (slice(0, 1), slice(2, 4), slice(1, 4)):
        assert torch.equal(matmul_4bit(x[rows], q), few[rows])
    assert (few - together[:4]).abs().max() <= 4 * EPS[
        torch.float16
    ] * together.abs().max()  # where routes meet


@pytest.mark.parametrize("rows", [3, 70])
def test_autocast_changes_nothing(rows):
    x, q = torch.randn(rows, 128, requires_grad=True), made(48, 128, "nf4")
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = matmul_4bit(x, q)
            results.append((y, *grad(y.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_rows(device):
    q = made(5, 64, "nf4").to(device)
    x = torch.empty(3, 0, 64, device=device, dtype=torch.float16, requires_grad=True)
    y = matmul_4bit(x, q, torch.ones(5, device=device, dtype=torch.float16))
    assert y.shape == (3, 0, 5) and grad(y.sum(), x)[0].shape == x.shape
    empty = quantize_4bit(torch.empty(0, 64)).to(device)
    assert matmul_4bit(torch.ones(2, 64, device=device, dtype=torch.float16), empty).shape == (2, 0)
    assert matmul_4bit(torch.ones(64, device=device, dtype=torch.float16), q).shape == (5,)


def test_backward_keeps_no_dense_tensor(device):
    q = made(48, 192, "nf4", True).to(device)
    saved = []
    pack = lambda tensor: saved.append(tensor) or tensor
    x = torch.randn(70, 192, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = matmul_4bit(x, q)
    ours = {tensor.data_ptr() for tensor in q.tensors().values()}
    assert saved and {tensor.data_ptr() for tensor in saved} <= ours
    assert torch.allclose(grad(y.sum(), x)[0], dequantize_4bit_ref(q).sum(0).expand(70, -1), atol=1e-5)


def test_gradient_only_where_asked(device):
    q = made(48, 192, "int4").to(device)
    x, bias = torch.randn(3, 192, device=device), torch.zeros(48, device=device, requires_grad=True)
    y = matmul_4bit(x, q, bias)
    assert torch.equal(grad(y.sum(), bias)[0], torch.full_like(bias, 3))
    assert not matmul_4bit(x, q).requires_grad


@pytest.mark.parametrize(
    "x, bias, message",
    [
        (torch.ones(2, 65), None, r"expected \(..., 64\)"),
        (torch.tensor(1.0), None, r"expected \(..., 64\)"),
        (torch.ones(2, 64).double(), None, "x is torch.float64"),
        (torch.ones(2, 64, dtype=torch.int64), None, "x is torch.int64"),
        (torch.ones(2, 64, device="meta"), None, "x is on meta, the weight on cpu"),
        (torch.ones(2, 64), torch.ones(4), "bias is"),
        (torch.ones(2, 64), torch.ones(1, 5), "bias is"),
        (torch.ones(2, 64).half(), torch.ones(5), "bias is torch.float32"),
        (torch.ones(2, 64), torch.ones(5, device="meta"), "on meta"),
    ],
)
def test_refuses(x, bias, message):
    with pytest.raises(ValueError, match=message):
        matmul_4bit(x, made(5, 64, "nf4"), bias)


@every_format
def test_operator(device, format, double_quant):
    codes, scales, quant_block, first_block = made(9, 192, format, double_quant).to(device).operands()
    for M in (3, 65):
        x = torch.randn(M, 192, device=device, dtype=torch.float16, requires_grad=True)
        bias = torch.randn(9, device=device, dtype=torch.float16, requires_grad=True)
        arguments = (x, codes, scales, bias, quant_block, first_block)
        # the fused route and its dense backward round differently from one another, not from themselves
        torch.library.opcheck(torch.ops.nanogrpo.matmul_4bit.default, arguments)


def test_torch_compile(device):
    q = made(9, 192, "nf4", True).to(device)
    x = torch.randn(3, 192, device=device, dtype=torch.float16, requires_grad=True)
    compiled = torch.compile(lambda x: matmul_4bit(x, q), fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), matmul_4bit(x, q)
    dy = torch.randn_like(y)
    assert torch.equal(y, expected) and torch.equal(grad(y, x, dy)[0], grad(expected, x, dy)[0])


@every_format
def test_unaligned_storage(device, format, double_quant):
    """x and codes that begin 2 bytes and 1 byte past a boundary: the kernels read wider integers."""
    q = integers(5, 320, format, double_quant).to(device)
    codes = torch.zeros(q.codes.numel() + 1, dtype=torch.uint8, device=device)[1:].view_as(q.codes)
    x = torch.randint(-8, 9, (2 * 320 + 1,), generator=torch.Generator().manual_seed(0)).half().to(device)[1:]
    moved = replace(q, codes=codes.copy_(q.codes))
    truth = x.view(2, 320).double().cpu() @ dequantize_4bit_ref(q, torch.float64).T.cpu()
    assert torch.equal(matmul_4bit(x.view(2, 320), moved).cpu(), truth.half())


@every_card
@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_compiles(cc):
    def launch():
        for format, double_quant in FORMATS:
            codes, scales, quant_block, first_block = made(64, 2048, format, double_quant).operands()
            for M in (1, 2, 4, 5, 33):
                x, bias = torch.randn(M, 2048).bfloat16(), torch.randn(64).bfloat16()
                _matmul_triton(x, codes, scales, bias, quant_block, first_block)

    assert_compiles(launch, cc, {"gemv_kernel", "_matmul_kernel", "sum_kernel"})


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_every_candidate_of_the_sweep_compiles_for_hopper(format):
    """Within shared memory, and without WGMMA, whose register operands are what ptxas before 13.3 miscompiles."""
    q = made(64, 2048, format)
    codes, scales, quant_block, first_block = q.operands()
    packed = q.packed().codes
    with recorded_launches(90) as launches:
        for route, configs in sweep.CANDIDATES.items():
            # programs and splits change the grid alone
            if route == "hopper":
                plain = lambda c: c._replace(splits=2)
            elif route in sweep.PACKED:
                plain = lambda c: c._replace(programs=256)
            else:
                plain = lambda c: (*c[:3], 256, *c[4:])
            for config in {plain(config) for config in configs}:
                with sweep.forced(route, config, 90):
                    rows = {
                        "vector": sweep.ROWS["vector"][::3],
                        "fused": (16, 64),
                        "packed": (config[3] * 8,),
                        "tiled": (config[0],),
                        "hopper": (config[0],),
                    }
                    for M in rows[route]:
                        x = torch.empty(M, 2048, dtype=torch.bfloat16)
                        words = packed if route in sweep.PACKED else codes
                        _matmul_triton(x, words, scales, None, quant_block, first_block)
    names = {name for name, _ in launches}
    warp_groups = {"tiled_kernel", "hopper_kernel"}
    assert names == {"gemv_kernel", "_matmul_kernel", "packed_kernel", "sum_kernel"} | warp_groups
    for name, kernel in launches:
        assert kernel.metadata.shared <= 1024 * SHARED_LIMIT[90]
        # those wait for their products: ``test_packed_matmul``, ``test_hopper_matmul``
        assert name in warp_groups or "wgmma" not in kernel.asm["ptx"]


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("cc", [90, 100])
def test_no_warpgroup_mma(cc):
    """Register operands of WGMMA are what ptxas before 13.3 miscompiles: the tiles must not reach it."""
    codes, scales, quant_block, first_block = made(64, 2048, "nf4").operands()
    with recorded_launches(cc) as launches:
        for M in (16, CONFIGS[80][0]):
            _matmul_triton(torch.randn(M, 2048).bfloat16(), codes, scales, None, quant_block, first_block)
    programs = [kernel.asm["ptx"] for name, kernel in launches if name == "_matmul_kernel"]
    assert len(programs) == 2
    for ptx in programs:
        assert "mma.sync" in ptx and "wgmma" not in ptx and "tcgen05" not in ptx


def test_split_and_whole_rows_agree():
    """Exact integers through one program a row of K, and through many."""
    if not INTERPRET:
        pytest.skip("reaches the kernels only under the interpreter")
    q = integers(40, 2048, "int4")
    x = torch.randint(-8, 9, (3, 2048), generator=torch.Generator().manual_seed(0)).half()
    codes, scales, quant_block, first_block = q.operands()
    truth = (x.double() @ dequantize_4bit_ref(q, torch.float64).T).half()
    for programs in (1, 4, 256):
        tables = (CONFIGS, VECTOR_CONFIGS)
        changed = [mock.patch.dict(table, {80: (*table[80][:-1], programs)}) for table in tables]
        with changed[0], changed[1]:
            assert torch.equal(_matmul_triton(x, codes, scales, None, quant_block, first_block), truth)


def test_refuses_cards_without_bf16():
    codes, scales, quant_block, first_block = made(5, 64, "nf4").operands()
    with (
        mock.patch.object(_runtime, "arch", lambda device: 75),
        pytest.raises(ValueError, match="capability 75"),
    ):
        _matmul_triton(torch.ones(2, 64), codes, scales, None, quant_block, first_block)


QWEN = [(1536, 1536), (256, 1536), (8960, 1536), (1536, 8960)]


@pytest.mark.gpu
@every_format
@pytest.mark.parametrize("N, K", QWEN)
@pytest.mark.parametrize("M", [1, 7, 32, 64, 65, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_real_shapes_on_cuda(format, double_quant, N, K, M, dtype):
    generator = torch.Generator().manual_seed(M)
    x, bias = torch.randn(M, K, generator=generator).to(dtype), torch.randn(N, generator=generator).to(dtype)
    check_against_float64(x, made(N, K, format, double_quant), bias, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("M", [8, 64, 1024])
def test_extra_memory_on_cuda(M):
    N, K = 8960, 1536
    q, x = made(N, K, "nf4", True).to("cuda"), torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    matmul_4bit(x, q).sum().backward()  # compiles, and takes the library's workspace
    x.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = matmul_4bit(x, q)
    dense, partial = N * K * 2, 32 * 1024 * M
    extra = torch.cuda.max_memory_allocated() - before - y.nbytes
    assert extra <= (dense if M > 64 else partial) + 2**20  # a megabyte of rounding
    assert torch.cuda.memory_allocated() - before <= y.nbytes + 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["nf4", "int4"])
@pytest.mark.parametrize("M", [3, 100])
def test_more_than_two_to_the_31_weights(format, M):
    N, K = 2**18 + 8, 8192
    row = integers(8, K, format)
    q = row.index_rows(torch.arange(N) % 8).to("cuda")
    x = torch.randint(-8, 9, (M, K), generator=torch.Generator().manual_seed(0))
    truth = (x.double() @ dequantize_4bit_ref(row, torch.float64).T).to(torch.bfloat16).cuda()
    y = matmul_4bit(x.to("cuda", torch.bfloat16), q)
    assert torch.equal(y, truth.repeat(1, N // 8))
    assert isinstance(q, QuantizedWeight) and N * K > 2**31


def test_a_bias_of_any_stride():
    q, wide = made(48, 64, "nf4", False, 0, 64), torch.randn(96).half()
    x = torch.randn(5, 64).half()
    for bias in (wide[::2], wide[:1].expand(48)):
        assert torch.equal(matmul_4bit(x, q, bias), matmul_4bit(x, q, bias.clone()))
