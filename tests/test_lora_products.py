"""Products of many rows under adapters, apart and as one product, against float64."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import dequantize_4bit, lora_products, quantization, quantize_4bit
from nanogrpo.kernels.lora_decode import MAX_ROWS
from nanogrpo.kernels.lora_products import gradients, many_rows
from numerics import EPS, assert_no_worse_than

NARROW_WIDE = [(256, 40), (40, 256), (128, 512), (512, 128), (96, 256), (1280, 256)]  # N, K
FORMATS = [("nf4", False), ("nf4", True), ("int4", False)]


def problem(N, K, parts, r, dtype, format=None, double_quant=False, packed=False, *, device="cpu", seed=0):
    """x, the operands of a weight and the weight itself, A, B, bias, dy; ``parts`` are (start, stop)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size, scale=1.0: (scale * torch.randn(size, generator=generator)).to(device, dtype)
    weight, operands = draw(N, K, scale=K**-0.5), (0, 0)
    tensors = [weight]
    if format:
        options = {"double_quant": True} if double_quant else {}
        q = quantize_4bit(weight, format, **options)
        weight = dequantize_4bit(q, dtype)
        codes, scales, *operands = (q.packed() if packed else q).operands()
        tensors = [codes, *scales]
    rows = sum(stop - start for start, stop in parts)
    a, b = draw(len(parts) * r, K, scale=K**-0.5), draw(rows, r, scale=r**-0.5)
    return draw(MAX_ROWS + 8, K), tensors, operands, weight, a, b, draw(N), draw(MAX_ROWS + 8, N)


def reference(x, weight, a, b, bias, dy, parts, r, scaling):
    """y, dx, dA and the dB of each part, in the dtype of what comes in."""
    y, g, h = x @ weight.T, [], (x @ a.T).split(r, 1)
    y, row, grads = y if bias is None else y + bias, 0, []
    delta = torch.zeros_like(y)
    for (start, stop), own in zip(parts, h, strict=True):
        rows = b[row : row + stop - start]
        delta[:, start:stop] = scaling * (own @ rows.T)
        g.append(scaling * (dy[:, start:stop] @ rows))
        grads.append(scaling * (dy[:, start:stop].T @ own))
        row += stop - start
    g = torch.cat(g, 1)
    return [y + delta, dy @ weight + g @ a, g.T @ x, *grads]


def check(parts, r, tensors, *, bias=True, scaling=0.7):
    x, weight, (quant_block, first_block), plain_weight, a, b, offset, dy = tensors
    columns = [border for part in parts for border in part]
    offset = offset if bias else None
    y = many_rows(x, weight, a, b, columns, scaling, offset, quant_block, first_block)
    options = columns, scaling, quant_block, first_block, True, True, torch.float32, torch.float32
    ours = [y, *gradients(dy, x, weight, a, b, *options)]
    operands = x, plain_weight, a, b, offset, dy
    plain = reference(*operands, parts, r, scaling)
    truth = reference(*(None if t is None else t.double() for t in operands), parts, r, scaling)
    for index, values in enumerate(zip(ours, plain, truth, strict=True)):
        # Of A and B float32 sums over 520 rows in another order: of half a unit each, a square root of them adds up.
        floor = 4 * EPS[x.dtype] if index < 2 else max(EPS[x.dtype], 520**0.5 / 2 * EPS[torch.float32])
        assert_no_worse_than(*values, floor=floor, name=str(index))
    return ours


@st.composite
def problems(draw):
    N, K = draw(st.sampled_from(NARROW_WIDE))
    packed = K % 128 == 0 and draw(st.booleans())
    format, double_quant = draw(st.sampled_from([(None, False), *FORMATS]))
    if format and K % 64:
        format = None
    borders = sorted(draw(st.sets(st.integers(0, N), min_size=2, max_size=6)))
    parts = [(start, stop) for start, stop in zip(borders[::2], borders[1::2], strict=False)]
    r, dtype = (
        draw(st.sampled_from([1, 3, 16, 33, 128])),
        draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )
    seed = draw(st.integers(0, 2**31))
    made = problem(N, K, parts, r, dtype, format, double_quant, packed and format is not None, seed=seed)
    return parts, r, made


@given(problems(), st.booleans(), st.booleans())
def test_values_and_gradients(found, bias, halves):
    parts, r, tensors = found
    with mock.patch.object(quantization, "WHOLE", 64 if halves else quantization.WHOLE):
        check(parts, r, tensors, bias=bias)


def two_products_in_one(x, w, h, b, out, bias=None, starts=(0,), by_rows=True):
    """What ``hopper_linear`` computes, anywhere."""
    x, w, h, b = (t.float() for t in (x, w, h, b))
    if not by_rows:
        return out.copy_(x @ w + h @ b)
    y, r = x @ w.T, b.shape[1]
    for part, (start, stop) in enumerate(zip(starts, [*starts[1:], y.shape[1]], strict=True)):
        y[:, start:stop] += h[:, part * r : part * r + r] @ b[start:stop].T
    return out.copy_(y if bias is None else y + bias)


@st.composite
def whole_problems(draw, halves):
    """No output without an adapter; W dense at once or by halves."""
    N, K = draw(st.sampled_from([(256, 128), (512, 128)] if halves else [(256, 128), (96, 256)]))
    inner = draw(st.lists(st.integers(0, N), max_size=3))  # twice the same: a part of no outputs
    borders = [0, *sorted(inner), N]
    parts = list(zip(borders, borders[1:], strict=False))
    format = draw(st.sampled_from(["nf4", "int4"] if halves else [None, "nf4"]))
    r, seed = draw(st.sampled_from([1, 8, 40])), draw(st.integers(0, 99))
    return parts, r, problem(N, K, parts, r, torch.float32, format, packed=format is not None, seed=seed)


@pytest.mark.parametrize("halves", [False, True])
@given(data=st.data(), bias=st.booleans())
def test_each_output_once_with_its_own_ranks(halves, data, bias):
    """What is handed to Hopper's product: which rows of W, B and bias, and which ranks, belong together."""
    parts, r, tensors = data.draw(whole_problems(halves))
    calls = []

    def product(x, w, h, b, out, offset=None, starts=(0,), by_rows=True):
        if by_rows:
            assert (
                starts[0] == 0 and list(starts) == sorted(starts) and h.shape[1] == len(starts) * b.shape[1]
            )
            assert len(w) == len(b) == out.shape[1] and (offset is None or len(offset) == len(w))
            calls.append(len(starts))
        else:
            assert h.shape[1] == len(b) and w.shape[1] == b.shape[1] == out.shape[1]
        assert out.isnan().all(), "written twice"  # allocations are filled
        return two_products_in_one(x, w, h, b, out, offset, starts, by_rows)

    with (
        mock.patch.object(quantization, "WHOLE", 64 if halves else quantization.WHOLE),
        mock.patch.object(lora_products, "fits", lambda *operands, **starts: True),
        mock.patch.object(lora_products, "hopper_linear", product),
    ):
        check(parts, r, tensors, bias=bias)
    assert calls


@pytest.mark.parametrize("N, K", NARROW_WIDE)
def test_what_is_one_product(N, K, monkeypatch):
    """A 4-bit weight is made dense above A where dx is wide."""
    made, make = [], lora_products.dense_into
    monkeypatch.setattr(
        lora_products, "dense_into", lambda out, *rest: made.append(tuple(out.shape)) or make(out, *rest)
    )
    if K % 64 == 0:
        check([(0, N)], 4, problem(N, K, [(0, N)], 4, torch.float32, "nf4"))
        assert made == [(N, K)] * (K >= 2 * N)
        made.clear()
    check([(0, N)], 4, problem(N, K, [(0, N)], 4, torch.float32))
    assert not made, "a dense weight stays where it is"


def test_one_product_and_two_agree(monkeypatch):
    parts = [(0, 48), (48, 128)]
    tensors = problem(128, 512, parts, 8, torch.float32, "nf4", True, True)
    one = check(parts, 8, tensors)
    monkeypatch.setattr(lora_products, "WIDE", 1000)
    two = check(parts, 8, tensors)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(one, two, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("format, double_quant", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "N, K, parts, r",
    [
        (17920, 1536, [(0, 8960), (8960, 17920)], 64),
        (1536, 8960, [(0, 1536)], 64),
        (8960, 1536, [(0, 8960)], 5),
        (640, 2176, [(3, 501)], 33),
        (4352, 2176, [(3, 501), (502, 4352)], 16),
    ],
)
def test_real_shapes_on_cuda(format, double_quant, dtype, N, K, parts, r):
    check(parts, r, problem(N, K, parts, r, dtype, format, double_quant, True, device="cuda"))
