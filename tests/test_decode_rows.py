"""The end of a decode step, against its specification, and the specification against plain Python."""

import os

import pytest
import torch
from cross_compile import assert_compiles, every_card
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels.decode_rows import _advance_triton, advance_rows, advance_rows_ref

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
VOCAB = 40


def inputs(batch, steps, seed, *, kept=True, step=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    integers = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)
    words = torch.stack([
        integers(0, VOCAB, batch), integers(0, 300, batch), integers(0, 5, batch), integers(0, 7, batch),
    ])  # fmt: skip
    logprobs, shares = -torch.rand(2, batch, generator=generator)
    state = words, integers(0, 300, batch).int(), torch.rand(steps, 3, batch, generator=generator).double()
    tensors = [
        integers(0, VOCAB, batch), logprobs, shares if kept else None,
        torch.rand(VOCAB, generator=generator) < 0.3, *state, torch.tensor([step]),
    ]  # fmt: skip
    return [x if x is None else x.to(device) for x in tensors]


def copies(tensors):
    return [x if x is None else x.clone() for x in tensors]


def assert_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))


rows = st.integers(0, 5) | st.sampled_from([255, 256, 257, 600])


@given(rows, st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_matches_reference(batch, steps, kept, seed):
    ours = inputs(batch, steps, seed, kept=kept, step=seed % (steps + 1))
    expected = copies(ours)
    advance_rows(*ours)
    advance_rows_ref(*expected)
    assert_equal(ours, expected)


@given(st.integers(1, 6), st.integers(0, 2**31))
def test_reference_is_what_it_says(batch, seed):
    drawn, logprobs, kept, stops, words, lens, record, step = given = inputs(batch, 3, seed, step=1)
    before = copies(given)
    advance_rows_ref(*given)
    for b in range(batch):
        token, position, count, limit = before[4][:, b].tolist()
        new, alive = int(drawn[b]), count < limit
        limit = 0 if stops[new] else limit
        if alive:
            token, position, count = new, position + 1, count + 1
        assert words[:, b].tolist() == [token, position, count, limit]
        assert int(lens[b]) == (position + 1 if count < limit else 0)
        assert record[1, :, b].tolist() == [new, float(logprobs[b]), float(kept[b])]
    assert torch.equal(record[[0, 2]], before[6][[0, 2]]) and step.tolist() == [2]


@pytest.mark.gpu
def test_gpu_matches_reference():
    for batch, kept in ((1, True), (8, False), (257, True)):
        ours = inputs(batch, 4, batch, kept=kept, step=2, device="cuda")
        expected = copies(ours)
        advance_rows(*ours)
        advance_rows_ref(*expected)
        assert_equal(ours, expected)


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, torch.zeros(3, dtype=torch.int32), "drawn is torch.int32"),
        (1, torch.zeros(4), r"logprobs is torch.float32 \(4,\)"),
        (2, torch.zeros(2), "kept"),
        (3, torch.zeros(9), "stops is torch.float32"),
        (4, torch.zeros(3, 4, dtype=torch.int64), r"words is .* expected torch.int64 \(4, 3\)"),
        (4, torch.zeros(3, 4, dtype=torch.int64).T, "contiguous"),
        (5, torch.zeros(3, dtype=torch.int64), "context_lens"),
        (6, torch.zeros(2, 3, 3), "record"),
        (7, torch.zeros(2, dtype=torch.int64), "step"),
    ],
)
def test_wrong_input_raises(index, value, message):
    good = inputs(3, 2, 0)
    good[index] = value
    with pytest.raises(ValueError, match=message):
        advance_rows(*good)


def test_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.nanogrpo.advance_rows, tuple(inputs(3, 2, 0)))


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
def test_kernel_compiles_for_every_card(cc):
    assert_compiles(
        lambda: [_advance_triton(*inputs(8, 4, 0, kept=kept)) for kept in (True, False)],
        cc,
        ["_advance_kernel"],
    )
