"""RolloutBatch: packing, selection, padding, and its file."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.grpo import RolloutBatch
from nanogrpo.rollout import Completion


def make(seed, groups=3, size=2, longest=5):
    """A batch of random tokens, with the prompts and groups it was made from."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(50) for _ in range(rng.randint(1, 4))] for _ in range(groups)]
    answers = []
    for _ in prompts:
        lengths = [rng.randint(1, longest) for _ in range(size)]
        answers.append(
            [
                Completion(
                    [rng.randrange(50) for _ in range(n)],
                    [-rng.random() for _ in range(n)],
                    rng.choice(["stop", "length"]),
                    "",
                )
                for n in lengths
            ]
        )
    terms = torch.tensor([[rng.random(), rng.random()] for _ in range(groups * size)])
    batch = RolloutBatch.from_groups(prompts, answers, terms.sum(1), terms, torch.ones(2), 0.7)
    batch.per_token = {"returns": torch.rand(batch.input_ids.shape)}
    return batch, prompts, answers


def assert_same(a, b):
    ours, theirs = ({**vars(batch), **batch.per_token} for batch in (a, b))
    del ours["per_token"], theirs["per_token"]
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4))
def test_from_groups(seed, groups, size):
    batch, prompts, answers = make(seed, groups, size)
    flat = [(p, c) for p, cs in zip(prompts, answers, strict=True) for c in cs]
    assert len(batch) == groups * size
    assert batch.sequences() == [p + c.token_ids for p, c in flat]
    assert batch.completion_lengths().tolist() == [len(c.token_ids) for _, c in flat]
    assert batch.group_ids.tolist() == [g for g in range(groups) for _ in range(size)]
    assert batch.input_ids[batch.completion_mask].tolist() == [t for _, c in flat for t in c.token_ids]
    expected = torch.tensor([x for _, c in flat for x in c.logprobs])
    assert torch.equal(batch.sampler_logprobs[batch.completion_mask], expected)
    assert not batch.sampler_logprobs[~batch.completion_mask].any()
    assert batch.truncated.tolist() == [c.finish_reason == "length" for _, c in flat]
    assert not batch.advantages.any() and batch.temperature == 0.7


@given(st.integers(0, 10**6))
def test_padded(seed):
    batch, _, answers = make(seed)
    flat = [c for cs in answers for c in cs]
    mask, padded = batch.padded_mask(), batch.padded(batch.sampler_logprobs)
    assert mask.shape == padded.shape == (len(batch), max(len(c.token_ids) for c in flat))
    for row, selected, completion in zip(padded, mask, flat, strict=True):
        n = len(completion.token_ids)
        assert selected.tolist() == [True] * n + [False] * (mask.shape[1] - n)
        assert torch.equal(row[:n], torch.tensor(completion.logprobs))
        assert not row[n:].any()


def test_padded_is_differentiable():
    batch, _, _ = make(3)
    values = torch.randn(batch.input_ids.shape, requires_grad=True)
    weights = torch.randn(batch.padded_mask().shape)
    (batch.padded(values) * weights).sum().backward()
    assert torch.equal(values.grad[batch.completion_mask], weights[batch.padded_mask()])
    assert not values.grad[~batch.completion_mask].any()


@given(st.integers(0, 10**6), st.lists(st.integers(0, 5), max_size=8))
def test_select(seed, rows):
    batch, _, _ = make(seed)
    chosen = batch.select(rows)
    assert len(chosen) == len(rows)
    assert chosen.sequences() == [batch.sequences()[i] for i in rows]
    assert chosen.completion_lengths().tolist() == [batch.completion_lengths()[i].item() for i in rows]
    for name in ("rewards", "advantages", "group_ids", "truncated", "reward_terms"):
        assert torch.equal(getattr(chosen, name), getattr(batch, name)[rows])
    for place, i in enumerate(rows):
        assert_same(chosen.select([place]), batch.select([i]))


@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_cat_undoes_select(seed, cuts):
    batch, _, _ = make(seed, groups=4)
    borders = [0, *sorted(2 * c for c in cuts), len(batch)]
    parts = [batch.select(list(range(a, b))) for a, b in zip(borders, borders[1:], strict=False)]
    joined = RolloutBatch.cat(parts)
    # Group ids are renumbered, but equal ids stay equal and different ones different.
    same = lambda ids: ids[:, None] == ids[None, :]
    assert torch.equal(same(joined.group_ids), same(batch.group_ids))
    joined.group_ids = batch.group_ids
    assert_same(joined, batch)


def test_unpadded_undoes_padded():
    batch, _, _ = make(7)
    assert torch.equal(batch.unpadded(batch.padded(batch.sampler_logprobs)), batch.sampler_logprobs)


def test_select_nothing():
    empty = make(0)[0].select([])
    assert len(empty) == 0
    assert empty.padded_mask().shape == (0, 0)
    assert empty.padded(empty.sampler_logprobs).shape == (0, 0)


def test_select_everything_is_the_batch():
    batch, _, _ = make(4)
    assert_same(batch.select(list(range(len(batch)))), batch)


def test_file_round_trip(tmp_path):
    batch, _, _ = make(5)
    batch.save(tmp_path / "batch.safetensors")
    assert_same(RolloutBatch.load(tmp_path / "batch.safetensors"), batch)


def test_advantages_a_token_stand_beside_those_of_sequences(tmp_path):
    batch = make(3)[0]
    batch.per_token = {"advantages": torch.rand(batch.input_ids.shape)}
    batch.save(tmp_path / "batch")
    loaded = RolloutBatch.load(tmp_path / "batch")
    assert torch.equal(loaded.advantages, batch.advantages)
    assert torch.equal(loaded.per_token["advantages"], batch.per_token["advantages"])


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "batch.safetensors"
    make(6)[0].save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="batch.safetensors is no readable safetensors file"):
        RolloutBatch.load(path)


def test_file_of_something_else_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors holds \['weight'\], expected \['advantages'"):
        RolloutBatch.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b.cu_seqlens.add_(1), "cu_seqlens is .*, expected to rise from 0"),
        (lambda b: setattr(b, "completion_mask", b.completion_mask.long()), "completion_mask is torch.int64"),
        (lambda b: setattr(b, "rewards", b.rewards[1:]), "rewards is torch.float32 .*of length 6"),
        (lambda b: b.per_token.update(returns=torch.ones(2)), "returns is torch.float32 .2,."),
    ],
)
def test_a_batch_that_does_not_fit_together_is_named(tmp_path, change, message):
    batch, _, _ = make(8)
    change(batch)
    batch.save(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=f"odd.safetensors: {message}"):
        RolloutBatch.load(tmp_path / "odd.safetensors")
