"""What a forward pass begins with, against torch's own lookup, cosine and sine: equal to the bit."""

import os

import pytest
import torch
from cross_compile import assert_compiles, every_card, recorded_launches
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import embed
from nanogrpo.kernels import embedding as module
from nanogrpo.kernels.embedding import embed_ref
from numerics import assert_no_worse_than

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(T, V, D, D2, dtype=torch.float32, *, device="cpu", longest=40_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (T,), generator=generator)
    positions = torch.randint(longest, (T,), generator=generator)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    inv_freq = 10_000.0 ** -(torch.arange(D2).double() / D2).float()
    return [t.to(device) for t in (ids, positions, weight, inv_freq)]


@given(
    st.integers(0, 9), st.integers(1, 40), st.integers(1, 1100), st.integers(1, 70), st.sampled_from(DTYPES)
)
def test_agrees_with_torch(T, V, D, D2, dtype):
    operands = problem(T, V, D, D2, dtype)
    check(embed(*operands), operands, same_angles=not INTERPRET)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, V, D, D2", [(1, 3, 5, 3), (8, 151_936, 1536, 64), (300, 4099, 2049, 33)])
def test_agrees_with_torch_on_the_gpu(T, V, D, D2, dtype):
    operands = problem(T, V, D, D2, dtype, device="cuda")
    check(embed(*operands), operands, same_angles=True)


@pytest.mark.gpu
def test_every_angle_has_torchs_bits_on_the_gpu():
    _, _, weight, inv_freq = problem(1, 8, 16, 64, device="cuda")
    positions = torch.arange(131_072, device="cuda")
    operands = torch.zeros_like(positions), positions, weight, inv_freq
    check(embed(*operands), operands, same_angles=True)


def check(found, operands, *, same_angles):
    """Equal to the reference; angles, where the interpreter's numpy makes them, as near the truth as torch's."""
    expected, (_, positions, _, inv_freq) = embed_ref(*operands), operands
    assert torch.equal(found[0], expected[0]) and found[0].dtype == expected[0].dtype
    angles = (positions[:, None].float() * inv_freq).double()
    for ours, plain, truth in zip(found[1:], expected[1:], (angles.cos(), angles.sin()), strict=True):
        assert ours.dtype == torch.float32
        if same_angles:
            assert torch.equal(ours, plain)
        assert_no_worse_than(ours, plain, truth, floor=2.0**-23)


def test_strides(device):
    ids, positions, weight, inv_freq = problem(6, 9, 20, 4, device=device)
    expected = embed(ids, positions, weight, inv_freq)
    twice = lambda t: t.repeat_interleave(2)[::2]
    found = embed(twice(ids), twice(positions), weight.T.contiguous().T, twice(inv_freq))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_an_unknown_token(device):
    ids, positions, weight, inv_freq = problem(4, 9, 20, 4, device=device)
    expected = embed(ids, positions, weight, inv_freq)[0]
    ids[1], ids[3] = 9, -1
    if device.type == "cpu" and not INTERPRET:
        with pytest.raises(IndexError):
            embed(ids, positions, weight, inv_freq)
        return
    found = embed(ids, positions, weight, inv_freq)[0]
    assert found[1].isnan().all() and found[3].isnan().all()
    assert torch.equal(found[::2], expected[::2])


def test_operator_passes_opcheck(device):
    torch.library.opcheck(torch.ops.nanogrpo.embed, problem(5, 7, 12, 4, device=device))


@pytest.mark.skipif(INTERPRET, reason="torch.compile does not trace the interpreter")
def test_compiles_to_one_graph(device):
    operands = problem(5, 7, 12, 4, device=device)
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*operands), embed(*operands), strict=True))


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
def test_kernel_compiles_for_every_card(cc):
    operands = problem(3, 50, 1536, 64, torch.bfloat16)
    assert_compiles(lambda: module._embed_triton(*operands), cc, ["_embed_kernel"])


@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
def test_the_launch_waits_for_all_before_it():
    """What attention is told of a forward pass (``settled``): this is launched without programmatic dependence."""
    with recorded_launches(90) as launches:
        module._embed_triton(*problem(3, 50, 1536, 64, torch.bfloat16))
    ((_, kernel),) = launches
    assert not kernel.metadata.launch_pdl
    assert "griddepcontrol.launch_dependents" in kernel.asm["ptx"]
    assert "griddepcontrol.wait" not in kernel.asm["ptx"]


GOOD = dict(zip(("ids", "positions", "weight", "inv_freq"), problem(2, 5, 8, 3), strict=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"ids": torch.zeros(2, 1, dtype=torch.int64)},
            r"ids is torch.int64 \(2, 1\) .* torch.int64 \(2,\)",
        ),
        ({"ids": torch.zeros(2, dtype=torch.int32)}, "ids is torch.int32"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions is"),
        ({"positions": torch.zeros(2)}, "positions is torch.float32"),
        ({"weight": torch.zeros(5, 8, 1)}, r"weight has shape \(5, 8, 1\)"),
        ({"weight": torch.zeros(5)}, r"weight has shape \(5,\)"),
        ({"weight": torch.zeros(5, 8, requires_grad=True)}, "requires_grad True"),
        ({"weight": torch.zeros(5, 8, dtype=torch.int64)}, "weight is torch.int64"),
        ({"inv_freq": torch.zeros(3).double()}, "inv_freq is torch.float64"),
        ({"inv_freq": torch.zeros(3, device="meta")}, "on meta"),
    ],
)
def test_wrong_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        embed(**(GOOD | changes))
