"""From rewards to advantages: how much better than its group each completion was.

A group is the set of completions of one prompt, named by an integer id a row, in any order and of any size
from two up. With n rewards R in a group, and all statistics over that group:

    grpo      A = (R - mean) / (std + eps), std with Bessel's correction (n - 1)    arXiv 2402.03300
    dr_grpo   A =  R - mean                                                         arXiv 2503.20783
    rloo      A =  R - mean of the n - 1 others = n/(n - 1) (R - mean)              arXiv 2402.14740

A group whose rewards are all equal teaches nothing and gets exactly 0. That is decided by max == min on the
rewards as given: eight times 0.95 has a float32 standard deviation of 6e-8, not 0, and dividing by it makes up
an advantage.
"""

import difflib

import torch


def _check(condition, message):
    if not condition:
        raise ValueError(message)


class _Groups:
    """The rows of a batch by group id; ``reduce`` gives each row the statistic of its own group, (B,).

    Each segment is reduced on its own in row order: no atomics, so a repeated call repeats bit for bit.
    """

    def __init__(self, group_ids):
        ids, self.segment, self.counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
        self.order = torch.argsort(self.segment, stable=True)
        self.size = self.counts[self.segment]
        self.singletons = ids[self.counts == 1].tolist()

    def reduce(self, values, how):
        return torch.segment_reduce(values[self.order], how, lengths=self.counts)[self.segment]

    def varies(self, values):
        return self.reduce(values, "max") > self.reduce(values, "min")


def _grpo(centred, groups, eps):
    variance = groups.reduce(centred.square(), "sum") / (groups.size - 1)
    return centred / (variance.sqrt() + eps)


def _dr_grpo(centred, groups, eps):
    return centred


def _rloo(centred, groups, eps):
    return centred * groups.size / (groups.size - 1)


ESTIMATORS = {"grpo": _grpo, "dr_grpo": _dr_grpo, "rloo": _rloo}


def _check_rows(rewards, group_ids):
    for name, value in (("rewards", rewards), ("group_ids", group_ids)):
        _check(isinstance(value, torch.Tensor), f"{name}: got {type(value).__name__}, expected a tensor (B,)")
        _check(value.ndim == 1, f"{name}: got shape {tuple(value.shape)}, expected (B,)")
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
    bad = (~torch.isfinite(rewards)).nonzero()
    if len(bad):
        index = bad[0].item()
        raise ValueError(f"rewards[{index}]: got {rewards[index].item()}, expected a finite number")


def group_has_signal(rewards, group_ids):
    """Whether each row's group has two different rewards, that is, whether it can teach anything.

    rewards (B,) floating, group_ids (B,) int64 -> (B,) bool; a group of one is False. Dynamic sampling keeps
    the rows that are True (DAPO, arXiv 2503.14476). ValueError for a non-finite reward, a wrong shape or dtype.
    """
    _check_rows(rewards, group_ids)
    if len(rewards) == 0:
        return torch.zeros_like(rewards, dtype=torch.bool)
    groups = _Groups(group_ids)
    return groups.varies(rewards.detach())


def group_advantages(rewards, group_ids, estimator="grpo", eps=1e-4):
    """Advantage of each completion within its group (formulas: top of this file).

    Args:
        rewards: (B,) floating, finite; one scalar a completion.
        group_ids: (B,) int64; equal ids are one group. Any values in any order: groups may interleave.
        estimator: "grpo", "dr_grpo" or "rloo".
        eps: added to the standard deviation ("grpo" only), in units of reward.

    Returns (B,) without gradient: float64 for float64 rewards, else float32. The arithmetic is float64.
    Groups whose rewards are all equal give exactly 0.

    Raises ValueError for a group of one, a NaN or infinite reward, an unknown estimator, a wrong shape or dtype.
    """
    if estimator not in ESTIMATORS:
        nearest = difflib.get_close_matches(str(estimator), ESTIMATORS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"estimator: got {estimator!r}, nearest is {nearest!r}, expected one of {list(ESTIMATORS)}"
        )
    _check(eps >= 0, f"eps: got {eps}, expected >= 0")
    _check_rows(rewards, group_ids)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    if len(rewards) == 0:
        return torch.zeros_like(rewards, dtype=dtype)

    groups = _Groups(group_ids)
    for group in groups.singletons:
        raise ValueError(f"group {group}: got 1 completion, expected at least 2 for estimator {estimator!r}")
    rewards = rewards.detach().double()
    centred = rewards - groups.reduce(rewards, "sum") / groups.size
    return torch.where(groups.varies(rewards), ESTIMATORS[estimator](centred, groups, eps), 0.0).to(dtype)
