"""Rotary embedding: values, gradients, parts of a stacked projection, and what it refuses."""

import importlib
import os

import pytest
import torch
from cross_compile import assert_compiles, every_card
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import rotary
from numerics import EPS, assert_no_worse_than

module = importlib.import_module("nanogrpo.kernels.rotary")  # the package exports its function
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])
NAMES = ("q", "k", "dq", "dk")


def problem(T, H, KVH, D, dtype, *, device="cpu", seed=0):
    """q, k, cos, sin and the gradients of both outputs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    angles = (6.3 * torch.rand(T, D // 2, generator=generator)).to(device)
    shapes = (T, H, D), (T, KVH, D)
    return *(draw(*s) for s in shapes), angles.cos(), angles.sin(), *(draw(*s) for s in shapes)


def run(function, q, k, cos, sin, dq, dk):
    q, k = (t.detach().requires_grad_() for t in (q, k))
    out = function(q, k, cos, sin)
    return [*(t.detach() for t in out), *torch.autograd.grad(out, [q, k], [dq, dk])]


def assert_correct(tensors):
    ours, plain = run(rotary, *tensors), run(module.rotary_ref, *tensors)
    exact = run(module.rotary_ref, *(t.double() for t in tensors))
    for name, value, *others in zip(NAMES, ours, plain, exact, strict=True):
        assert value.dtype == tensors[0].dtype and value.is_contiguous(), name
        assert_no_worse_than(value, *others, floor=EPS[value.dtype], name=name)  # one rounding of the output


@given(
    st.sampled_from([1, 5, 33]),
    st.sampled_from([(1, 1), (3, 1), (12, 2), (2, 5), (17, 17)]),
    st.sampled_from([2, 6, 32, 80, 128]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_values_and_gradients_match_reference(T, heads, D, dtype, seed):
    assert_correct(problem(T, *heads, D, dtype, seed=seed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (300, 12, 2, 128), (65, 32, 8, 64), (9, 9, 3, 96), (5, 40, 40, 256)]
)
def test_gpu_shapes(shape, dtype):
    assert_correct(problem(*shape, dtype, device="cuda"))


def test_inverse_undoes_the_rotation(device):
    q, k, cos, sin, *_ = problem(7, 3, 2, 16, torch.float32, device=device)
    there = rotary(q, k, cos, sin)
    back = rotary(*there, cos, -sin)
    for ours, expected in zip(back, (q, k), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    for ours, expected in zip(there, (q, k), strict=True):
        torch.testing.assert_close(ours.norm(dim=-1), expected.norm(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.skipif(INTERPRET, reason="the kernels compute in float32")
def test_gradcheck_in_float64():
    q, k, cos, sin, *_ = problem(3, 2, 1, 6, torch.float64)
    cos, sin = cos.float(), sin.float()
    assert torch.autograd.gradcheck(
        lambda q, k: rotary(q, k, cos, sin), (q.requires_grad_(), k.requires_grad_())
    )


def test_parts_of_a_stacked_projection_are_read_in_place(device):
    T, H, KVH, D = 6, 3, 2, 32
    q, k, cos, sin, dq, dk = problem(T, H, KVH, D, torch.float32, device=device)
    stacked = torch.cat([q, k, k], 1)
    parts, grads = stacked.split([H, KVH, KVH], 1), torch.cat([dq, dk], 1).split([H, KVH], 1)
    assert not parts[0].is_contiguous() and not grads[1].is_contiguous()
    expected = run(rotary, q, k, cos, sin, dq, dk)
    wide = torch.cat([cos, sin], 1)
    ours = run(rotary, *parts[:2], *wide.chunk(2, 1), *grads)
    assert all(torch.equal(p, r) and p.is_contiguous() for p, r in zip(ours, expected, strict=True))
    turned = [t.mT.contiguous().mT for t in (q, k, dq, dk)]
    ours = run(rotary, *turned[:2], cos.T.contiguous().T, sin.T.contiguous().T, *turned[2:])
    assert all(torch.equal(p, r) for p, r in zip(ours, expected, strict=True))


@pytest.mark.parametrize("wanted", [0, 1])
def test_each_output_and_gradient_alone(wanted, device):
    q, k, cos, sin, *grads = problem(5, 3, 2, 16, torch.float32, device=device)
    expected = run(rotary, q, k, cos, sin, *grads)[2 + wanted]
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate((q, k))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = rotary(*leaves, cos, sin)
    assert set(kept) == {cos.data_ptr(), sin.data_ptr()}
    (grad,) = torch.autograd.grad(out[wanted], leaves[wanted], grads[wanted])
    assert torch.equal(grad, expected)


def test_a_token_depends_on_no_other_token(device):
    tensors = problem(40, 3, 2, 32, torch.float16, device=device)
    together = run(rotary, *tensors)
    for part in (slice(0, 1), slice(17, 20)):
        alone = run(rotary, *(t[part] for t in tensors))
        assert all(torch.equal(p, r[part]) for p, r in zip(alone, together, strict=True))


def test_no_tokens(device):
    results = run(rotary, *problem(0, 3, 2, 8, torch.float32, device=device))
    assert [t.shape for t in results] == [(0, 3, 8), (0, 2, 8)] * 2


def test_operator_passes_opcheck(device):
    q, k, cos, sin, *_ = problem(5, 3, 2, 8, torch.float32, device=device)
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.nanogrpo.rotary, (q.mT.contiguous().mT, k, cos, sin, inverse))


@pytest.mark.skipif(INTERPRET, reason="torch.compile does not trace the interpreter")
def test_compiles_to_one_graph(device):
    tensors = problem(5, 3, 2, 8, torch.float32, device=device)
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    ours, expected = run(compiled, *tensors), run(rotary, *tensors)
    assert all(torch.equal(p, r) for p, r in zip(ours, expected, strict=True))


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("H, KVH, D", [(1, 1, 8), (12, 2, 128), (32, 32, 256)])
def test_kernel_compiles_for_every_card(cc, H, KVH, D):
    q, k, cos, sin, *_ = problem(3, H, KVH, D, torch.bfloat16)

    def launch():
        module._rotary_triton(q, k, cos, sin, False)
        module._rotary_triton(q, k, cos, sin, True)

    assert_compiles(launch, cc, ["_rotary_kernel"])


GOOD = {"q": torch.ones(2, 3, 8), "k": torch.ones(2, 1, 8), "cos": torch.ones(2, 4), "sin": torch.ones(2, 4)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": torch.ones(2, 3, 7)}, r"q has shape \(2, 3, 7\), expected \(T, H, D\) with an even D"),
        ({"q": torch.ones(2, 24)}, "q has shape"),
        ({"q": torch.ones(2, 0, 8)}, "q has shape"),
        ({"q": torch.ones(2, 3, 8).long()}, "q is torch.int64"),
        ({"k": torch.ones(3, 1, 8)}, r"k is .* expected torch.float32 \(2, KVH, 8\)"),
        ({"k": torch.ones(2, 1, 6)}, "k is"),
        ({"k": torch.ones(2, 0, 8)}, "k is"),
        ({"k": torch.ones(2, 1, 8).half()}, "k is torch.float16"),
        ({"cos": torch.ones(2, 1, 4)}, r"cos is .* expected torch.float32 \(2, 4\)"),
        ({"sin": torch.ones(2, 4).double()}, "sin is torch.float64"),
        ({"sin": torch.ones(2, 4, device="meta")}, "on meta"),
        ({"sin": torch.ones(2, 4, requires_grad=True)}, "requires_grad True"),
    ],
)
def test_wrong_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        rotary(**(GOOD | changes))
