"""The LoRA linear layer: values, every gradient, what it keeps for backward, and what it refuses."""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from cross_compile import assert_compiles, every_card
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import (
    dequantize_4bit,
    lora_linear,
    lora_linear_stacked,
    lora_products,
    matmul_4bit,
    quantization,
    quantize_4bit,
    swiglu,
)
from nanogrpo.kernels.quantization import dense
from numerics import EPS, assert_no_worse_than

module = importlib.import_module("nanogrpo.kernels.lora_linear")  # the package exports its function
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])
# One rounding of the output in half precision; float32 sums of a few hundred terms in another order.
FLOOR = {torch.float32: 4 * EPS[torch.float32], torch.float16: EPS[torch.float16]}
FLOOR[torch.bfloat16] = EPS[torch.bfloat16]
NAMES = ("y", "dx", "dA", "dB", "dbias")


def problem(rows, K, N, r, dtype, *, adapter=None, bias=True, format=None, device="cpu", seed=0):
    """x, weight, A, B, bias and dy, scaled so that every product is of order 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, dtype=dtype):
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    weight = draw(N, K, scale=K**-0.5)
    weight = weight if format is None else quantize_4bit(weight, format)
    adapter = adapter or dtype
    a, b = draw(r, K, scale=K**-0.5, dtype=adapter), draw(N, r, scale=r**-0.5, dtype=adapter)
    return draw(*rows, K), weight, a, b, draw(N) if bias else None, draw(*rows, N)


def gradients(function, x, weight, a, b, bias, dy, scaling):
    """The output and the gradients to x, A, B and the bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b, bias) if t is not None]
    y = function(leaves[0], weight, *leaves[1:3], scaling, *leaves[3:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def double(x, weight, *others):
    dense = weight if isinstance(weight, torch.Tensor) else dequantize_4bit(weight, x.dtype)
    return [None if t is None else t.double() for t in (x, dense, *others)]


def assert_correct(tensors, scaling=0.7):
    x, _, a, b, *_ = tensors
    ours = gradients(lora_linear, *tensors, scaling)
    plain = gradients(module.lora_linear_ref, *tensors, scaling)
    truth = gradients(module.lora_linear_ref, *double(*tensors), scaling)
    assert [t.dtype for t in ours[:4]] == [x.dtype, x.dtype, a.dtype, b.dtype]
    for name, *values in zip(NAMES, ours, plain, truth, strict=False):
        assert_no_worse_than(*values, floor=FLOOR[x.dtype], name=name)


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("format", [None, "nf4"])
def test_autocast_changes_nothing(rows, format):
    *tensors, dy = problem((rows,), 64, 48, 4, torch.float32, format=format)
    expected = gradients(lora_linear, *tensors, dy, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lora_linear, *tensors, dy, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@st.composite
def problems(draw):
    format = draw(st.sampled_from([None, None, "nf4", "int4"]))
    K = draw(st.sampled_from([64, 192] if format else [1, 17, 64, 130, 257]))
    rows = draw(st.sampled_from([(1,), (7,), (2, 3), (1, 5, 13), (33,), (70,)]))
    N, r = draw(st.sampled_from([1, 16, 45, 131])), draw(st.sampled_from([1, 3, 8, 16, 33, 65, 128]))
    dtype, bias = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    adapter = draw(st.sampled_from([dtype, torch.float32]))
    seed = draw(st.integers(0, 2**31))
    return problem(rows, K, N, r, dtype, adapter=adapter, bias=bias, format=format, seed=seed)


@given(problems(), st.sampled_from([0.25, 1, 2.5]))
def test_values_and_gradients_match_reference(tensors, scaling):
    assert_correct(tensors, scaling)


@pytest.mark.parametrize("format", [None, "nf4"])
def test_gradients_without_the_value(format, device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    *tensors, dy = problem((70,), 64, 48, 4, dtype, adapter=torch.float32, format=format, device=device)

    def function(x, weight, a, b, scaling, bias):
        return lora_linear_stacked(x, weight, [a], [b], scaling, bias, value=False)

    expected, found = gradients(lora_linear, *tensors, dy, 0.7), gradients(function, *tensors, dy, 0.7)
    assert found[0].shape == expected[0].shape and not found[0].any() and expected[0].any()
    assert all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("format", [None, "nf4"])
def test_gradients_in_float32_beside_autograd(format, device):
    """What 16-bit adapters have there are the float32 gradients of float32 adapters of the same values."""
    x, weight, a, b, _, dy = problem(
        (70,), 64, 48, 4, torch.float16, format=format, bias=False, device=device
    )
    leaves = [t.float().requires_grad_() for t in (a, b)]
    expected = torch.autograd.grad(lora_linear(x, weight, *leaves, 0.7), leaves, dy)
    assert not torch.equal(expected[0], expected[0].half().float())
    for wanted in ((0, 1), (0,), (1,)):
        targets = [torch.full_like(leaf, torch.nan) if i in wanted else None for i, leaf in enumerate(leaves)]
        own = [t.clone().requires_grad_() for t in (x, a, b)]
        lora_linear_stacked(own[0], weight, own[1:2], own[2:], 0.7, gradients=targets).backward(dy)
        assert own[0].grad is not None and own[1].grad is None and own[2].grad is None
        for index in wanted:
            assert torch.equal(targets[index], expected[index])
    with pytest.raises(ValueError, match=r"gradients\[1\] is torch.float16 \(48, 4\)"):
        lora_linear_stacked(x, weight, [a], [b], 0.7, gradients=[None, b])


@pytest.mark.parametrize("rows", [3, 40])
def test_many_splits_match_reference(rows, device):
    dtype = torch.float16  # float32 is a library product on CUDA
    assert_correct(problem((rows,), 128 * 17 + 5, 70, 5, dtype, device=device))


@st.composite
def stacks(draw):
    """A stacked problem: the tensors of each part, and where its outputs begin."""
    format = draw(st.sampled_from([None, "nf4"]))
    K, r = draw(st.sampled_from([64, 192])), draw(st.sampled_from([1, 4, 16, 40]))
    parts = draw(st.lists(st.sampled_from([1, 16, 45, 130]), min_size=1, max_size=3))
    gaps = draw(st.lists(st.sampled_from([0, 3, 32]), min_size=len(parts) + 1, max_size=len(parts) + 1))
    rows = draw(st.sampled_from([(1,), (2, 9), (70,)]))
    dtype, bias = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    adapter, seed = draw(st.sampled_from([dtype, torch.float32])), draw(st.integers(0, 2**31))
    starts = [sum(gaps[: p + 1]) + sum(parts[:p]) for p in range(len(parts))]
    x, weight, _, _, bias, dy = problem(
        rows, K, sum(parts) + sum(gaps), r, dtype, bias=bias, format=format, seed=seed
    )
    adapters = [
        problem((1,), K, n, r, dtype, adapter=adapter, seed=seed + i)[2:4] for i, n in enumerate(parts)
    ]
    if not any(gaps):
        starts = draw(st.sampled_from([starts, None]))
    return x, weight, *zip(*adapters, strict=True), bias, dy, starts


def stacked_gradients(function, x, weight, lora_a, lora_b, bias, dy, starts, scaling=0.7):
    leaves = [t.detach().clone().requires_grad_() for t in (x, *lora_a, *lora_b)]
    leaves += [] if bias is None else [bias.detach().clone().requires_grad_()]
    P = len(lora_a)
    parts = leaves[1 : 1 + P], leaves[1 + P : 1 + 2 * P]
    y = function(leaves[0], weight, *parts, scaling, *leaves[1 + 2 * P :], starts=starts)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_stack_correct(stack):
    x, weight, lora_a, lora_b, bias, dy, starts = stack
    ours = stacked_gradients(lora_linear_stacked, *stack)
    plain = stacked_gradients(module.lora_linear_stacked_ref, *stack)
    wide = double(x, weight, bias, dy)
    a, b = ([t.double() for t in ts] for ts in (lora_a, lora_b))
    truth = stacked_gradients(module.lora_linear_stacked_ref, *wide[:2], a, b, *wide[2:], starts)
    for index, values in enumerate(zip(ours, plain, truth, strict=True)):
        assert_no_worse_than(*values, floor=FLOOR[x.dtype], name=str(index))


@given(stacks())
def test_stacked_parts_match_reference(stack):
    assert_stack_correct(stack)


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("format", [None, "nf4"])
def test_stacked_equals_unstacked(format, rows, device):
    """Three projections in one call against a call each, on the same base rows."""
    sizes, K, dtype = (48, 16, 80), 128, torch.float32
    parts = [problem((rows,), K, n, 6, dtype, seed=n, device=device) for n in sizes]
    x, dy = parts[0][0], torch.cat([p[5] for p in parts], 1)
    dense = torch.cat([p[1] for p in parts])
    weights = [p[1] for p in parts] if format is None else [quantize_4bit(p[1], format) for p in parts]
    weight = dense if format is None else quantize_4bit(dense, format)
    lora_a, lora_b = [p[2] for p in parts], [p[3] for p in parts]
    bias = torch.cat([p[4] for p in parts])
    stacked = stacked_gradients(lora_linear_stacked, x, weight, lora_a, lora_b, bias, dy, None)
    apart = [
        gradients(lora_linear, x, w, a, b, bias_p, dy_p, 0.7)
        for w, (_, _, a, b, bias_p, dy_p) in zip(weights, parts, strict=True)
    ]
    columns = list(zip(*apart, strict=True))  # y, dx, dA, dB, dbias, each of all parts
    joined = torch.cat(columns[0], 1), sum(columns[1]), *columns[2], *columns[3], torch.cat(columns[4])
    for got, expected in zip(stacked, joined, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [5, 70])
def test_parts_in_one_buffer_are_the_same_bits_and_not_copied(rows, device):
    x, weight, a, b, bias, dy = problem((rows,), 64, 96, 8, torch.float32, device=device)
    sizes = [32, 48, 16]
    stacked_a = torch.cat([a, 2 * a, -a])
    views = stacked_a.split(8), b.split(sizes)
    copies = [[t.clone() for t in ts] for ts in views]
    one, apart = (
        stacked_gradients(lora_linear_stacked, x, weight, *ts, bias, dy, None) for ts in (views, copies)
    )
    assert all(torch.equal(p, q) for p, q in zip(one, apart, strict=True))
    assert module._stack(views[0]).data_ptr() == stacked_a.data_ptr()
    assert torch.equal(module._stack(views[0]), stacked_a) and torch.equal(
        module._stack(copies[0]), stacked_a
    )
    assert torch.equal(module._stack(views[0][::-1]), torch.cat(views[0][::-1]))


def test_outputs_without_an_adapter_are_the_base(device):
    x, weight, a, b, bias, _ = problem((7,), 64, 96, 8, torch.float32, device=device)
    y = lora_linear_stacked(x, weight, [a], [b[32:80]], 0.7, bias, starts=[32])
    base = F.linear(x, weight, bias)
    outside = torch.ones(96, dtype=torch.bool, device=device)
    outside[32:80] = False
    assert torch.equal(y[:, outside], base[:, outside]) and (y - base)[:, 32:80].abs().min() > 0


@pytest.mark.skipif(INTERPRET, reason="the kernels sum in float32")
def test_gradcheck_in_float64():
    x, weight, *leaves, _ = problem((2, 3), 11, 7, 3, torch.float64)
    leaves = [t.requires_grad_() for t in (x, *leaves)]
    assert torch.autograd.gradcheck(lambda x, a, b, bias: lora_linear(x, weight, a, b, 0.7, bias), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(dtype, device):
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 32), (48, 32), (2, 32), (48, 2), (48,), (40, 48)]
    tensors = [torch.randint(-1, 2, shape, generator=generator).to(device, dtype) for shape in shapes]
    ours = gradients(lora_linear, *tensors, 1.0)
    truth = gradients(module.lora_linear_ref, *double(*tensors), 1.0)
    for name, got, expected in zip(NAMES, ours, truth, strict=True):
        # Every partial result is an integer that the dtype holds, once the outputs themselves are rounded.
        assert torch.equal(got, expected.to(dtype)), name


@pytest.mark.parametrize("format", [None, "nf4", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_adapter_is_the_base_layer(dtype, format, device):
    x, weight, a, b, bias, _ = problem((5, 9), 128, 40, 8, dtype, format=format, device=device)
    base = F.linear(x, weight, bias) if format is None else matmul_4bit(x, weight, bias)
    assert torch.equal(lora_linear(x, weight, a, b.zero_(), 2.0, bias), base)


def test_gradient_through_two_stacked_calls(device):
    x, weight, a, b, bias, dy = problem((9,), 48, 48, 4, torch.float32, device=device)

    def stacked(function):
        return lambda *args: function(function(*args), *args[1:])

    tensors = x, weight, a, b, bias, dy
    ours = gradients(stacked(lora_linear), *tensors, 0.7)
    plain = gradients(stacked(module.lora_linear_ref), *tensors, 0.7)
    truth = gradients(stacked(module.lora_linear_ref), *double(*tensors), 0.7)
    for name, *values in zip(NAMES, ours, plain, truth, strict=True):
        assert_no_worse_than(*values, floor=2 * FLOOR[torch.float32], name=name)  # two layers deep


def test_a_rows_adapter_depends_on_no_other_row(device):
    """Among the rows that the two launches serve; a library product picks its kernel by the number of rows."""
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("the CPU's is a library product")
    x, weight, a, b, _, _ = problem((64,), 200, 40, 5, torch.float16, device=device)
    weight.zero_()  # leaves the adapter's part alone
    together = lora_linear(x, weight, a, b, 0.7)
    for rows in (slice(0, 1), slice(31, 34), slice(63, 64)):
        assert torch.equal(lora_linear(x[rows], weight, a, b, 0.7), together[rows])


def test_backward_repeats_bit_for_bit(device):
    tensors = problem((77,), 130, 60, 7, torch.float32, device=device)
    first, second = (gradients(lora_linear, *tensors, 0.7) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("format", [None, "nf4"])
def test_backward_keeps_x_and_the_parameters_alone(format):
    x, weight, a, b, bias, _ = problem((50,), 128, 40, 8, torch.float32, format=format)
    frozen = (
        [weight] if format is None else [t for t in weight.tensors().values() if isinstance(t, torch.Tensor)]
    )
    given_in = {t.data_ptr() for t in (x, a, b, *frozen)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        lora_linear(x, weight, a.requires_grad_(), b.requires_grad_(), 0.7, bias)
    assert kept and set(kept) <= given_in


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_each_gradient_alone(wanted, device):
    x, weight, a, b, bias, dy = problem((6, 5), 33, 21, 3, torch.float32, device=device)
    _, *every = gradients(lora_linear, x, weight, a, b, bias, dy, 0.7)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate((x, a, b, bias))]
    y = lora_linear(leaves[0], weight, leaves[1], leaves[2], 0.7, leaves[3])
    some = torch.autograd.grad(y, [leaves[i] for i in wanted], dy)
    assert all(torch.equal(grad, every[i]) for grad, i in zip(some, wanted, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("format, options", [("nf4", {}), ("nf4", {"double_quant": True}), ("int4", {})])
def test_rows_of_a_dense_weight_are_its_rows(format, options, packed):
    q = quantize_4bit(torch.randn(24, 384, generator=torch.Generator().manual_seed(0)), format, **options)
    codes, scales, *layout = (q.packed() if packed else q).rows(3, 21).operands()
    whole = dense([codes, *scales], *layout, torch.float32)
    for rows in (slice(0, 9), slice(9, 18), slice(5, 6)):
        assert torch.equal(dense([codes, *scales], *layout, torch.float32, rows), whole[rows])


@pytest.mark.parametrize("format", ["nf4", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wide_weight_is_dense_by_halves(format, dtype, monkeypatch):
    x, weight, a, b, bias, dy = problem((module.MAX_ROWS + 8,), 64, 256, 8, dtype, format=format)
    codes, scales, *layout = weight.operands()
    made, make = [], lora_products.dense
    monkeypatch.setattr(lora_products, "dense", lambda *args: made.append(make(*args)) or made[-1])

    def both():
        y = module._lora_linear_triton(x, [codes, *scales], a, b, [0, 256], 0.7, bias, *layout)
        options = [0, 256], 0.7, *layout, True, True, torch.float32, torch.float32
        return [y, *module._lora_linear_bwd(dy, x, [codes, *scales], a, b, *options)]

    whole = both()
    assert [tuple(w.shape) for w in made] == [(256, 64)] * 2
    made.clear()
    monkeypatch.setattr(quantization, "WHOLE", 64)
    halves = both()
    assert [tuple(w.shape) for w in made] == [(128, 64)] * 4
    truth = module.lora_linear_ref(*double(x, weight, a, b), 0.7, bias.double())
    dx = dy.double() @ dequantize_4bit(weight, dtype).double() + 0.7 * dy.double() @ b.double() @ a.double()
    assert_no_worse_than(halves[0], whole[0], truth, floor=FLOOR[dtype])
    assert_no_worse_than(halves[1], whole[1], dx, floor=FLOOR[dtype])
    assert all(map(torch.equal, halves[2:], whole[2:]))


@pytest.mark.parametrize("format", [None, "nf4"])
def test_no_rows(format, device):
    tensors = problem((2, 0), 64, 24, 4, torch.float32, format=format, device=device)
    y, dx, *others = gradients(lora_linear, *tensors, 0.7)
    assert y.shape == (2, 0, 24) and dx.shape == (2, 0, 64)
    assert all((grad == 0).all() for grad in others)


def test_non_contiguous_inputs(device):
    x, weight, a, b, bias, dy = problem((6, 10), 34, 22, 3, torch.float32, device=device)

    def strided(t):
        return torch.stack([t, t], -1).mT.contiguous().mT[..., 0].T.contiguous().T if t.ndim == 2 else t

    apart = torch.stack([x, x], -1)[..., 0], strided(weight), strided(a), strided(b), bias[::1]
    assert not any(t.is_contiguous() for t in apart[:4])
    expected = lora_linear(x, weight, a, b, 0.7, bias)
    torch.testing.assert_close(lora_linear(*apart[:4], 0.7, bias), expected, rtol=0, atol=1e-5)
    leaf = x.clone().requires_grad_()
    (of_sum,) = torch.autograd.grad(lora_linear(leaf, weight, a, b, 0.7).sum(), leaf)  # dy has stride 0
    (of_ones,) = torch.autograd.grad(lora_linear(leaf, weight, a, b, 0.7), leaf, torch.ones_like(dy))
    torch.testing.assert_close(of_sum, of_ones, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [(3,), (2, 9), (70,), (0,)])
@pytest.mark.parametrize("format", [None, "nf4"])
def test_what_follows_is_the_separate_operation(rows, format, device):
    """With a graph to build and without; gradients reach the residual and pass through the gate."""
    dtype = torch.float16
    x, weight, a, b, bias, dy = problem(rows, 128, 48, 8, dtype, format=format, device=device)
    args = x, weight, [a, a.clone()], list(b.split([20, 28])), 0.7, bias
    separate = lora_linear_stacked(*args)
    with torch.no_grad():
        added, gated = lora_linear_stacked(*args, residual=dy), lora_linear_stacked(*args, gated=True)
        plain = lora_linear_stacked(*args)
    assert torch.equal(plain, separate)
    assert torch.equal(added, dy + separate)
    # one unit in the last place: the exponential may be contracted otherwise
    torch.testing.assert_close(gated, swiglu(separate), rtol=EPS[dtype], atol=2.0**-20)
    leaves = x.clone().requires_grad_(), dy.clone().requires_grad_()
    y = lora_linear_stacked(leaves[0], *args[1:], residual=leaves[1])
    grads = torch.autograd.grad(y.sum() + lora_linear_stacked(leaves[0], *args[1:], gated=True).sum(), leaves)
    leaf = x.clone().requires_grad_()
    h = lora_linear_stacked(leaf, *args[1:])
    (expected,) = torch.autograd.grad(h.sum() + swiglu(h).sum(), leaf)
    # two gradients rounded each before they are added, against their sum propagated once
    torch.testing.assert_close(grads[0], expected, rtol=4 * EPS[dtype], atol=8 * EPS[dtype])
    assert torch.equal(grads[1], torch.ones_like(dy))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"residual": torch.zeros(2, 7)}, r"residual is .* expected \(2, 8\)"),
        ({"residual": torch.zeros(2, 8).half()}, "residual is torch.float16"),
        ({"residual": torch.zeros(2, 8), "gated": True}, "expected 2F and none"),
    ],
)
def test_wrong_ends_raise(options, message):
    parts = {"lora_a": [torch.zeros(4, 64)], "lora_b": [torch.zeros(8, 4)]}
    with pytest.raises(ValueError, match=message):
        lora_linear_stacked(**(GOOD | parts), **options)


GOOD = {
    "x": torch.zeros(2, 64),
    "weight": torch.zeros(8, 64),
    "lora_a": torch.zeros(4, 64),
    "lora_b": torch.zeros(8, 4),
    "scaling": 1.0,
    "bias": torch.zeros(8),
}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(2, 63)}, r"x has shape \(2, 63\), expected \(..., 64\)"),
        ({"x": torch.zeros(2, 64).long()}, "x is torch.int64"),
        ({"x": torch.zeros(2, 64).half()}, "bias is torch.float32"),
        ({"x": torch.zeros(2, 64).half(), "bias": None}, "the weight is torch.float32"),
        (
            {"x": torch.zeros(2, 64).double(), "weight": quantize_4bit(torch.randn(8, 64))},
            "x is torch.float64",
        ),
        ({"weight": torch.zeros(8, 64, requires_grad=True)}, "expected a frozen one"),
        ({"lora_a": torch.zeros(129, 64)}, "the rank is 129"),
        ({"lora_a": torch.zeros(0, 64)}, "the rank is 0"),
        ({"lora_a": torch.zeros(4, 32)}, r"lora_a is .* expected \(4, 64\)"),
        ({"lora_b": torch.zeros(4, 8)}, r"lora_b is .* expected \(8, 4\)"),
        ({"lora_b": torch.zeros(8, 4).half()}, "lora_b is torch.float16"),
        ({"bias": torch.zeros(9)}, r"bias is .* expected \(8,\)"),
        ({"weight": torch.zeros(8, 64, device="meta")}, "on meta"),
    ],
)
def test_wrong_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        lora_linear(**(GOOD | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_a": []}, r"have \(0, 2, None\) parts, expected as many of each, at least one"),
        ({"starts": [0]}, r"have \(2, 2, 1\) parts"),
        ({"starts": [0, 4]}, "part 1 owns outputs 4 to 7, expected within 5 to 8"),
        ({"starts": [-1, 5]}, "part 0 owns outputs -1 to 4, expected within 0 to 8"),
        ({"starts": [0, 6]}, "part 1 owns outputs 6 to 9"),
        ({"lora_b": [torch.zeros(5, 4), torch.zeros(2, 4)]}, "the parts have 7 outputs, the weight 8"),
        ({"lora_a": [torch.zeros(4, 64), torch.zeros(3, 64)]}, r"lora_a\[1\] is .* expected \(4, 64\)"),
        ({"lora_b": [torch.zeros(5, 4), torch.zeros(3, 4).half()]}, r"lora_b\[1\] is torch.float16"),
        (
            {"lora_b": [torch.zeros(5, 4).half(), torch.zeros(3, 4).half()]},
            "lora_b is torch.float16, expected",
        ),
    ],
)
def test_wrong_parts_raise(changes, message):
    parts = {"lora_a": [torch.zeros(4, 64)] * 2, "lora_b": [torch.zeros(5, 4), torch.zeros(3, 4)]}
    with pytest.raises(ValueError, match=message):
        lora_linear_stacked(**(GOOD | parts | changes))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("format", [None, "nf4"])
def test_operators_pass_opcheck(format, parts, device):
    x, weight, a, b, bias, dy = problem((6,), 64, 20, 3 * parts, torch.float32, format=format, device=device)
    b, columns = b[:, :3].contiguous(), [0, 20] if parts == 1 else [0, 8, 8, 20]
    if format is None:
        tensors, quant_block, first_block = [weight], 0, 0
    else:
        codes, scales, quant_block, first_block = weight.operands()
        tensors = [codes, *scales]
    operands, layout = (x, tensors, a, b, columns, 0.7), (quant_block, first_block)
    torch.library.opcheck(torch.ops.nanogrpo.lora_linear, (*operands, bias, *layout))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.nanogrpo.lora_linear_bwd, (dy, *operands, *layout, *needs, a.dtype, b.dtype)
        )


@pytest.mark.skipif(INTERPRET, reason="torch.compile does not trace the interpreter")
def test_compiles_to_one_graph(device):
    tensors = problem((3, 5), 33, 21, 3, torch.float32, device=device)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    ours, expected = (gradients(function, *tensors, 0.7) for function in (compiled, lora_linear))
    assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))


@pytest.mark.skipif(INTERPRET, reason="torch.compile does not trace the interpreter")
def test_a_stack_compiles_to_one_graph(device):
    x, weight, a, b, bias, dy = problem((3, 5), 33, 21, 3, torch.float32, device=device)
    stack = x, weight, [a, 2 * a], list(b.split([8, 13])), bias, dy, None
    compiled = torch.compile(lora_linear_stacked, fullgraph=True, backend="aot_eager")
    ours, expected = (stacked_gradients(function, *stack) for function in (compiled, lora_linear_stacked))
    assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank, rows", [(16, 8), (64, 40), (128, 64)])
def test_kernels_compile_for_every_card(cc, rank, rows, dtype):
    x, weight, a, b, _, dy = problem((rows,), 256, 128, rank, dtype, adapter=torch.float32)
    x, a, columns = x.contiguous(), torch.cat([a, a]), [0, 48, 64, 128]
    operands = [weight], a, b[:112].contiguous(), columns, 0.5

    def launch():
        module._lora_linear_triton(x, *operands, None, 0, 0)

    assert_compiles(launch, cc, ["_down_kernel" if rows <= 16 else "_tiled_down_kernel", "_up_kernel"])


@pytest.mark.gpu
@pytest.mark.parametrize("format", [None, "nf4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, K, N, r", [(1, 1536, 8960, 16), (64, 8960, 1536, 32), (5000, 576, 1536, 64)])
def test_gpu_shapes(rows, K, N, r, dtype, format):
    assert_correct(problem((rows,), K, N, r, dtype, adapter=torch.float32, format=format, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, K, parts, r", [
    (8, 1536, (1536, 256, 256), 64), (64, 1536, (8960, 8960), 64), (700, 1536, (1536, 256, 256), 32),
])  # fmt: skip
def test_gpu_stacks(rows, K, parts, r, dtype):
    x, weight, _, _, bias, dy = problem((rows,), K, sum(parts), r, dtype, format="nf4", device="cuda")
    adapters = [
        problem((1,), K, n, r, dtype, adapter=torch.float32, device="cuda", seed=n + i)[2:4]
        for i, n in enumerate(parts)
    ]
    assert_stack_correct((x, weight, *zip(*adapters, strict=True), bias, dy, None))


@pytest.mark.gpu
def test_gpu_memory_is_as_stated():
    M, K, N, r = 8192, 1536, 8960, 16
    x, weight, a, b, _, dy = problem(
        (M,), K, N, r, torch.bfloat16, adapter=torch.float32, format="nf4", device="cuda"
    )
    leaves = [t.requires_grad_() for t in (x, a, b)]
    torch.autograd.grad(lora_linear(x, weight, a, b, 0.7), leaves, dy)  # loads the library's workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = lora_linear(x, weight, a, b, 0.7)
    beside = 2 * (r * (K + N) + 2 * M * r + N * K) + 2**20
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + beside
    grads = torch.autograd.grad(y, leaves, dy)
    outputs = y.nbytes + sum(grad.nbytes for grad in grads)
    assert torch.cuda.max_memory_allocated() - before <= outputs + beside


def test_a_bias_of_any_stride(device):
    x, weight, a, b, _, _ = problem((5,), 64, 48, 4, torch.float16, format="nf4", bias=False, device=device)
    wide = torch.randn(96, device=device).half()
    for bias in (wide[::2], wide[:1].expand(48)):
        together = lora_linear(x, weight, a, b, 0.5, bias)
        assert torch.equal(together, lora_linear(x, weight, a, b, 0.5, bias.clone()))
