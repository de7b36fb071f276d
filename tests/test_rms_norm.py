"""RMSNorm: values, the gradients to x and the residual, what it keeps, strided heads, and what it refuses."""

import importlib
import os

import pytest
import torch
from cross_compile import assert_compiles, every_card
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import rms_norm
from numerics import EPS, assert_no_worse_than

module = importlib.import_module("nanogrpo.kernels.rms_norm")  # the package exports its function
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])
# Half precision: one rounding of each output. Float32: sums of up to a few thousand squares in another order.
FLOOR = {dtype: EPS[dtype] for dtype in DTYPES} | {torch.float32: 4 * EPS[torch.float32]}
NAMES = ("y", "s", "dx", "dresidual")


def problem(shape, dtype, *, residual, device="cpu", seed=0, eps=1e-6, weight_dtype=None):
    """x, residual or None, weight, eps, and the gradients of y and s."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    weight = (1 + 0.5 * draw(shape[-1], dtype=torch.float32)).to(weight_dtype or dtype)
    return draw(*shape), draw(*shape) if residual else None, weight, eps, draw(*shape), draw(*shape)


def run(function, x, residual, weight, eps, dy, ds):
    """Outputs and gradients in the order of NAMES, without those of s and the residual where there is none."""
    x = x.detach().requires_grad_()
    if residual is None:
        y = function(x, weight, eps)
        return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]}
    residual = residual.detach().requires_grad_()
    y, s = function(x, weight, eps, residual)
    dx, dresidual = torch.autograd.grad([y, s], [x, residual], [dy, ds])
    return dict(zip(NAMES, (y.detach(), s.detach(), dx, dresidual), strict=True))


def truth(x, residual, weight, eps, dy, ds):
    """Float64, from the sum as it is rounded: that rounding belongs to the specification."""
    double = [t.double() for t in (weight, dy, ds)]
    if residual is None:
        return run(module.rms_norm_ref, x.double(), None, double[0], eps, *double[1:])
    s = x + residual
    return run(module.rms_norm_ref, s.double(), torch.zeros_like(s).double(), double[0], eps, *double[1:])


def assert_correct(tensors):
    ours, plain, exact = run(rms_norm, *tensors), run(module.rms_norm_ref, *tensors), truth(*tensors)
    assert set(ours) == set(exact)
    for name, value in ours.items():
        assert value.dtype == tensors[0].dtype and value.is_contiguous()
        assert_no_worse_than(value, plain[name], exact[name], floor=FLOOR[value.dtype], name=name)
    if "s" in ours:
        assert torch.equal(ours["s"], tensors[0] + tensors[1])
        assert torch.equal(ours["dx"], ours["dresidual"])


@st.composite
def problems(draw):
    D = draw(st.sampled_from([1, 2, 15, 64, 100, 257, 1536] + ([] if INTERPRET else [4100])))
    rows = draw(st.sampled_from([(), (1,), (7,), (2, 3), (3, 1, 5), (130,)]))
    dtype = draw(st.sampled_from(DTYPES))
    weight_dtype = draw(st.sampled_from([dtype, torch.float32]))
    residual, eps = draw(st.booleans()), draw(st.sampled_from([1e-6, 1e-5, 0.1]))
    seed = draw(st.integers(0, 2**31))
    return problem((*rows, D), dtype, residual=residual, eps=eps, seed=seed, weight_dtype=weight_dtype)


@given(problems())
def test_values_and_gradients_match_reference(tensors):
    assert_correct(tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (300, 128), (65, 1536), (9, 3584), (5, 8192), (2, 65536)])
@pytest.mark.parametrize("residual", [False, True])
def test_gpu_shapes(shape, dtype, residual):
    assert_correct(problem(shape, dtype, residual=residual, device="cuda"))


@pytest.mark.skipif(INTERPRET, reason="the kernels sum in float32")
def test_cpu_values_are_those_of_the_unfused_code():
    x, residual, weight, eps, *_ = problem((9, 96), torch.bfloat16, residual=True)
    y, s = rms_norm(x, weight, eps, residual)
    values = (x + residual).float()
    expected = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    assert torch.equal(y, expected.bfloat16()) and torch.equal(s, x + residual)


@pytest.mark.skipif(INTERPRET, reason="the kernels sum in float32")
def test_gradcheck_in_float64():
    x, residual, weight, *_ = problem((3, 11), torch.float64, residual=True)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-3), x)
    assert torch.autograd.gradcheck(lambda x, residual: rms_norm(x, weight, 1e-3, residual), (x, residual))


@pytest.mark.parametrize("part", [0, 1])
def test_heads_of_a_stacked_projection_are_read_in_place(part, device):
    T, H, D = 5, 3, 32
    stacked = torch.randn(T, 2 * H * D, generator=torch.Generator().manual_seed(part)).to(device)
    heads = stacked.unflatten(1, (2 * H, D))[:, part * H : (part + 1) * H]
    assert not heads.is_contiguous()
    tensors = heads, None, *problem((T, H, D), torch.float32, residual=False, device=device)[2:]
    ours, expected = run(rms_norm, *tensors), run(rms_norm, heads.contiguous(), *tensors[1:])
    for name, value in ours.items():
        assert torch.equal(value, expected[name]) and value.is_contiguous()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rms_norm(heads.detach().requires_grad_(), tensors[2], 1e-6)
    assert kept and set(kept) <= {heads.data_ptr(), tensors[2].data_ptr()}


def test_other_strides(device):
    x, residual, weight, eps, dy, ds = problem((4, 3, 2, 10), torch.float32, residual=True, device=device)
    expected = run(rms_norm, x, residual, weight, eps, dy, ds)

    def strided(t):
        return torch.stack([t, t], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)

    apart = [strided(t) for t in (x, residual)]
    every_second = torch.stack([weight, weight], 1)[:, 0]
    assert not any(t.is_contiguous() for t in (*apart, every_second))
    ours = run(rms_norm, *apart, every_second, eps, strided(dy), strided(ds))
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    leaf = x.clone().requires_grad_()
    (of_sum,) = torch.autograd.grad(rms_norm(leaf, weight, eps).sum(), leaf)  # dy has stride 0
    (of_ones,) = torch.autograd.grad(rms_norm(leaf, weight, eps), leaf, torch.ones_like(dy))
    assert torch.equal(of_sum, of_ones)


def test_backward_keeps_the_sum_and_the_weight_alone():
    x, residual, weight, eps, *_ = problem((5, 16), torch.float32, residual=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        _, s = rms_norm(x.requires_grad_(), weight, eps, residual)
    assert set(kept) == {s.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("outputs", [(0,), (1,)])
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_each_output_and_gradient_alone(outputs, wanted, device):
    x, residual, weight, eps, *grads = problem((6, 33), torch.float32, residual=True, device=device)

    def some(function):
        leaves = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate((x, residual))]
        y = function(leaves[0], weight, eps, leaves[1])
        return torch.autograd.grad(
            [y[i] for i in outputs], [leaves[i] for i in wanted], [grads[i] for i in outputs]
        )

    for ours, expected in zip(some(rms_norm), some(module.rms_norm_ref), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("D", [64, 1536])
def test_a_row_depends_on_no_other_row(D, device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("the CPU's reduction picks its order by the shape")
    tensors = problem((70, D), torch.float16, residual=True, device=device)
    together = run(rms_norm, *tensors)
    for rows in (slice(0, 1), slice(31, 34), slice(69, 70)):
        alone = run(rms_norm, *(t[rows] if torch.is_tensor(t) and t.ndim == 2 else t for t in tensors))
        assert all(torch.equal(alone[name], together[name][rows]) for name in NAMES)


@pytest.mark.parametrize("residual", [False, True])
def test_no_rows(residual, device):
    results = run(rms_norm, *problem((0, 24), torch.float32, residual=residual, device=device))
    assert all(t.shape == (0, 24) for t in results.values())


@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 20)])
def test_operators_pass_opcheck(shape, device):
    x, residual, weight, eps, dy, ds = problem(shape, torch.float32, residual=True, device=device)
    ops = torch.ops.nanogrpo
    torch.library.opcheck(ops.rms_norm, (x, None, weight, eps))
    torch.library.opcheck(ops.rms_norm, (x, residual, weight, eps))
    torch.library.opcheck(ops.rms_norm_bwd, (dy, None, x, weight, eps))
    torch.library.opcheck(ops.rms_norm_bwd, (dy, ds, x, weight, eps))


@pytest.mark.skipif(INTERPRET, reason="torch.compile does not trace the interpreter")
@pytest.mark.parametrize("residual", [False, True])
def test_compiles_to_one_graph(residual, device):
    tensors = problem((3, 5, 33), torch.float32, residual=residual, device=device)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    ours, expected = run(compiled, *tensors), run(rms_norm, *tensors)
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("D", [16, 128, 1536, 8192, 65536])
def test_kernels_compile_for_every_card(cc, D):
    x, residual, weight, eps, dy, ds = problem((3, D), torch.bfloat16, residual=True)

    def launch():
        for add in (None, residual):
            module._rms_norm_triton(x, add, weight, eps)
            module._rms_norm_bwd_triton(dy, None if add is None else ds, x, weight, eps)

    assert_compiles(launch, cc, ["_rms_norm_kernel", "_rms_norm_bwd_kernel"])


GOOD = {"x": torch.ones(2, 8), "weight": torch.ones(8), "eps": 1e-6}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.ones(())}, r"x has shape \(\), expected"),
        ({"x": torch.ones(2, 0), "weight": torch.ones(0)}, "D from 1 to 65536"),
        ({"x": torch.ones(1, 65537), "weight": torch.ones(65537)}, "D from 1 to 65536"),
        ({"x": torch.ones(2, 8).long()}, "x is torch.int64"),
        ({"weight": torch.ones(7)}, r"the weight is .* expected floating point \(8,\)"),
        ({"weight": torch.ones(8).long()}, "the weight is torch.int64"),
        ({"weight": torch.ones(8, device="meta")}, "on meta"),
        ({"weight": torch.ones(8, requires_grad=True)}, "expected a frozen one"),
        ({"residual": torch.ones(2, 7)}, r"the residual is .* expected torch.float32 \(2, 8\)"),
        ({"residual": torch.ones(2, 8).half()}, "the residual is torch.float16"),
    ],
)
def test_wrong_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**(GOOD | changes))
