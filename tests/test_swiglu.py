"""SwiGLU: values, the gradient, what it keeps, and what it refuses."""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from cross_compile import assert_compiles, every_card
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import swiglu
from numerics import EPS, assert_no_worse_than

module = importlib.import_module("nanogrpo.kernels.swiglu")  # the package exports its function
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])
# One rounding of the output; in float32 exp(-gate) also carries the rounding of its argument, up to 2^3 here.
FLOOR = {dtype: EPS[dtype] for dtype in DTYPES} | {torch.float32: 4 * EPS[torch.float32]}


def problem(shape, dtype, *, device="cpu", seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    gate_up = scale * torch.randn(shape, generator=generator)
    dy = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator)
    return gate_up.to(device, dtype), dy.to(device, dtype)


def run(function, gate_up, dy):
    leaf = gate_up.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), *torch.autograd.grad(y, leaf, dy)


def assert_correct(gate_up, dy):
    ours, plain = run(swiglu, gate_up, dy), run(module.swiglu_ref, gate_up, dy)
    exact = run(module.swiglu_ref, gate_up.double(), dy.double())
    for name, value, *others in zip(("y", "gradient"), ours, plain, exact, strict=True):
        assert value.dtype == gate_up.dtype and value.is_contiguous(), name
        assert_no_worse_than(value, *others, floor=FLOOR[value.dtype], name=name)


@given(
    st.sampled_from([(), (1,), (7,), (2, 3), (33,)]),
    st.sampled_from([1, 5, 64, 1023, 1024, 1500]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.1, 2.0]),
    st.integers(0, 2**31),
)
def test_values_and_gradient_match_reference(rows, columns, dtype, scale, seed):
    assert_correct(*problem((*rows, 2 * columns), dtype, scale=scale, seed=seed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 74), (65, 17920), (5, 3, 3072)])
def test_gpu_shapes(shape, dtype):
    assert_correct(*problem(shape, dtype, device="cuda"))


def test_large_gates_overflow_nothing(device):
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30])
    gate_up, dy = torch.cat([gate, torch.full((7,), 0.5)])[None].to(device), torch.ones(1, 7, device=device)
    for ours, expected in zip(
        run(swiglu, gate_up, dy), run(module.swiglu_ref, gate_up.double(), dy), strict=True
    ):
        torch.testing.assert_close(ours, expected.float(), rtol=1e-6, atol=1e-30)


@pytest.mark.skipif(INTERPRET, reason="the kernels have an exponential of their own")
def test_cpu_values_are_those_of_the_unfused_code():
    gate_up, _ = problem((9, 64), torch.float32)
    gate, up = gate_up.chunk(2, -1)
    assert torch.equal(swiglu(gate_up), F.silu(gate) * up)


def test_one_rounding_is_closer_than_two(device):
    gate_up, _ = problem((50, 512), torch.float16, device=device)
    gate, up = gate_up.chunk(2, -1)
    exact = module.swiglu_ref(gate_up.double())
    ours, two = ((y.double() - exact).abs().mean() for y in (swiglu(gate_up), F.silu(gate) * up))
    assert ours < 0.9 * two


@pytest.mark.skipif(INTERPRET, reason="the kernels compute in float32")
def test_gradcheck_in_float64():
    gate_up, _ = problem((3, 10), torch.float64)
    assert torch.autograd.gradcheck(swiglu, gate_up.requires_grad_())


def test_strides(device):
    gate_up, dy = problem((6, 20), torch.float32, device=device)
    expected = run(swiglu, gate_up, dy)
    padded = torch.cat([gate_up, gate_up], 1)[:, :20], torch.cat([dy, dy], 1)[:, :10]
    turned = gate_up.T.contiguous().T, dy.T.contiguous().T
    for tensors in (padded, turned):
        assert not any(t.is_contiguous() for t in tensors)
        for ours, theirs in zip(run(swiglu, *tensors), expected, strict=True):
            assert ours.is_contiguous()
            torch.testing.assert_close(
                ours, theirs, rtol=0, atol=2e-6
            )  # the CPU's exponential is another if strided
    leaf = gate_up.clone().requires_grad_()
    (of_sum,) = torch.autograd.grad(swiglu(leaf).sum(), leaf)  # dy has stride 0
    torch.testing.assert_close(of_sum, run(swiglu, gate_up, torch.ones_like(dy))[1], rtol=0, atol=2e-6)


def test_backward_keeps_its_input_alone():
    gate_up, _ = problem((5, 16), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate_up.requires_grad_())
    assert kept == [gate_up.data_ptr()]


def test_a_row_depends_on_no_other_row(device):
    gate_up, dy = problem((40, 96), torch.float16, device=device)
    together = run(swiglu, gate_up, dy)
    for part in (slice(0, 1), slice(17, 20)):
        alone = run(swiglu, gate_up[part], dy[part])
        assert all(torch.equal(p, r[part]) for p, r in zip(alone, together, strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape, device):
    y, gradient = run(swiglu, *problem(shape, torch.float32, device=device))
    assert y.shape == (*shape[:-1], 4) and gradient.shape == shape


def test_operators_pass_opcheck(device):
    gate_up, dy = problem((5, 12), torch.float32, device=device)
    torch.library.opcheck(torch.ops.nanogrpo.swiglu, (gate_up.T.contiguous().T,))
    torch.library.opcheck(torch.ops.nanogrpo.swiglu_bwd, (dy, gate_up))


@pytest.mark.skipif(INTERPRET, reason="torch.compile does not trace the interpreter")
def test_compiles_to_one_graph(device):
    tensors = problem((3, 5, 14), torch.float32, device=device)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(p, r) for p, r in zip(run(compiled, *tensors), run(swiglu, *tensors), strict=True))


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compile_for_every_card(cc, dtype):
    gate_up, dy = problem((3, 3072), dtype)

    def launch():
        module._swiglu_triton(gate_up)
        module._swiglu_bwd_triton(dy, gate_up)

    assert_compiles(launch, cc, ["_swiglu_kernel", "_swiglu_bwd_kernel"])


@pytest.mark.parametrize(
    "gate_up, message",
    [
        (torch.ones(2, 7), r"gate_up has shape \(2, 7\), expected \(..., 2F\)"),
        (torch.ones(2, 0), "gate_up has shape"),
        (torch.ones(()), "gate_up has shape"),
        (torch.ones(2, 8).long(), "gate_up is torch.int64"),
        (torch.ones(2, 8, device="meta").double(), "gate_up is torch.float64 on meta"),
    ],
)
def test_wrong_input_raises(gate_up, message):
    with pytest.raises(ValueError, match=message):
        swiglu(gate_up)
