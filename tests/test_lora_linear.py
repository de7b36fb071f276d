"""The LoRA linear layer: values, every gradient, what it keeps for backward, and what it refuses."""

import importlib
import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cross_compile import assert_compiles, every_card
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import dequantize_4bit, lora_linear, matmul_4bit, quantize_4bit
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


def test_many_splits_match_reference_and_one_part_is_the_same_bits(device):
    tensors = problem((100,), 300, 200, 5, torch.float16, device=device)
    with mock.patch.multiple(module, SPLIT_K=128, SPLIT_M=64):
        assert_correct(tensors)
        apart = gradients(lora_linear, *tensors, 0.7)
        with mock.patch.object(module, "ONE_PART", 1):
            together = gradients(lora_linear, *tensors, 0.7)
    assert all(torch.equal(p, q) for p, q in zip(apart, together, strict=True))


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
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("the CPU's library product picks its kernel by the number of rows")
    x, weight, a, b, _, _ = problem((70,), 200, 40, 5, torch.float32, device=device)
    weight.zero_()  # leaves the adapter's part alone
    together = lora_linear(x, weight, a, b, 0.7)
    for rows in (slice(0, 1), slice(31, 34), slice(69, 70)):
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


@pytest.mark.parametrize("format", [None, "nf4"])
def test_operators_pass_opcheck(format, device):
    x, weight, a, b, bias, dy = problem((6,), 64, 20, 3, torch.float32, format=format, device=device)
    if format is None:
        tensors, quant_block, first_block = [weight], 0, 0
    else:
        codes, scales, quant_block, first_block = weight.operands()
        tensors = [codes, *scales]
    layout = quant_block, first_block
    torch.library.opcheck(torch.ops.nanogrpo.lora_linear, (x, tensors, a, b, 0.7, bias, *layout))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.nanogrpo.lora_linear_bwd, (dy, x, tensors, a, b, 0.7, *layout, *needs)
        )


@pytest.mark.skipif(INTERPRET, reason="torch.compile does not trace the interpreter")
def test_compiles_to_one_graph(device):
    tensors = problem((3, 5), 33, 21, 3, torch.float32, device=device)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    ours, expected = (gradients(function, *tensors, 0.7) for function in (compiled, lora_linear))
    assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("rank", [32, 64, 128])
def test_kernels_compile_for_every_card(cc, rank):
    """The tiles of CONFIGS (16 has those of 32), with float32 adapters: more shared memory than 16-bit ones."""
    assert_all_compile(cc, rank, torch.bfloat16)


@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("rank", [16, 128])
def test_float32_kernels_fit_the_smallest_card(rank):
    assert_all_compile(86, rank, torch.float32)


def assert_all_compile(cc, rank, dtype):
    x, weight, a, b, _, dy = problem((40,), 256, 128, rank, dtype, adapter=torch.float32)

    def launch():
        module._lora_linear_triton(x, [weight], a, b, 0.5, None, 0, 0)
        module._lora_linear_bwd_triton(dy, x, [weight], a, b, 0.5, 0, 0, True, True)

    assert_compiles(launch, cc, ["_down_kernel", "_up_kernel", "_outer_kernel"])


@pytest.mark.gpu
@pytest.mark.parametrize("format", [None, "nf4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, K, N, r", [(1, 1536, 8960, 16), (64, 8960, 1536, 32), (5000, 576, 1536, 64)])
def test_gpu_shapes(rows, K, N, r, dtype, format):
    assert_correct(problem((rows,), K, N, r, dtype, adapter=torch.float32, format=format, device="cuda"))


@pytest.mark.gpu
def test_gpu_memory_is_as_stated():
    M, K, N, r = 8192, 1536, 8960, 16
    x, weight, a, b, _, dy = problem((M,), K, N, r, torch.bfloat16, adapter=torch.float32, device="cuda")
    leaves = [t.requires_grad_() for t in (x, a, b)]
    torch.autograd.grad(lora_linear(x, weight, a, b, 0.7), leaves, dy)  # loads the library's workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = lora_linear(x, weight, a, b, 0.7)
    slack = 2**20
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 4 * M * r + slack
    grads = torch.autograd.grad(y, leaves, dy)
    outputs = y.nbytes + sum(grad.nbytes for grad in grads)
    partial = 4 * -(-M // module.SPLIT_M) * r * max(N, K)
    assert torch.cuda.max_memory_allocated() - before <= outputs + 2 * 4 * M * r + partial + slack
