"""Advantages: golden values, the formulas written out in Python, symmetries, exact zeros, bad input."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.grpo.advantages import ESTIMATORS, group_advantages, group_has_signal

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
REWARDS = torch.tensor([1, 0, 0.5, 2, 1, 1, 1, 1, 0, 0, 3, 0], dtype=torch.float64)
GROUPS = torch.arange(3).repeat_interleave(4)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


@st.composite
def batches(draw, dtype=torch.float64):
    """Rewards in quarters, so that ties are common, and group ids far apart, negative and interleaved."""
    sizes = draw(st.lists(st.integers(2, 6), min_size=1, max_size=6))
    ids = draw(st.lists(st.integers(-(2**62), 2**62), min_size=len(sizes), max_size=len(sizes), unique=True))
    group_ids = torch.tensor([i for i, size in zip(ids, sizes, strict=True) for _ in range(size)])
    rewards = draw(st.lists(st.integers(-8, 8), min_size=len(group_ids), max_size=len(group_ids)))
    order = torch.tensor(draw(st.permutations(range(len(group_ids)))))
    return torch.tensor(rewards, dtype=dtype)[order] / 4, group_ids[order]


def by_hand(rewards, group_ids, estimator, eps):
    """One row at a time with the standard library."""
    advantages = []
    for reward, group in zip(rewards.tolist(), group_ids.tolist(), strict=True):
        members = [r for r, g in zip(rewards.tolist(), group_ids.tolist(), strict=True) if g == group]
        if max(members) == min(members):
            advantages.append(0.0)
        elif estimator == "grpo":
            advantages.append((reward - statistics.fmean(members)) / (statistics.stdev(members) + eps))
        elif estimator == "dr_grpo":
            advantages.append(reward - statistics.fmean(members))
        else:
            advantages.append(reward - (sum(members) - reward) / (len(members) - 1))
    return torch.tensor(advantages, dtype=torch.float64)


def close(got, expected, atol):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name, estimator, eps, rows, atol",
    [
        ("advantages/grpo/eps=1e-4", "grpo", 1e-4, 4, 1e-9),  # printed with nine digits
        ("advantages/grpo/eps=1e-6", "grpo", 1e-6, 12, 1e-6),  # printed with six, from float32
        ("advantages/dr_grpo", "dr_grpo", 1e-4, 12, 1e-6),
        ("advantages/rloo", "rloo", 1e-4, 12, 1e-6),
    ],
)
def test_golden(name, estimator, eps, rows, atol):
    close(group_advantages(REWARDS[:rows], GROUPS[:rows], estimator, eps), GOLDEN[name], atol)


@every_estimator
@given(batch=batches(), eps=st.sampled_from([0.0, 1e-6, 1e-4, 0.1]))
def test_equals_the_formula(estimator, batch, eps):
    close(group_advantages(*batch, estimator, eps), by_hand(*batch, estimator, eps), 1e-12)


@every_estimator
@given(batch=batches(), shift=st.integers(-1000, 1000), factor=st.sampled_from([0.25, 3.0, 1e4]))
def test_shift_and_scale(estimator, batch, shift, factor):
    """A constant added to the rewards changes nothing; a factor passes through, or cancels against the std."""
    rewards, group_ids = batch
    advantages = group_advantages(rewards, group_ids, estimator, eps=0.0)
    close(group_advantages(rewards + shift, group_ids, estimator, eps=0.0), advantages, 1e-10)
    scaled = advantages if estimator == "grpo" else advantages * factor
    close(group_advantages(rewards * factor, group_ids, estimator, eps=0.0), scaled, 1e-12 * factor)


@every_estimator
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_row_order_and_group_names_do_not_matter(estimator, batch, seed):
    rewards, group_ids = batch
    advantages = group_advantages(rewards, group_ids, estimator)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    close(group_advantages(rewards[order], group_ids[order], estimator), advantages[order], 1e-13)
    renamed = order[group_ids.unique(return_inverse=True)[1]]  # distinct new names, in another order
    close(group_advantages(rewards, renamed, estimator), advantages, 0)


@every_estimator
@given(batch=batches())
def test_each_group_stands_alone_and_sums_to_zero(estimator, batch):
    rewards, group_ids = batch
    advantages = group_advantages(rewards, group_ids, estimator)
    for group in group_ids.unique():
        rows = group_ids == group
        close(group_advantages(rewards[rows], group_ids[rows], estimator), advantages[rows], 1e-13)
        close(advantages[rows].sum(), 0.0, 1e-12)


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(estimator, dtype):
    """Eight float32 rewards of 0.95 have mean error 6e-8 and std 6e-8: dividing would give up to 0.9."""
    for reward in (0.95, 0.1, -1 / 3, 0.0, 3e4):
        rewards = torch.full((8,), reward, dtype=dtype)
        group_ids = torch.zeros(8, dtype=torch.int64)
        assert (group_advantages(rewards, group_ids, estimator, eps=0.0) == 0).all()
        assert not group_has_signal(rewards, group_ids).any()
        rewards[3] = -1
        assert group_has_signal(rewards, group_ids).all()


@given(batch=batches())
def test_signal_is_two_different_rewards(batch):
    rewards, group_ids = batch
    expected = [len(set(rewards[group_ids == group].tolist())) > 1 for group in group_ids]
    assert group_has_signal(rewards, group_ids).tolist() == expected
    assert (group_advantages(rewards, group_ids) == 0)[~torch.tensor(expected)].all()


def test_signal_sees_the_last_bit_and_allows_a_group_of_one():
    rewards = torch.tensor([0.95, 0.95, 0.95, 1.0])
    rewards[1] = torch.nextafter(rewards[0], torch.tensor(1.0))
    assert group_has_signal(rewards, torch.tensor([5, 5, 7, 8])).tolist() == [True, True, False, False]


@every_estimator
def test_dtypes_precision_and_gradient(estimator):
    """Half and single precision come back as float32 with one rounding; large offsets lose nothing."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0], requires_grad=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        advantages = group_advantages(rewards.to(dtype), GROUPS[:4], estimator)
        assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not advantages.requires_grad
        close(advantages, by_hand(rewards, GROUPS[:4], estimator, 1e-4), 2.0**-23)
    far = group_advantages(rewards + 2.0**20, GROUPS[:4], estimator)
    close(far, group_advantages(rewards, GROUPS[:4], estimator), 2.0**-23)


def test_empty_batch():
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert group_advantages(*empty).shape == group_has_signal(*empty).shape == (0,)


@pytest.mark.gpu
@every_estimator
def test_cuda_equals_cpu_and_repeats(estimator):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(4096, generator=generator)
    group_ids = torch.arange(4096) % 512
    on_gpu = group_advantages(rewards.cuda(), group_ids.cuda(), estimator)
    assert torch.equal(on_gpu, group_advantages(rewards.cuda(), group_ids.cuda(), estimator))
    close(on_gpu.cpu(), group_advantages(rewards, group_ids, estimator), 2.0**-21)  # one float32 ulp below 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"group_ids": torch.tensor([4, 4, 9, 4])}, r"group 9: got 1 completion, expected at least 2"),
        (
            {"rewards": torch.tensor([1.0, 2.0, float("nan"), 0.0])},
            r"rewards\[2\]: got nan, expected a finite",
        ),
        ({"rewards": torch.tensor([1.0, float("-inf"), 0.0, 0.0])}, r"rewards\[1\]: got -inf"),
        ({"rewards": torch.zeros(2, 2)}, r"rewards: got shape \(2, 2\), expected \(B,\)"),
        ({"rewards": torch.zeros(3)}, "got 3 rewards and 4 group_ids"),
        (
            {"rewards": torch.zeros(4, dtype=torch.int64)},
            r"rewards: got torch.int64, expected a floating dtype",
        ),
        ({"rewards": [1.0, 0.0, 0.0, 1.0]}, "rewards: got list, expected a tensor"),
        ({"group_ids": torch.zeros(4)}, r"group_ids: got torch.float32, expected torch.int64"),
        ({"estimator": "dr_gpro"}, r"got 'dr_gpro', nearest is 'dr_grpo'"),
        ({"estimator": "rlo"}, r"nearest is 'rloo'"),
        ({"eps": -1e-4}, r"eps: got -0.0001, expected >= 0"),
        ({"eps": float("nan")}, r"eps: got nan"),
    ],
)
def test_bad_input(change, message):
    good = {"rewards": torch.tensor([1.0, 0.0, 0.5, 2.0]), "group_ids": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        group_advantages(**(good | change))
