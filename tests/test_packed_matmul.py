"""The packed route of matmul_4bit: float64, exact integer witnesses for every tile, independence of the batch."""

import os
import re

import pytest
import torch
import torch.nn.functional as F
from cross_compile import assert_compiles, every_card, recorded_launches
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels.lora_linear import lora_linear
from nanogrpo.kernels.matmul_4bit import PACKED_CONFIGS, _matmul_triton, matmul_4bit
from nanogrpo.kernels.packed_codes import GAIN, NF4_CODE
from nanogrpo.kernels.packed_matmul import Config, packed_products, plan, sum_partials
from nanogrpo.kernels.quantization import dequantize_4bit_ref, kernel_format, quantize_4bit
from nanogrpo.kernels.tiled_matmul import TileConfig, tile_plan, tiled_products
from numerics import EPS, assert_no_worse_than

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# the interpreter is silently wrong in bf16
DTYPES = [torch.float16] + [torch.bfloat16] * (not INTERPRET)
FORMATS = [("nf4", False), ("nf4", True), ("int4", False)]
every_format = pytest.mark.parametrize("format, double_quant", FORMATS)


def made(N, K, format, double_quant=False, seed=0):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / K**0.5
    return quantize_4bit(weight, format, double_quant=double_quant)


def witness(N, K, format, double_quant, dtype, seed):
    """A packed weight, and its values in float64 as the kernel has them: every partial sum is exact in float32.

    nf4: the rounded code book (8 or 11 bits) times block scales of GAIN * 1, 2 or 4.
    """
    q, generator = made(N, K, format, double_quant, seed), torch.Generator().manual_seed(seed)
    draw = lambda low, high, like: torch.randint(low, high, like.shape, generator=generator)
    q.codes = draw(0, 256, q.codes).to(torch.uint8)
    if format == "int4":
        q.scale, q.minimum = draw(1, 3, q.scale).half(), draw(-15, 0, q.minimum).half()
        return q.packed(), dequantize_4bit_ref(q, torch.float64)
    gain = GAIN[dtype]
    assert torch.tensor(gain) * torch.tensor(1 / gain) == 1
    if double_quant:
        q.scale = draw(0, 2, q.scale).to(torch.uint8)
        q.nested_code = torch.where(torch.arange(256) == 0, 0.0, gain)
        q.nested_scale, q.nested_offset = draw(1, 2, q.nested_scale).float(), torch.tensor(gain)
    else:
        q.scale = 2.0 ** draw(0, 3, q.scale) * gain
    packed = q.packed()
    q.code_book = (torch.tensor(NF4_CODE).double() * gain).to(dtype).float()
    return packed, dequantize_4bit_ref(q, torch.float64) / gain


def check(x, q, bias=None, device="cpu"):
    """The truth has the exact weights; plain torch rounds them to x's dtype, as the packed route rounds its book."""
    exact, weight = dequantize_4bit_ref(q, torch.float64), dequantize_4bit_ref(q, x.dtype)
    truth = x.double() @ exact.T + (0 if bias is None else bias.double())
    y = matmul_4bit(x.to(device), q.to(device).packed(), None if bias is None else bias.to(device))
    # floor: one rounding of the result
    assert y.dtype == x.dtype
    x, weight, bias = (None if t is None else t.to(device) for t in (x, weight, bias))
    assert_no_worse_than(y, F.linear(x, weight, bias), truth, floor=EPS[x.dtype] / 2)


@every_format
@given(data=st.data())
def test_values(format, double_quant, data):
    N, K = data.draw(st.integers(1, 70)), 128 * data.draw(st.integers(1, 5))
    shape = data.draw(st.sampled_from([(0,), (1,), (4,), (5,), (17,), (40,), (65,), (2, 3)]))
    dtype, seed = data.draw(st.sampled_from(DTYPES + [torch.float32])), data.draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, K, generator=generator).to(dtype)
    if data.draw(st.booleans()):
        x = torch.stack((x, -x), -1)[..., 0]  # strides of two
    bias = torch.randn(N, generator=generator).to(dtype) if data.draw(st.booleans()) else None
    check(x, made(N, K, format, double_quant, seed), bias)


@every_format
@pytest.mark.parametrize("M", [1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("N, K", [(37, 128), (96, 1152), (130, 2304)])
def test_witnesses_are_exact(device, format, double_quant, M, N, K):
    """No rounding can hide a wrong product: for every tile shape, with K whole and split."""
    if INTERPRET and (M not in (1, 9, 33) or N == 130):
        pytest.skip("one of each tile is enough where no compiler runs")
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("reaches the kernel on CUDA or under the interpreter")
    for dtype in DTYPES:
        q, weight = witness(N, K, format, double_quant, dtype, seed=M)
        x = torch.randint(-8, 9, (M, K), generator=torch.Generator().manual_seed(M))
        bias = torch.randint(-99, 100, (N,), generator=torch.Generator().manual_seed(N))
        truth = x.double() @ weight.T + bias
        y = matmul_4bit(x.to(device, dtype), q.to(device), bias.to(device, dtype))
        assert torch.equal(y.cpu(), truth.to(dtype))


def test_a_row_does_not_depend_on_its_batch(device):
    if device.type == "cpu" or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("only Hopper has routes of ours for so many rows; a library makes no such promise")
    q = made(96, 1152, "nf4").to(device).packed()
    x = torch.randn(256, 1152, generator=torch.Generator().manual_seed(0)).half().to(device)
    cases = (
        (16, ((0, 1), (3, 11), (7, 16))),
        (64, ((0, 17), (9, 32), (20, 64))),
        (256, ((0, 65), (100, 256))),
    )
    for most, parts in cases:
        together = matmul_4bit(x[:most], q)
        for start, stop in parts:
            assert torch.equal(matmul_4bit(x[start:stop], q), together[start:stop])


def test_rows_of_the_weight_and_unaligned_x(device):
    for format, double_quant in FORMATS:
        q = made(150, 384, format, double_quant).rows(53, 131)
        x = torch.randn(5 * 384 + 1, generator=torch.Generator().manual_seed(0)).half().to(device)[1:]
        packed = q.to(device).packed()
        y = matmul_4bit(x.view(5, 384), packed)
        expected = matmul_4bit(x.view(5, 384).clone(), packed.unpacked().packed())
        assert torch.equal(y, expected)
        truth = x.view(5, 384).double().cpu() @ dequantize_4bit_ref(q, torch.float64).T
        assert (y.cpu() - truth).abs().max() <= 4 * EPS[torch.float16] * truth.abs().max()


@every_format
def test_operator_and_gradient(device, format, double_quant):
    q = made(9, 256, format, double_quant).to(device)
    codes, scales, quant_block, first_block = q.packed().operands()
    for M in (3, 70):
        x = torch.randn(M, 256, device=device, dtype=torch.float16, requires_grad=True)
        bias = torch.randn(9, device=device, dtype=torch.float16, requires_grad=True)
        torch.library.opcheck(
            torch.ops.nanogrpo.matmul_4bit.default, (x, codes, scales, bias, quant_block, first_block)
        )
        dy = torch.randn(M, 9, device=device, dtype=torch.float16)
        dx = torch.autograd.grad(matmul_4bit(x, q.packed()), x, dy)[0]
        assert torch.equal(dx, dy @ dequantize_4bit_ref(q, torch.float16))


@pytest.mark.parametrize("N, tiles", [(1, 1), (96, 9), (8960, 12), (1536, 70), (4096, 112), (151936, 12)])
def test_the_plan_covers_k_once(N, tiles):
    for config in {c for table in PACKED_CONFIGS.values() for by in table.values() for c in by.values()}:
        if isinstance(config, Config):
            across, steps, split = plan(N, tiles, config)
            per_program = steps * (1 if config.over_n else config.warps)
            rows, most = 16 * config.rows * (config.warps if config.over_n else 1), config.programs
        else:
            across, per_program, split = tile_plan(N, tiles, config)
            rows, most = config.block_n, config.programs + across // 2
        assert (split - 1) * per_program < tiles <= split * per_program
        assert across * rows >= N
        assert split == 1 or split * across <= most


@pytest.mark.skipif(not INTERPRET, reason="reaches the kernel only under the interpreter")
@pytest.mark.parametrize("over_n, warps, rows", [(False, 4, 1), (False, 2, 2), (True, 2, 1), (True, 4, 2)])
def test_every_way_to_divide_the_work(over_n, warps, rows):
    q, weight = witness(50, 1152, "int4", False, torch.float16, seed=1)
    codes, scales, _, first_block = q.operands()
    x = torch.randint(-8, 9, (11, 1152), generator=torch.Generator().manual_seed(0)).half()
    truth = (x.double() @ weight.T).half()
    for programs, columns in ((1, 1), (99, 2)):
        config = Config(over_n, warps, rows, columns, programs, False)
        y = packed_products(
            x, codes, scales, None, first_block, kernel_format(scales), config, assembly=False
        )
        if y.ndim == 3:
            y = sum_partials(y, None, x.dtype, False)
        assert torch.equal(y, truth)


@pytest.mark.skipif(not INTERPRET, reason="reaches the kernel only under the interpreter")
@pytest.mark.parametrize("format, double_quant", FORMATS)
@pytest.mark.parametrize("programs, unroll", [(1, 1), (1, 2), (1, 4), (99, 2)])
def test_tiles_and_the_ranks_beside_them(format, double_quant, programs, unroll):
    q, weight = witness(37, 1152, format, double_quant, torch.float16, seed=2)
    codes, scales, _, first_block = q.operands()
    draw = lambda *size: torch.randint(-8, 9, size, generator=torch.Generator().manual_seed(0)).half()
    x, a, bias = draw(65, 1152), draw(24, 1152), draw(37)
    config = TileConfig(64, 64, 4, 2, unroll, programs, False)
    operands = x, codes, scales, bias, first_block, kernel_format(scales), config
    y, h = tiled_products(*operands, assembly=False, a=a)
    assert (y.ndim == 3) == (programs > 1)
    if y.ndim == 3:
        y = sum_partials(y, bias, x.dtype, False)
    assert torch.equal(y, (x.double() @ weight.T + bias).half())
    assert torch.equal(h.sum(0).double(), x.double() @ a.double().T)


@every_card
@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_compiles(cc):
    cases = [("nf4", False, M, torch.bfloat16) for M in (8, 16, 64)]
    cases += [
        ("nf4", True, 8, torch.float16),
        ("int4", False, 16, torch.float16),
        ("int4", False, 32, torch.bfloat16),
    ]
    if cc == 90:
        cases += [("nf4", True, 64, torch.float16), ("int4", False, 256, torch.bfloat16)]

    def launch():
        for format, double_quant, M, dtype in cases:
            codes, scales, quant_block, first_block = made(64, 2048, format, double_quant).packed().operands()
            x, bias = torch.randn(M, 2048).to(dtype), torch.randn(64).to(dtype)
            _matmul_triton(x, codes, scales, bias, quant_block, first_block)

    assert_compiles(launch, cc, {"packed_kernel", "sum_kernel"} | ({"tiled_kernel"} if cc == 90 else set()))


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("format, double_quant", FORMATS)
@pytest.mark.parametrize("M", [32, 64, 256])
@pytest.mark.parametrize("K", [256, 2048])  # in one piece, and split over programs
def test_a_warp_group_product_is_awaited(format, double_quant, M, K):
    """Weights are its operand from registers, past no shared memory, and ptxas before CUDA 13.3 gives registers away
    while a product still reads them: nothing may come between a product and the wait for it."""
    codes, scales, quant_block, first_block = made(64, K, format, double_quant).packed().operands()
    with recorded_launches(90) as launches:
        _matmul_triton(torch.randn(M, K).bfloat16(), codes, scales, None, quant_block, first_block)
    (kernel,) = (kernel for name, kernel in launches if name == "tiled_kernel")
    lines = [line for line in kernel.asm["ptx"].split("\n") if "wgmma" in line]
    products = [line for line in lines if "mma_async" in line]
    assert products
    assert all(re.search(r"\}, \{[^}]*\}, %rd\d+,", line) for line in products)
    after = [lines[i + 1] for i, line in enumerate(lines) if "commit_group" in line]
    assert after and all(re.search(r"wait_group\.sync\.aligned\s+0;", line) for line in after)
    loop = kernel.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert "ttg.convert_layout" not in loop and "ttg.local_store" not in loop


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_operands_stay_in_registers(format):
    """mma.sync, no warp-group products and, inside the loop, no shared memory: what the order of codes is for."""
    codes, scales, quant_block, first_block = made(64, 2048, format).packed().operands()
    with recorded_launches(90) as launches:
        for M in (8, 16):
            _matmul_triton(torch.randn(M, 2048).bfloat16(), codes, scales, None, quant_block, first_block)
    kernels = [kernel for name, kernel in launches if name == "packed_kernel"]
    assert len(kernels) == 2
    for kernel in kernels:
        ptx, layouts = kernel.asm["ptx"], kernel.asm["ttgir"]
        assert "mma.sync" in ptx and "wgmma" not in ptx
        assert "ttg.local_" not in layouts
        loop = layouts[layouts.index("scf.for") : layouts.rindex("scf.yield")]
        assert "ttg.convert_layout" in loop and "ttg.barrier" not in loop


@pytest.mark.gpu
@every_format
@pytest.mark.parametrize("N, K", [(1536, 1536), (2048, 1536), (17920, 1536), (1536, 8960)])
@pytest.mark.parametrize("M", [1, 7, 16, 32, 64, 65, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_real_shapes_on_cuda(format, double_quant, N, K, M, dtype):
    generator = torch.Generator().manual_seed(M)
    x, bias = torch.randn(M, K, generator=generator).to(dtype), torch.randn(N, generator=generator).to(dtype)
    check(x, made(N, K, format, double_quant), bias, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_more_than_two_to_the_31_weights(format):
    N, K = 2**18 + 8, 8192
    row, weight = witness(8, K, format, False, torch.bfloat16, 0)
    q = row.index_rows(torch.arange(N) % 8).to("cuda")
    x = torch.randint(-8, 9, (3, K), generator=torch.Generator().manual_seed(0))
    truth = (x.double() @ weight.T).to(torch.bfloat16).cuda()
    assert torch.equal(matmul_4bit(x.to("cuda", torch.bfloat16), q), truth.repeat(1, N // 8))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [8, 64, 256])
def test_extra_memory_on_cuda(M):
    q, x = made(8960, 1536, "nf4", True).to("cuda").packed(), torch.randn(M, 1536, device="cuda").bfloat16()
    matmul_4bit(x, q)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = matmul_4bit(x, q)
    assert torch.cuda.max_memory_allocated() - before - y.nbytes <= 132 * 1024 * M + 2**20


@every_format
def test_lora_linear_takes_packed_weights(format, double_quant):
    if INTERPRET:
        pytest.skip("test_operator_and_gradient covers the kernel's part")
    q, r = made(40, 256, format, double_quant), 8
    x, a, b = torch.randn(5, 256), torch.randn(r, 256), torch.randn(40, r)
    got, expected = [], []
    for weight, results in ((q.packed(), got), (q, expected)):
        inputs = [t.clone().requires_grad_() for t in (x, a, b)]
        y = lora_linear(inputs[0], weight, *inputs[1:], 0.5)
        results += [y, *torch.autograd.grad(y.sum(), inputs)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
