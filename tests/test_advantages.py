"""Advantages: golden values, the formulas written out in Python, symmetries, exact zeros, bad input."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.grpo.advantages import (
    ESTIMATORS,
    gae_advantages,
    group_advantages,
    group_has_signal,
    multi_reward_advantages,
    whiten,
)

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
REWARDS = torch.tensor([1, 0, 0.5, 2, 1, 1, 1, 1, 0, 0, 3, 0], dtype=torch.float64)
GROUPS = torch.arange(3).repeat_interleave(4)
LENGTHS = torch.full((12,), 5)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
# Those whose groups do not look at each other, and whose advantages sum to 0 in each.
own_group = pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])


@st.composite
def batches(draw, dtype=torch.float64):
    """Rewards in quarters, so that ties are common, and group ids far apart, negative and interleaved."""
    sizes = draw(st.lists(st.integers(2, 6), min_size=1, max_size=6))
    ids = draw(st.lists(st.integers(-(2**62), 2**62), min_size=len(sizes), max_size=len(sizes), unique=True))
    group_ids = torch.tensor([i for i, size in zip(ids, sizes, strict=True) for _ in range(size)])
    rewards = draw(st.lists(st.integers(-8, 8), min_size=len(group_ids), max_size=len(group_ids)))
    order = torch.tensor(draw(st.permutations(range(len(group_ids)))))
    return torch.tensor(rewards, dtype=dtype)[order] / 4, group_ids[order]


def by_hand(rewards, group_ids, estimator, eps, lengths=None, inside=None):
    """One row at a time with the standard library."""
    rewards, group_ids = rewards.tolist(), group_ids.tolist()
    lengths = [1] * len(rewards) if lengths is None else lengths.tolist()
    inside = [True] * len(rewards) if inside is None else inside.tolist()
    batch = [r for r, keep in zip(rewards, inside, strict=True) if keep]
    advantages = []
    for i, (reward, group) in enumerate(zip(rewards, group_ids, strict=True)):
        rows = [j for j, g in enumerate(group_ids) if g == group and inside[j]]
        if estimator == "reinforce_pp":
            rows = [j for j in range(len(rewards)) if inside[j]]
        members = [rewards[j] for j in rows]
        if len(members) < 2 or max(members) == min(members):
            advantages.append(0.0)
            continue
        centred, ordered = reward - statistics.fmean(members), sorted(members)
        if estimator == "grpo":
            centred /= statistics.stdev(members) + eps
        elif estimator == "batch":
            centred /= statistics.stdev(batch) + eps
        elif estimator == "rloo" and inside[i]:
            centred = reward - (sum(members) - reward) / (len(members) - 1)
        elif estimator == "opo":
            tokens = sum(lengths[j] for j in rows)
            centred = reward - sum(lengths[j] * rewards[j] for j in rows) / tokens
        elif estimator == "gpg":
            centred *= len(batch) / sum(r != 0 for r in batch)
        elif estimator == "passk":
            centred = (ordered[-1] - ordered[-2]) * (reward == ordered[-1] and inside[i])
        elif estimator == "reinforce_pp":
            centred = reward
        advantages.append(centred)
    if "reinforce_pp" in estimator and len(batch) > 1:
        tokens = [a for a, n, keep in zip(advantages, lengths, inside, strict=True) if keep for _ in range(n)]
        mean, deviation = statistics.fmean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
        signal = group_has_signal(
            torch.tensor(rewards), torch.tensor(group_ids), in_baseline=torch.tensor(inside)
        ).tolist()
        everywhere = estimator == "reinforce_pp" and max(batch) > min(batch)
        advantages = [
            (a - mean) / deviation * (everywhere or s) for a, s in zip(advantages, signal, strict=True)
        ]
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
        ("advantages/gpg", "gpg", 1e-4, 12, 1e-6),
        ("advantages/passk", "passk", 1e-4, 12, 1e-6),
        ("advantages/reinforce_pp_baseline", "reinforce_pp_baseline", 1e-4, 12, 1e-6),
    ],
)
def test_golden(name, estimator, eps, rows, atol):
    lengths = LENGTHS[:rows]
    close(
        group_advantages(REWARDS[:rows], GROUPS[:rows], estimator, eps, lengths=lengths), GOLDEN[name], atol
    )


@every_estimator
@given(
    batch=batches(), eps=st.sampled_from([0.0, 1e-6, 1e-4, 0.1]), seed=st.integers(0, 2**31), data=st.data()
)
def test_equals_the_formula(estimator, batch, eps, seed, data):
    """With and without lengths, with and without rows that are not in the baseline."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (len(batch[0]),), generator=generator)
    lengths = lengths if estimator == "opo" or data.draw(st.booleans()) else None
    inside = torch.rand(len(batch[0]), generator=generator) < 0.8 if data.draw(st.booleans()) else None
    if estimator == "gpg" and not batch[0][slice(None) if inside is None else inside].any():
        return
    got = group_advantages(*batch, estimator, eps, lengths=lengths, in_baseline=inside)
    close(got, by_hand(*batch, estimator, eps, lengths, inside), 1e-12)


@every_estimator
@given(batch=batches(), shift=st.integers(-1000, 1000), factor=st.sampled_from([0.25, 3.0, 1e4]))
def test_shift_and_scale(estimator, batch, shift, factor):
    """A constant added to the rewards changes nothing (gpg counts zeros); a factor passes through or cancels."""
    rewards, group_ids = batch
    lengths = torch.arange(len(rewards)) % 5 + 1
    estimate = lambda values: group_advantages(values, group_ids, estimator, eps=0.0, lengths=lengths)
    advantages = estimate(rewards)
    if estimator != "gpg":
        close(estimate(rewards + shift), advantages, 1e-10)
    cancels = estimator in ("grpo", "batch") or "reinforce_pp" in estimator
    # whitening has 1e-8 beside a variance of 0.004 or more
    close(
        estimate(rewards * factor),
        advantages * (1 if cancels else factor),
        1e-4 if "_pp" in estimator else 1e-8,
    )


@every_estimator
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_row_order_and_group_names_do_not_matter(estimator, batch, seed):
    rewards, group_ids = batch
    lengths = torch.arange(len(rewards)) % 5 + 1
    advantages = group_advantages(rewards, group_ids, estimator, lengths=lengths)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    permuted = group_advantages(rewards[order], group_ids[order], estimator, lengths=lengths[order])
    close(permuted, advantages[order], 1e-12)
    renamed = order[group_ids.unique(return_inverse=True)[1]]  # distinct new names, in another order
    close(group_advantages(rewards, renamed, estimator, lengths=lengths), advantages, 1e-12)


@own_group
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
    lengths = torch.arange(1, 9)
    for reward in (0.95, 0.1, -1 / 3, 0.0, 3e4):
        rewards = torch.full((8,), reward, dtype=dtype)
        group_ids = torch.zeros(8, dtype=torch.int64)
        assert (group_advantages(rewards, group_ids, estimator, eps=0.0, lengths=lengths) == 0).all()
        assert not group_has_signal(rewards, group_ids).any()
        rewards[3] = -1
        assert group_has_signal(rewards, group_ids).all()


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "reinforce_pp"])
def test_equal_rewards_give_exactly_zero_beside_a_group_that_varies(estimator):
    rewards = torch.cat([torch.full((8,), 0.95), torch.tensor([1.0, 0.0, 0.0])])
    group_ids = torch.tensor([3] * 8 + [1] * 3)
    advantages = group_advantages(rewards, group_ids, estimator, lengths=torch.arange(1, 12))
    assert (advantages[:8] == 0).all() and (advantages[8:] != 0).any()


def test_rows_outside_the_baseline_move_nothing():
    """Whatever they earn: the others' advantages stay; their own is measured against the others."""
    ids, inside = torch.zeros(4, dtype=torch.int64), torch.tensor([True, True, True, False])
    for outlier in (0.5, -1e6, 1e6):
        rewards = torch.tensor([1.0, 0.0, 0.5, outlier], dtype=torch.float64)
        for estimator in ESTIMATORS:
            lengths = torch.tensor([3, 1, 2, 9])
            got = group_advantages(rewards, ids, estimator, in_baseline=inside, lengths=lengths)
            alone = group_advantages(rewards[:3], ids[:3], estimator, lengths=lengths[:3])
            close(got[:3], alone, 1e-13)
        close(group_advantages(rewards, ids, "rloo", in_baseline=inside)[3], outlier - 0.5, 1e-9)
    equal = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert (group_advantages(equal, ids, in_baseline=inside) == 0).all()
    assert not group_has_signal(equal, ids, in_baseline=inside).any()
    assert group_has_signal(equal, ids).all()
    for keep in (torch.zeros(4, dtype=torch.bool), torch.arange(4) == 1):  # too few rows to compare with
        for estimator in ESTIMATORS:
            got = group_advantages(rewards, ids, estimator, in_baseline=keep, lengths=LENGTHS[:4])
            assert (got == 0).all(), estimator


def gdpo_by_hand(rewards, group_ids, weights, eps):
    """Normalise each reward over the rows it applies to, sum, normalise the sums over the batch."""
    sums = []
    for row, group in zip(rewards.tolist(), group_ids.tolist(), strict=True):
        total = 0.0
        for k, weight in enumerate(weights):
            members = rewards[group_ids == group, k]
            members = members[~members.isnan()].tolist()
            if not math.isnan(row[k]) and len(members) > 1 and max(members) > min(members):
                total += weight * (row[k] - statistics.fmean(members)) / (statistics.stdev(members) + eps)
        sums.append(total)
    applies = [not all(map(math.isnan, row)) for row in rewards.tolist()]
    known = [s for s, keep in zip(sums, applies, strict=True) if keep]
    if len(known) < 2 or max(known) == min(known):
        return torch.zeros(len(sums), dtype=torch.float64)
    mean, deviation = statistics.fmean(known), statistics.stdev(known) + eps
    scaled = [(s - mean) / deviation * keep for s, keep in zip(sums, applies, strict=True)]
    return torch.tensor(scaled, dtype=torch.float64)


@given(batch=batches(), columns=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_several_rewards(batch, columns, seed):
    """GDPO and sums against plain Python, with rewards that do not apply."""
    _, group_ids = batch
    generator = torch.Generator().manual_seed(seed)
    shape = len(group_ids), columns
    rewards = torch.randint(-4, 5, shape, generator=generator).double() / 4
    rewards[torch.rand(shape, generator=generator) < 0.2] = math.nan
    weights = [1.0, 0.5, -2.0][:columns]
    got = multi_reward_advantages(rewards, group_ids, weights)
    close(got, gdpo_by_hand(rewards, group_ids, weights, 1e-4), 1e-9)
    summed = multi_reward_advantages(rewards, group_ids, weights, "dr_grpo")
    applies = ~rewards.isnan().all(dim=1)
    totals = rewards.nan_to_num(0.0) @ torch.tensor(weights, dtype=torch.float64)
    close(summed, by_hand(totals, group_ids, "dr_grpo", 0, inside=applies) * applies, 1e-12)


def test_gdpo_keeps_a_reward_of_small_spread():
    """Summed first, 0.01 beside 10 disappears; normalised first, both speak."""
    rewards = torch.tensor([[10.0, 0.00], [10.0, 0.01], [0.0, 0.00], [0.0, 0.01]])
    ids = torch.zeros(4, dtype=torch.int64)
    first, second = multi_reward_advantages(rewards, ids), multi_reward_advantages(rewards, ids, None, "grpo")
    assert first[1] - first[0] > 0.5 and second[1] - second[0] < 2e-3
    close(
        multi_reward_advantages(rewards[:, :1], ids, [2.0]),
        multi_reward_advantages(rewards[:, :1], ids),
        1e-4,
    )
    single = group_advantages(rewards[:, 0], ids)
    close(multi_reward_advantages(rewards[:, :1], ids, None, "grpo"), single, 0)
    assert multi_reward_advantages(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def gae_by_hand(rewards, values, mask, gamma, lam):
    """The definition as a double sum over the selected tokens of each row."""
    advantages = torch.zeros_like(values)
    for i, row in enumerate(mask.tolist()):
        at = [t for t, keep in enumerate(row) if keep]
        r, v = rewards[i, at].tolist(), [*values[i, at].tolist(), 0.0]
        deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(len(at))]
        for k, t in enumerate(at):
            advantages[i, t] = sum((gamma * lam) ** (j - k) * deltas[j] for j in range(k, len(at)))
    return advantages


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 6)),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    density=st.sampled_from([0.0, 0.6, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_gae(shape, gamma, lam, density, seed):
    """Any mask, with NaN where masked; lam = 1 gives the discounted return minus the value."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, chance = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
    mask = chance < density
    rewards[~mask], values[~mask] = math.nan, math.inf
    advantages, returns = gae_advantages(rewards, values, mask, gamma, lam)
    close(advantages, gae_by_hand(rewards, values, mask, gamma, lam), 1e-12)
    close(returns, torch.where(mask, advantages + values, 0.0), 1e-12)
    if lam == gamma == 1 and mask.any():
        first = int(mask.any(dim=1).nonzero()[0])
        start = int(mask[first].nonzero()[0])
        close(returns[first, start], rewards[first][mask[first]].sum(), 1e-12)


def test_gae_steps_over_what_a_tool_wrote():
    """The gap neither resets the value that follows nor discounts; whatever stands there is not read."""
    rewards = torch.tensor([[0.0, 5.0, 0.0, 1.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 9.0, 0.25, 0.75]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True]])
    advantages, returns = gae_advantages(rewards, values, mask, 0.5, 0.5)
    last = 1 - 0.75
    middle = 0.5 * 0.75 - 0.25 + 0.25 * last
    first = 0.5 * 0.25 - 0.5 + 0.25 * middle
    close(advantages, [[first, 0.0, middle, last]], 1e-15)
    close(returns, [[first + 0.5, 0.0, middle + 0.25, 1.0]], 1e-15)


def test_passk_with_a_shared_best_reward():
    """Nobody stands out, so nobody is reinforced; below the best, ties do not matter."""
    ids = torch.zeros(4, dtype=torch.int64)
    assert (group_advantages(torch.tensor([1.0, 1.0, 0.0, 0.0]), ids, "passk") == 0).all()
    close(group_advantages(torch.tensor([0.5, 2.0, 0.5, 0.0]), ids, "passk"), [0.0, 1.5, 0.0, 0.0], 0)


@given(shape=st.tuples(st.integers(0, 4), st.integers(0, 6)), seed=st.integers(0, 2**31))
def test_whiten(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    values, chance = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    mask = chance < 0.6
    values[~mask] = math.nan
    got, chosen = whiten(values, mask, eps=0.0), values[mask]
    assert (got[~mask] == 0).all()
    if len(chosen) < 2:
        assert (got == 0).all()
    else:
        close(got[mask], (chosen - chosen.mean()) / chosen.std(), 1e-9)
        close(whiten(values, mask, shift_mean=False, eps=0.0)[mask], chosen.mean() + got[mask], 1e-9)
    assert (whiten(torch.full((8,), 0.95), torch.ones(8, dtype=torch.bool)) == 0).all()


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
        lengths = torch.tensor([1, 2, 3, 4])
        advantages = group_advantages(rewards.to(dtype), GROUPS[:4], estimator, lengths=lengths)
        assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not advantages.requires_grad
        close(advantages, by_hand(rewards, GROUPS[:4], estimator, 1e-4, lengths), 2.0**-22)
    if estimator != "gpg":
        far = group_advantages(rewards + 2.0**20, GROUPS[:4], estimator, lengths=lengths)
        close(far, advantages, 2.0**-22)


def test_empty_batch():
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert group_advantages(*empty).shape == group_has_signal(*empty).shape == (0,)


@pytest.mark.gpu
@every_estimator
def test_cuda_equals_cpu_and_repeats(estimator):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(4096, generator=generator)
    group_ids = torch.arange(4096) % 512
    lengths = torch.arange(4096) % 7 + 1
    estimate = lambda device: group_advantages(
        rewards.to(device), group_ids.to(device), estimator, lengths=lengths.to(device)
    )
    on_gpu = estimate("cuda")
    assert torch.equal(on_gpu, estimate("cuda"))
    close(on_gpu.cpu(), estimate("cpu"), 2.0**-21)  # one float32 ulp below 4


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
        ({"estimator": "opo"}, "lengths: got None, expected"),
        ({"lengths": torch.ones(3)}, r"lengths: got shape \(3,\), expected \(4,\)"),
        ({"lengths": torch.tensor([1, -2, 1, 1])}, "lengths: got -2, expected >= 0"),
        ({"in_baseline": torch.ones(4)}, "in_baseline: got .*float32.*expected .*bool"),
        ({"in_baseline": torch.ones(3, dtype=torch.bool)}, "in_baseline: got"),
    ],
)
def test_bad_input(change, message):
    good = {"rewards": torch.tensor([1.0, 0.0, 0.5, 2.0]), "group_ids": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        group_advantages(**(good | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rewards": torch.zeros(4)}, r"rewards: got shape \(4,\), expected \(B, K\)"),
        ({"rewards": torch.tensor([[1.0, 2.0], [0.0, math.inf]] * 2)}, r"rewards\[1, 1\]: got inf"),
        ({"weights": [1.0]}, r"weights: got shape \(1,\), expected \(2,\), one a reward"),
        ({"estimator": "gdop"}, "nearest is 'gdpo'"),
        ({"group_ids": torch.tensor([4, 4, 9, 4])}, "group 9: got 1 completion"),
    ],
)
def test_bad_rewards(change, message):
    good = {"rewards": torch.zeros(4, 2), "group_ids": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        multi_reward_advantages(**(good | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"values": torch.zeros(4)}, r"values: got shape \(4,\), expected \(B, T\)"),
        ({"rewards": torch.zeros(2, 2)}, r"rewards: got shape \(2, 2\), expected \(2, 3\) as values"),
        ({"mask": torch.ones(2, 3)}, "mask: got .*float32"),
        ({"gamma": 1.1}, r"gamma: got 1.1, expected a number in \[0, 1\]"),
        ({"lam": math.nan}, "lam: got nan"),
    ],
)
def test_bad_gae(change, message):
    good = {
        "rewards": torch.zeros(2, 3),
        "values": torch.zeros(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=message):
        gae_advantages(**(good | change))
    with pytest.raises(ValueError, match="mask: got"):
        whiten(torch.zeros(3), torch.ones(2, dtype=torch.bool))
