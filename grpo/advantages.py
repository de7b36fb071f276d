"""From rewards to advantages: how much better than its group each completion was.

A group is the set of completions of one prompt, named by an integer id a row, in any order and of any size
from two up. With n rewards R in a group, mean and std over the rows of the group that are in the baseline:

    grpo      A = (R - mean) / (std + eps), std with Bessel's correction (n - 1)    arXiv 2402.03300
    dr_grpo   A =  R - mean                                                         arXiv 2503.20783
    batch     A = (R - mean) / (std of all rewards of the batch + eps)              arXiv 2508.08221
    rloo      A =  R - mean of the n - 1 others = n/(n - 1) (R - mean)              arXiv 2402.14740
    opo       A =  R - sum(length R) / sum(length)                                  arXiv 2505.23585
    gpg       A = (R - mean) x rows of the batch / rows whose reward is not 0       arXiv 2504.02546
    passk     A =  R - second best R for the best row, 0 for the others             arXiv 2503.19595
    reinforce_pp            A = whiten(R) over the batch, without groups            arXiv 2501.03262
    reinforce_pp_baseline   A = whiten(R - mean) over the batch                     the same

A group whose rewards are all equal teaches nothing and gets exactly 0. That is decided by max == min on the
rewards as given: eight times 0.95 has a float32 standard deviation of 6e-8, not 0, and dividing by it makes up
an advantage. ``reinforce_pp`` has no groups: there the rewards of the whole batch must be equal.

``multi_reward_advantages`` takes several rewards a completion, ``gae_advantages`` one a token and a value function.
All arithmetic is float64; nothing has a gradient.
"""

import difflib
import math

import torch


def _check(condition, message):
    if not condition:
        raise ValueError(message)


class _Groups:
    """The rows of a batch by group id; ``reduce`` gives each row the statistic of its own group, (B,).

    Each segment is reduced on its own in row order: no atomics, so a repeated call repeats bit for bit.
    ``in_baseline`` (B,) bool leaves rows out of every statistic, ``size`` included.
    """

    def __init__(self, group_ids, in_baseline=None):
        ids, self.segment, self.counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
        self.order = torch.argsort(self.segment, stable=True)
        self.singletons = ids[self.counts == 1].tolist()
        self.inside = torch.ones_like(group_ids, dtype=torch.bool) if in_baseline is None else in_baseline
        self.size = self.reduce(self.inside.double(), "sum")

    def reduce(self, values, how):
        return torch.segment_reduce(values[self.order], how, lengths=self.counts)[self.segment]

    def sum(self, values):
        return self.reduce(torch.where(self.inside, values, 0.0), "sum")

    def mean(self, values):
        return self.sum(values) / self.size.clamp(min=1)

    def std(self, values):
        """With Bessel's correction; 0 for fewer than two rows."""
        deviation = (values - self.mean(values)).square()
        return (self.sum(deviation) / (self.size - 1).clamp(min=1)).sqrt()

    def varies(self, values):
        highest = self.reduce(torch.where(self.inside, values, -math.inf), "max")
        return highest > self.reduce(torch.where(self.inside, values, math.inf), "min")


def _whole_batch(groups):
    return _Groups(torch.zeros_like(groups.segment), groups.inside)


def _weighted_whiten(values, weights, eps=1e-8):
    """(values - mean) / sqrt(var + eps) with weights as counts and Bessel's correction; 0 below two counts."""
    count = weights.sum()
    mean = (weights * values).sum() / count.clamp(min=1)
    centred = values - mean
    variance = (weights * centred.square()).sum() / (count - 1).clamp(min=1)
    return torch.where(count > 1, centred * (variance + eps).rsqrt(), 0.0)


def _grpo(rewards, groups, lengths, eps):
    return (rewards - groups.mean(rewards)) / (groups.std(rewards) + eps)


def _dr_grpo(rewards, groups, lengths, eps):
    return rewards - groups.mean(rewards)


def _batch(rewards, groups, lengths, eps):
    return (rewards - groups.mean(rewards)) / (_whole_batch(groups).std(rewards) + eps)


def _rloo(rewards, groups, lengths, eps):
    # A row outside the baseline leaves nothing of itself in the mean to take out.
    scale = torch.where(groups.inside, groups.size / (groups.size - 1).clamp(min=1), 1.0)
    return (rewards - groups.mean(rewards)) * scale


def _opo(rewards, groups, lengths, eps):
    _check(lengths is not None, "lengths: got None, expected (B,) tokens: 'opo' weighs its baseline by them")
    return rewards - groups.sum(lengths * rewards) / groups.sum(lengths).clamp(min=1)


def _gpg(rewards, groups, lengths, eps):
    right = (groups.inside & (rewards != 0)).sum()
    return (rewards - groups.mean(rewards)) * groups.inside.sum() / right.clamp(min=1)


def _passk(rewards, groups, lengths, eps):
    inside = torch.where(groups.inside, rewards, -math.inf)
    best = inside == groups.reduce(inside, "max")
    second = groups.reduce(torch.where(best, -math.inf, inside), "max")
    # Two rows that share the best reward: neither is better than the second best.
    alone = best & (groups.sum(best.double()) == 1)
    return torch.where(alone, rewards - second, 0.0)


def _row_weights(groups, lengths):
    return groups.inside * (1.0 if lengths is None else lengths)


def _reinforce_pp(rewards, groups, lengths, eps):
    return _weighted_whiten(rewards, _row_weights(groups, lengths))


def _reinforce_pp_baseline(rewards, groups, lengths, eps):
    return _weighted_whiten(rewards - groups.mean(rewards), _row_weights(groups, lengths))


ESTIMATORS = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "batch": _batch,
    "opo": _opo,
    "gpg": _gpg,
    "passk": _passk,
    "reinforce_pp": _reinforce_pp,
    "reinforce_pp_baseline": _reinforce_pp_baseline,
}


def _check_estimator(estimator, options):
    if estimator not in options:
        nearest = difflib.get_close_matches(str(estimator), options, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"estimator: got {estimator!r}, nearest is {nearest!r}, expected one of {list(options)}"
        )


def _check_rows(rewards, group_ids, columns=False):
    for name, value in (("rewards", rewards), ("group_ids", group_ids)):
        shape = "(B, K)" if columns and name == "rewards" else "(B,)"
        _check(
            isinstance(value, torch.Tensor), f"{name}: got {type(value).__name__}, expected a tensor {shape}"
        )
        _check(value.ndim == len(shape) // 3, f"{name}: got shape {tuple(value.shape)}, expected {shape}")
    _check(rewards.is_floating_point(), f"rewards: got {rewards.dtype}, expected a floating dtype")
    _check(group_ids.dtype == torch.int64, f"group_ids: got {group_ids.dtype}, expected torch.int64")
    _check(
        len(rewards) == len(group_ids),
        f"got {len(rewards)} rewards and {len(group_ids)} group_ids, expected one id a reward",
    )
    _check(
        rewards.device == group_ids.device,
        f"got rewards on {rewards.device} and group_ids on {group_ids.device}, expected one device",
    )
    bad = (torch.isinf(rewards) if columns else ~torch.isfinite(rewards)).nonzero()
    if len(bad):
        index = bad[0].tolist()
        where = ", ".join(map(str, index))
        raise ValueError(f"rewards[{where}]: got {rewards[tuple(index)].item()}, expected a finite number")


def _check_extras(rewards, in_baseline, lengths):
    rows = tuple(rewards.shape[:1])
    if in_baseline is not None:
        got = (in_baseline.dtype, tuple(in_baseline.shape))
        _check(got == (torch.bool, rows), f"in_baseline: got {got}, expected {(torch.bool, rows)}")
    if lengths is not None:
        got = tuple(lengths.shape)
        _check(got == rows, f"lengths: got shape {got}, expected {rows}")
        _check(not (lengths < 0).any(), f"lengths: got {lengths.min().item()}, expected >= 0")


def group_has_signal(rewards, group_ids, *, in_baseline=None):
    """Whether each row's group has two different rewards, that is, whether it can teach anything.

    rewards (B,) floating, group_ids (B,) int64 -> (B,) bool; a group of one is False. Dynamic sampling keeps
    the rows that are True (DAPO, arXiv 2503.14476). Rows outside ``in_baseline`` (B,) bool do not count.
    ValueError for a non-finite reward, a wrong shape or dtype.
    """
    _check_rows(rewards, group_ids)
    _check_extras(rewards, in_baseline, None)
    if len(rewards) == 0:
        return torch.zeros_like(rewards, dtype=torch.bool)
    return _Groups(group_ids, in_baseline).varies(rewards.detach())


def group_advantages(rewards, group_ids, estimator="grpo", eps=1e-4, *, in_baseline=None, lengths=None):
    """Advantage of each completion within its group (formulas: top of this file).

    Args:
        rewards: (B,) floating, finite; one scalar a completion.
        group_ids: (B,) int64; equal ids are one group. Any values in any order: groups may interleave.
        estimator: a key of ``ESTIMATORS``.
        eps: added to the standard deviation ("grpo" and "batch" only), in units of reward.
        in_baseline: (B,) bool; False for a row (truncated, rejected) that must not move the statistics. It still
            gets its advantage against those of the others; leave it out of the loss by its mask. Default: all in.
            A group with fewer than two rows in the baseline has no signal: 0.
        lengths: (B,) tokens a completion. "opo" needs them; the "reinforce_pp" ones then whiten over tokens, each
            row counted that often, and over rows without.

    Returns (B,) without gradient: float64 for float64 rewards, else float32. The arithmetic is float64.
    Groups whose rewards are all equal give exactly 0 ("reinforce_pp": batches whose rewards are).

    Raises ValueError for a group of one, a NaN or infinite reward, an unknown estimator, a wrong shape or dtype.
    """
    _check_estimator(estimator, ESTIMATORS)
    _check(eps >= 0, f"eps: got {eps}, expected >= 0")
    _check_rows(rewards, group_ids)
    _check_extras(rewards, in_baseline, lengths)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    if len(rewards) == 0:
        return torch.zeros_like(rewards, dtype=dtype)
    groups = _Groups(group_ids, in_baseline)
    if estimator == "reinforce_pp":
        groups = _whole_batch(groups)
    for group in groups.singletons:
        raise ValueError(f"group {group}: got 1 completion, expected at least 2 for estimator {estimator!r}")
    rewards = rewards.detach().double()
    lengths = None if lengths is None else lengths.to(rewards)
    return _advantages(rewards, groups, estimator, lengths, eps).to(dtype)


def _advantages(rewards, groups, estimator, lengths, eps):
    advantages = ESTIMATORS[estimator](rewards, groups, lengths, eps)
    return torch.where(groups.varies(rewards), advantages, 0.0)


def multi_reward_advantages(
    rewards, group_ids, weights=None, estimator="gdpo", eps=1e-4, *, in_baseline=None, lengths=None
):
    """Advantages from K rewards a completion, some of which may not apply to it.

    Args:
        rewards: (B, K) floating; NaN where reward k does not apply to row i. Infinity is refused.
        group_ids, eps, in_baseline, lengths: as in ``group_advantages``.
        weights: (K,) tensor or numbers; default 1 each.
        estimator: "gdpo" normalises each reward in its group as "grpo" does, sums with the weights and normalises
            the sums over the batch, so that a reward of small spread is not drowned by the others
            (arXiv 2601.05242). Any other sums the weighted rewards first: ``group_advantages`` of the sums.

    A reward that does not apply adds nothing to its row and leaves the statistics of reward k (GDPO) or counts as 0
    in the sum. A row to which none applies gets 0 and leaves the baseline. Returns (B,), as ``group_advantages``.
    """
    _check_estimator(estimator, ["gdpo", *ESTIMATORS])
    _check(eps >= 0, f"eps: got {eps}, expected >= 0")
    _check_rows(rewards, group_ids, columns=True)
    _check_extras(rewards, in_baseline, lengths)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards = rewards.detach().double()
    weights = [1.0] * rewards.shape[1] if weights is None else weights
    weights = torch.as_tensor(weights, dtype=torch.float64, device=rewards.device)
    got, expected = tuple(weights.shape), tuple(rewards.shape[1:])
    _check(got == expected, f"weights: got shape {got}, expected {expected}, one a reward")
    applies = ~torch.isnan(rewards)
    inside = applies.any(dim=1) if in_baseline is None else applies.any(dim=1) & in_baseline
    if len(rewards) == 0:
        return torch.zeros(0, dtype=dtype, device=rewards.device)
    for group in _Groups(group_ids).singletons:
        raise ValueError(f"group {group}: got 1 completion, expected at least 2 for estimator {estimator!r}")
    known = torch.where(applies, rewards, 0.0)
    if estimator != "gdpo":
        advantages = group_advantages(
            known @ weights, group_ids, estimator, eps, in_baseline=inside, lengths=lengths
        )
        return torch.where(applies.any(dim=1), advantages, 0.0).to(dtype)
    total = torch.zeros_like(known[:, 0])
    for k, weight in enumerate(weights):
        groups = _Groups(group_ids, inside & applies[:, k])
        normalised = _advantages(known[:, k], groups, "grpo", None, eps)
        total += torch.where(applies[:, k], weight * normalised, 0.0)
    batch = _whole_batch(_Groups(group_ids, inside))
    return torch.where(applies.any(dim=1), _advantages(total, batch, "grpo", None, eps), 0.0).to(dtype)


def whiten(values, mask, *, shift_mean=True, eps=1e-8):
    """(values - mean) / sqrt(var + eps) over the selected entries, Bessel's correction; 0 where masked.

    values floating, mask bool of the same shape -> that shape, float64 for float64 values, else float32.
    ``shift_mean`` False adds the mean back. Values that are all equal, or fewer than two, have no spread: exactly 0
    (or their mean). What stands where masked is never read.
    """
    got = (mask.dtype, tuple(mask.shape))
    _check(got == (torch.bool, tuple(values.shape)), f"mask: got {got}, expected torch.bool as values")
    dtype = torch.promote_types(values.dtype, torch.float32)
    values = torch.where(mask, values.detach().double(), 0.0)
    whitened = _weighted_whiten(values, mask.double(), eps)
    if mask.numel():
        low, high = (torch.where(mask, values, fill) for fill in (math.inf, -math.inf))
        whitened = torch.where(low.min() < high.max(), whitened, 0.0)
    if not shift_mean:
        whitened = whitened + values.sum() / mask.sum().clamp(min=1)
    return torch.where(mask, whitened, 0.0).to(dtype)


def gae_advantages(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation, one advantage a token (arXiv 1506.02438).

        delta_t = r_t + gamma V_t' - V_t,   A_t = delta_t + gamma lam A_t',   returns_t = A_t + V_t

    where t' is the next selected token of the row, and V = A = 0 after the last: tokens that the policy did not
    write (tool output, padding) are stepped over, whatever stands there.

    rewards, values (B, T) floating; mask (B, T) bool; gamma and lam in [0, 1]. A completion's one reward belongs on
    its last selected token. Returns (advantages, returns), (B, T) without gradient, 0 where masked: float64 for
    float64 values, else float32. The advantages are not whitened (``whiten`` does that), so returns are exact.
    """
    shape = tuple(values.shape)
    _check(values.ndim == 2, f"values: got shape {shape}, expected (B, T)")
    _check(
        tuple(rewards.shape) == shape,
        f"rewards: got shape {tuple(rewards.shape)}, expected {shape} as values",
    )
    got = (mask.dtype, tuple(mask.shape))
    _check(got == (torch.bool, shape), f"mask: got {got}, expected {(torch.bool, shape)}")
    for name, value in (("gamma", gamma), ("lam", lam)):
        _check(0 <= value <= 1, f"{name}: got {value}, expected a number in [0, 1]")
    dtype = torch.promote_types(values.dtype, torch.float32)
    rewards, values = (torch.where(mask, x.detach().double(), 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, :1]).sum(dim=1)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], next_advantage, 0.0)
    return advantages.to(dtype), (advantages + values).to(dtype)
