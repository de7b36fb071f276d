"""The container: views, copies, files, and what it refuses."""

import dataclasses
import json

import bitsandbytes.functional as bnb
import gguf
import pytest
import safetensors
import safetensors.torch
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels.quantization import dequantize_4bit_ref, quantize_4bit
from nanogrpo.kernels.quantized_weight import QuantizedWeight

FORMATS = [("nf4", False), ("nf4", True), ("int4", False)]
every_format = pytest.mark.parametrize("format, double_quant", FORMATS)


def made(N=11, K=192, format="nf4", double_quant=False, dtype=torch.float32, seed=0):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return quantize_4bit(weight, format, double_quant=double_quant)


def same(a, b):
    described = all(
        getattr(a, name) == getattr(b, name) for name in ("shape", "format", "quant_block", "dtype")
    )
    left, right = a.tensors(), b.tensors()
    return described and left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@every_format
@given(data=st.data())
def test_rows_are_views_of_the_same_values(format, double_quant, data):
    # 5 blocks a row or 3: nested blocks of 256 scales then begin and end inside rows
    q = made(data.draw(st.integers(1, 200)), 320, format, double_quant)
    start = data.draw(st.integers(0, q.shape[0]))
    stop = data.draw(st.integers(start, q.shape[0]))
    part = q.rows(start, stop)
    whole = dequantize_4bit_ref(q)
    assert torch.equal(dequantize_4bit_ref(part), whole[start:stop])
    if stop > start:
        assert part.codes.untyped_storage().data_ptr() == q.codes.untyped_storage().data_ptr()
        inner = part.rows(1, stop - start)  # a slice of a slice
        assert torch.equal(dequantize_4bit_ref(inner), whole[start + 1 : stop])


@every_format
def test_index_rows_copies_any_order(format, double_quant):
    q = made(100, 320, format, double_quant)
    index = torch.randperm(100, generator=torch.Generator().manual_seed(1))[:77]
    assert torch.equal(dequantize_4bit_ref(q.index_rows(index)), dequantize_4bit_ref(q)[index])
    part = q.rows(13, 90)
    assert torch.equal(
        dequantize_4bit_ref(part.index_rows(index % 77)), dequantize_4bit_ref(part)[index % 77]
    )


@pytest.mark.parametrize("bad", [(-1, 3), (4, 3), (0, 12)])
def test_rows_outside_the_weight(bad):
    with pytest.raises(ValueError, match="of a weight with 11 rows"):
        made().rows(*bad)


@pytest.mark.parametrize("bad", [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)])
def test_index_rows_refuses(bad):
    with pytest.raises(ValueError, match="expected one dimension of int64"):
        made().index_rows(bad)


@every_format
def test_bytes(format, double_quant):
    N, K = 64, 1024
    q = made(N, K, format, double_quant)
    scales = {("nf4", False): N * K // 64 * 4 + 64, ("int4", False): N * K // 32 * 4}
    nested = N * K // 64 + N * K // 64 // 256 * 4 + 256 * 4 + 4 + 64
    assert q.nbytes == N * K // 2 + scales.get((format, double_quant), nested)


@every_format
def test_to_moves_every_tensor(device, format, double_quant):
    q = made(format=format, double_quant=double_quant)
    moved = q.to(device)
    assert {t.device.type for t in moved.tensors().values()} == {device.type}
    assert moved.device.type == device.type and same(moved.to("cpu"), q)


@every_format
@pytest.mark.parametrize("sliced", [False, True])
def test_safetensors_file(tmp_path, format, double_quant, sliced):
    q = made(150, 320, format, double_quant, torch.bfloat16)
    q = q.rows(70, 149) if sliced else q
    path = tmp_path / "weight.safetensors"
    safetensors.torch.save_file(q.tensors(), path, metadata=q.metadata)
    with safetensors.safe_open(path, "pt") as file:
        loaded = QuantizedWeight.from_tensors(
            {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        )
    assert same(loaded, q) and loaded.first_block == q.first_block
    assert torch.equal(dequantize_4bit_ref(loaded), dequantize_4bit_ref(q))


@every_format
@pytest.mark.parametrize("sliced", [False, True])
def test_packed_inverts_and_keeps_every_view(tmp_path, format, double_quant, sliced):
    q = made(150, 384, format, double_quant, torch.bfloat16)
    q = q.rows(70, 149) if sliced else q
    packed, values, N = q.packed(), dequantize_4bit_ref(q), q.shape[0]
    assert packed.is_packed and not q.is_packed and packed.packed() is packed and q.unpacked() is q
    assert packed.nbytes == q.nbytes and packed.codes.dtype == torch.int32
    assert same(packed.unpacked(), q) and packed.unpacked().first_block == q.first_block
    assert torch.equal(dequantize_4bit_ref(packed), values)
    part = packed.rows(13, 50)
    assert torch.equal(dequantize_4bit_ref(part), values[13:50])
    assert part.codes.untyped_storage().data_ptr() == packed.codes.untyped_storage().data_ptr()
    index = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert torch.equal(dequantize_4bit_ref(packed.index_rows(index)), values[index])
    assert same(packed.to("cpu"), packed)
    path = tmp_path / "weight.safetensors"
    safetensors.torch.save_file(packed.tensors(), path, metadata=packed.metadata)
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        loaded = QuantizedWeight.from_tensors(tensors, file.metadata())
    assert loaded.is_packed and same(loaded, packed)
    if format == "nf4" and not sliced:
        saved, expected = packed.to_bitsandbytes("up"), q.to_bitsandbytes("up")
        assert all(torch.equal(saved[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "shape, options",
    [
        ((4, 192), {}),
        ((4, 192), {"format": "int4"}),
        ((4, 128), {"block_size": 32}),
        ((4, 128), {"block_size": 128}),
    ],
)
def test_packed_refuses_other_layouts(shape, options):
    q = quantize_4bit(torch.ones(shape), **options)
    assert not q.can_be_packed
    with pytest.raises(ValueError, match="expected K a multiple of 128 in blocks of"):
        q.packed()
    with pytest.raises(ValueError, match="packed codes: .* expected K a multiple of 128 in blocks of"):
        dataclasses.replace(q, codes=torch.zeros(4, shape[1] // 8, dtype=torch.int32))


def test_packed_refuses_another_code_book():
    q = dataclasses.replace(made(K=128), code_book=torch.arange(16.0))
    with pytest.raises(ValueError, match="the code book is .*, expected"):
        q.packed()


def test_from_tensors_refuses():
    q = made()
    with pytest.raises(ValueError, match=r"expected \['shape'\] too"):
        QuantizedWeight.from_tensors(q.tensors(), {k: v for k, v in q.metadata.items() if k != "shape"})
    with pytest.raises(ValueError, match="dtype is .*complex"):
        QuantizedWeight.from_tensors(q.tensors(), q.metadata | {"dtype": "complex"})
    with pytest.raises(ValueError, match="expected .*'code_book'"):
        QuantizedWeight.from_tensors({k: v for k, v in q.tensors().items() if k != "code_book"}, q.metadata)


def bitsandbytes_state(weight, prefix, double_quant, storage=torch.uint8, block=64):
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block, compress_statistics=double_quant, quant_type="nf4", quant_storage=storage
    )
    entries = {f"{prefix}weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {f"{prefix}weight": packed, **entries}, bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_bitsandbytes(double_quant, storage, dtype):
    weight = torch.randn(48, 640, generator=torch.Generator().manual_seed(2)).to(dtype)
    state, values = bitsandbytes_state(weight, "model.layers.0.up_proj.", double_quant, storage)
    q = QuantizedWeight.from_bitsandbytes(state, "model.layers.0.up_proj")
    assert q.shape == (48, 640) and q.dtype == dtype and (q.nested_scale is not None) == double_quant
    assert torch.equal(dequantize_4bit_ref(q), values)
    assert same(q, quantize_4bit(weight, double_quant=double_quant))


@pytest.mark.parametrize(
    "prefix, asked", [("a.b.", "a.b."), ("a.b.", "a.b.weight"), ("", ""), ("", "weight")]
)
def test_from_bitsandbytes_prefix(prefix, asked):
    state, values = bitsandbytes_state(torch.randn(4, 128), prefix, False, block=128)
    q = QuantizedWeight.from_bitsandbytes(state, asked)
    assert q.quant_block == 128 and torch.equal(dequantize_4bit_ref(q), values)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_to_bitsandbytes_is_what_bitsandbytes_writes(double_quant, dtype):
    weight = torch.randn(48, 640, generator=torch.Generator().manual_seed(3)).to(dtype)
    theirs, values = bitsandbytes_state(weight, "up.", double_quant)
    q = quantize_4bit(weight, double_quant=double_quant)
    ours = q.to_bitsandbytes("up")
    assert ours.keys() == theirs.keys()
    header = "up.weight.quant_state.bitsandbytes__nf4"
    described, expected = (json.loads(bytes(state[header].tolist())) for state in (ours, theirs))
    assert described == expected
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name != header)
    parts = {name.removeprefix("up.weight."): ours[name] for name in ours if name != "up.weight"}
    loaded = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(ours["up.weight"], loaded), values)
    assert same(QuantizedWeight.from_bitsandbytes(ours, "up"), q)


@pytest.mark.parametrize("double_quant", [False, True])
def test_from_a_linear_layer_of_bitsandbytes(double_quant):
    """A state_dict that the package's own layer wrote, bias beside it."""
    layer = Linear4bit(
        640, 48, quant_type="nf4", compress_statistics=double_quant, compute_dtype=torch.float32
    )
    layer = layer.to("cpu")
    q = QuantizedWeight.from_bitsandbytes(layer.state_dict(), "")
    assert torch.equal(
        dequantize_4bit_ref(q), bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    )
    saved = q.to_bitsandbytes("")
    stats = {name.removeprefix("weight."): saved[name] for name in saved if name != "weight"}
    other = Linear4bit(640, 48, quant_type="nf4", compute_dtype=torch.float32)
    other.weight, other.bias = Params4bit.from_prequantized(saved["weight"], stats, device="cpu"), layer.bias
    x = torch.randn(3, 640, generator=torch.Generator().manual_seed(4))
    assert torch.equal(other(x), layer(x))


def test_to_bitsandbytes_refuses():
    with pytest.raises(ValueError, match="format is 'int4'"):
        made(format="int4").to_bitsandbytes("up")
    with pytest.raises(ValueError, match="9 scales into a nested block"):
        made(double_quant=True).rows(3, 11).to_bitsandbytes("up")


def test_from_bitsandbytes_refuses():
    state, _ = bitsandbytes_state(torch.randn(4, 128), "up.", True)
    for name in list(state):
        with pytest.raises(ValueError, match=f"no '{name}'"):
            QuantizedWeight.from_bitsandbytes({k: v for k, v in state.items() if k != name}, "up")
    with pytest.raises(ValueError, match="up.weight has 255 elements, expected 256"):
        QuantizedWeight.from_bitsandbytes(state | {"up.weight": state["up.weight"][:-1]}, "up")
    odd, _ = bitsandbytes_state(torch.randn(64, 100), "up.", False)
    with pytest.raises(ValueError, match="K a multiple of the block of 64"):
        QuantizedWeight.from_bitsandbytes(odd, "up")


@given(N=st.integers(1, 9), blocks=st.integers(1, 9), seed=st.integers(0, 99))
def test_from_gguf(N, blocks, seed):
    weight = torch.randn(N, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    raw = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1)
    q = QuantizedWeight.from_gguf_q4_1(torch.from_numpy(raw), (N, 32 * blocks))
    values = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_1))
    assert torch.equal(dequantize_4bit_ref(q), values)
    assert q.nbytes == raw.nbytes


@pytest.mark.parametrize("raw", [torch.zeros(39, dtype=torch.uint8), torch.zeros(40, dtype=torch.int8)])
def test_from_gguf_refuses(raw):
    with pytest.raises(ValueError, match=r"expected \(torch.uint8, 40\)"):
        QuantizedWeight.from_gguf_q4_1(raw, (2, 32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codes": torch.zeros(11, 95, dtype=torch.uint8)}, "codes is"),
        ({"codes": torch.zeros(11, 24, dtype=torch.int32)}, "packed codes: nf4 weight"),
        ({"scale": torch.zeros(11, 3, dtype=torch.float16)}, "scale is"),
        ({"scale": torch.zeros(3, 11).T}, "expected contiguous"),
        ({"code_book": None}, "expected .*code_book"),
        ({"minimum": torch.zeros(11, 3)}, "nf4 weight of"),
        ({"format": "fp4"}, "format is 'fp4'"),
        ({"quant_block": 48}, "block of 48"),
        ({"shape": (11, 190)}, "K a multiple"),
        ({"shape": (11, 6, 32)}, r"expected \(N, K\)"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
    ],
)
def test_inconsistent_fields(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made(), **change)
