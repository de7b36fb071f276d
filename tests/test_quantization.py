"""Codes, scales and values bit-equal to bitsandbytes (nf4) and gguf (int4), on the CPU and on CUDA."""

import os

import bitsandbytes.functional as bnb
import gguf
import pytest
import torch
from cross_compile import assert_compiles, every_card
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import quantization
from nanogrpo.kernels.quantization import dequantize_4bit, dequantize_4bit_ref, quantize_4bit

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
Q4_1 = gguf.GGMLQuantizationType.Q4_1
# the interpreter's bf16 stores truncate
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRET)
FORMATS = [("nf4", False), ("nf4", True), ("int4", False)]
every_format = pytest.mark.parametrize("format, double_quant", FORMATS)


@st.composite
def weights(draw, block, dtypes=DTYPES):
    """Weights of wide-ranging scales, some blocks constant or zero, contiguous or not."""
    N, blocks = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(blocks * block, N, generator=generator).T if draw(st.booleans()) else None
    weight = torch.randn(N, blocks * block, generator=generator) if weight is None else weight
    weight = weight * 10.0 ** draw(st.integers(-4, 2))
    if draw(st.booleans()):
        weight[draw(st.integers(0, N - 1)), :block] = draw(st.sampled_from([0.0, 0.5, -3.0]))
    return weight.to(draw(st.sampled_from(dtypes)))


@given(data=st.data(), block=st.sampled_from([32, 64, 256]), double_quant=st.booleans())
def test_nf4_equals_bitsandbytes(data, block, double_quant):
    weight = data.draw(weights(block))
    q = quantize_4bit(weight, block_size=block, double_quant=double_quant)
    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=block, compress_statistics=double_quant, quant_type="nf4"
    )
    assert torch.equal(q.codes, packed.view_as(q.codes))
    assert torch.equal(q.scale, state.absmax.view_as(q.scale))
    if double_quant:
        assert torch.equal(q.nested_scale, state.state2.absmax)
        assert torch.equal(q.nested_code, state.state2.code)
        assert torch.equal(q.nested_offset, state.offset)
    assert q.dtype == weight.dtype and torch.equal(dequantize_4bit(q), bnb.dequantize_4bit(packed, state))


def test_nested_codes_equal_bitsandbytes_on_a_million_scales():
    absmax = torch.rand(4096, 256, generator=torch.Generator().manual_seed(0)) ** 3
    codes, state = bnb.quantize_blockwise(absmax.view(-1) - absmax.mean(), blocksize=256)
    ours = quantization._quantize_absmax(absmax)
    assert torch.equal(ours["scale"].view(-1), codes) and torch.equal(ours["nested_scale"], state.absmax)


@given(data=st.data())
def test_int4_equals_gguf(data):
    weight = data.draw(weights(32))
    q = quantize_4bit(weight, "int4")
    raw = gguf.quants.quantize(weight.float().contiguous().numpy(), Q4_1)
    blocks = torch.from_numpy(raw).view(*q.scale.shape, 20)
    halves = torch.stack((q.scale, q.minimum), -1).view(torch.uint8)
    assert torch.equal(torch.cat((halves, q.codes.view(*q.scale.shape, 16)), -1), blocks)
    values = torch.from_numpy(gguf.quants.dequantize(raw, Q4_1))
    for dtype in DTYPES:
        assert torch.equal(dequantize_4bit(q, dtype), values.to(dtype))


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_equals_reference(device, format, double_quant, dtype):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 stores truncate")
    for N, K, block in [(1, 64, 64), (37, 320, 64), (5, 4096, 4096), (3, 2048, 32)]:
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N))
        q = quantize_4bit(weight, format, 64 if format == "int4" else block, double_quant)
        expected = dequantize_4bit_ref(q, dtype)
        assert torch.equal(dequantize_4bit(q.to(device), dtype).cpu(), expected)
        part = q.rows(N // 2, N)
        assert torch.equal(dequantize_4bit(part.to(device), dtype).cpu(), expected[N // 2 :])


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_codes_dequantize_to_the_same_bits(device, format, double_quant, dtype):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 stores truncate")
    for N, K in [(1, 128), (37, 384), (5, 4096)]:
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N))
        q = quantize_4bit(weight, format, double_quant=double_quant)
        expected, packed = dequantize_4bit_ref(q, dtype), q.to(device).packed()
        assert torch.equal(dequantize_4bit(packed, dtype).cpu(), expected)
        assert torch.equal(dequantize_4bit(packed.rows(N // 2, N), dtype).cpu(), expected[N // 2 :])


def test_tiles_cover_more_than_one_chunk(monkeypatch):
    monkeypatch.setattr(quantization, "CPU_TILE", 256)
    weight = torch.randn(70, 192, generator=torch.Generator().manual_seed(0))
    for format, double_quant in FORMATS:
        q = quantize_4bit(weight, format, double_quant=double_quant)  # 21 rows a chunk
        assert torch.equal(dequantize_4bit(q), dequantize_4bit_ref(q))
        assert torch.equal(dequantize_4bit_ref(q.rows(0, 20)), dequantize_4bit_ref(q)[:20])
        if not double_quant:
            assert torch.equal(quantize_4bit(weight[21:42], format).codes, q.codes[21:42])


@every_format
def test_error_is_that_of_the_format(format, double_quant):
    """Normal weights: root mean square error 0.097 sigma (nf4, 64), 0.081 (int4, 32: 15 steps over 4.1 sigma)."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(3))
    error = (dequantize_4bit(quantize_4bit(weight, format, double_quant=double_quant)) - weight).std()
    assert 0.07 < error < 0.11


@every_format
def test_no_rows(device, format, double_quant):
    q = quantize_4bit(torch.empty(0, 128), format, double_quant=double_quant).to(device)
    assert dequantize_4bit(q).shape == (0, 128)


@pytest.mark.parametrize(
    "weight, options, message",
    [
        (torch.ones(4, 100), {}, "K a multiple of the block of 64"),
        (torch.ones(4, 80), {"format": "int4"}, "K a multiple of the block of 32"),
        (torch.ones(4, 0), {}, "K a multiple"),
        (torch.ones(64), {}, r"expected \(N, K\)"),
        (torch.ones(2, 2, 64), {}, r"expected \(N, K\)"),
        (torch.ones(4, 64), {"format": "fp4"}, "format is 'fp4'"),
        (torch.ones(4, 192), {"block_size": 96}, "block of 96"),
        (torch.ones(4, 128), {"format": "int4", "block_size": 128}, "block of 128"),
        (torch.ones(4, 64), {"format": "int4", "double_quant": True}, "double_quant is for nf4"),
        (torch.ones(4, 64).double(), {}, "weight is torch.float64"),
        (torch.ones(4, 64, dtype=torch.int32), {}, "weight is torch.int32"),
        (torch.full((4, 64), float("inf")), {}, "infinite or NaN"),
        (torch.full((4, 64), float("nan")), {}, "infinite or NaN"),
        (torch.full((4, 64), float("nan")), {"format": "int4"}, "NaN or outside"),
        (torch.full((4, 64), 1e5), {"format": "int4"}, "NaN or outside"),
    ],
)
def test_quantize_refuses(weight, options, message):
    with pytest.raises(ValueError, match=message):
        quantize_4bit(weight, **options)


@pytest.mark.parametrize("format", ["nf4", "int4"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@given(row=st.integers(0, 69), column=st.integers(0, 191))
def test_quantize_names_the_tensor_it_refuses(format, value, row, column):
    weight = torch.zeros(70, 192)
    weight[row, column] = value
    with pytest.raises(ValueError, match=r"^model\.layers\.3\.up\.weight has"):
        quantize_4bit(weight, format, name="model.layers.3.up.weight")
    with pytest.raises(ValueError, match=r"^up has shape \(70, 191\), expected .* multiple of the block of"):
        quantize_4bit(weight[:, :191], format, name="up")


def test_dequantize_refuses():
    with pytest.raises(ValueError, match="dtype is torch.float64"):
        dequantize_4bit(quantize_4bit(torch.ones(2, 64)), torch.float64)


@every_format
@pytest.mark.parametrize("packed", [False, True])
def test_operator(device, format, double_quant, packed):
    q = quantize_4bit(torch.randn(9, 256), format, double_quant=double_quant).to(device)
    q = q.packed() if packed else q
    arguments = (*q.operands(), torch.float32)
    torch.library.opcheck(torch.ops.nanogrpo.dequantize_4bit.default, arguments)
    compiled = torch.compile(lambda: dequantize_4bit(q), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), dequantize_4bit(q))


@every_card
@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_compiles(cc):
    def launch():
        for format, double_quant in FORMATS:
            q = quantize_4bit(torch.randn(2, 8192), format, double_quant=double_quant)
            quantization._dequantize_triton(*q.operands(), torch.bfloat16)
            quantization._dequantize_triton(*q.packed().operands(), torch.bfloat16)
        q = quantize_4bit(torch.randn(2, 8192), block_size=4096)
        quantization._dequantize_triton(*q.operands(), torch.float32)

    assert_compiles(launch, cc, {"_dequantize_kernel", "_dequantize_packed_kernel"})


@pytest.mark.gpu
@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_real_shape_on_cuda(format, double_quant, dtype):
    weight = torch.randn(8960, 1536, device="cuda", dtype=torch.bfloat16) * 0.02
    q = quantize_4bit(weight, format, double_quant=double_quant)
    on_cpu = quantize_4bit(weight.cpu(), format, double_quant=double_quant)
    assert torch.equal(q.codes.cpu(), on_cpu.codes)
    expected = dequantize_4bit_ref(on_cpu, dtype)
    torch.cuda.reset_peak_memory_stats()
    moved = on_cpu.to("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    values = dequantize_4bit(moved, dtype)
    assert torch.cuda.max_memory_allocated() - before <= values.nbytes + 2**20  # one megabyte of rounding
    assert torch.equal(values.cpu(), expected)
    assert torch.equal(dequantize_4bit(moved.packed(), dtype).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_more_than_two_to_the_31_values(format):
    N, K = 2**18 + 8, 8192
    row = quantize_4bit(torch.randn(8, K), format)
    q = row.index_rows(torch.arange(N) % 8).to("cuda")
    expected = dequantize_4bit_ref(row, torch.bfloat16).cuda()
    packed = row.packed().index_rows(torch.arange(N) % 8).to("cuda")
    assert torch.equal(dequantize_4bit(packed, torch.bfloat16)[-8:], expected)
    values = dequantize_4bit(q, torch.bfloat16)
    assert torch.equal(values[:8], expected) and torch.equal(values[-8:], expected)
    assert torch.equal(values.view(-1, 8 * K).sum(1), expected.reshape(1, -1).sum(1).expand(N // 8))
