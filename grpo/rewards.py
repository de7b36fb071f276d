"""Reward functions: plain callables from a completion and its example to a number, and their checked weighted sum."""

import asyncio
import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from .tagged_answers import TAGGED_REWARDS


def format_reward(completion, example):
    """1 if the whole reply has the form that its example asks for, right or wrong; it must also have ended."""
    return float(completion.finish_reason == "stop" and example.in_format(completion.text))


def correct_reward(completion, example):
    """1 if the reply has ended and is right."""
    return float(completion.finish_reason == "stop" and example.accepts(completion.text))


REWARDS = {"format": format_reward, "correct": correct_reward, **TAGGED_REWARDS}


class RewardError(ValueError):
    """A reward function raised, or returned something that is no finite number."""


@dataclass(frozen=True)
class WeightedReward:
    """A reward function, plain or async, with its weight in the sum."""

    function: Callable
    weight: float

    @property
    def name(self):
        return getattr(self.function, "__name__", repr(self.function))

    def __call__(self, completion, example):
        """The function's own value for ``completion``, or None where it says that it does not apply."""
        name = self.name
        try:
            value = self.function(completion, example)
            if inspect.isawaitable(value):
                value = asyncio.run(_awaited(value))
            value = value if value is None else float(value)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            raise RewardError(
                f"reward function {name} raised {error!r} on completion {completion.text!r}"
            ) from error
        if value is not None and not math.isfinite(value):
            raise RewardError(f"reward function {name} returned {value} on completion {completion.text!r}")
        return value


async def _awaited(value):
    return await value


@dataclass(frozen=True)
class SoftOverlong:
    """What ``soft_overlong`` returns: an object, since a nested function would not pickle."""

    max_length: int
    buffer: int
    __name__ = "soft_overlong"

    def __post_init__(self):
        if not 0 < self.buffer <= self.max_length:
            raise ValueError(f"overlong buffer must be from 1 to {self.max_length} tokens, got {self.buffer}")

    def __call__(self, completion, example):
        excess = len(completion.token_ids) - (self.max_length - self.buffer)
        return -max(0.0, excess / self.buffer)


def soft_overlong(max_length, buffer):
    """Reward function of DAPO (arXiv 2503.14476, eq. 13): 0 up to max_length - buffer tokens, then down to -1."""
    return SoftOverlong(max_length, buffer)


def parse_rewards(text):
    """``"format:0.2,correct:0.8"`` as a list of ``WeightedReward``; ValueError with the nearest known name."""
    parsed = []
    for item in text.split(","):
        name, _, weight = item.strip().partition(":")
        if name not in REWARDS:
            nearest = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown reward {name!r}; nearest is {nearest!r}, expected some of {', '.join(REWARDS)}"
            )
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"reward {name!r} has weight {weight!r}, expected a finite number")
        parsed.append(WeightedReward(REWARDS[name], value))
    return parsed


def total_reward(rewards, terms):
    """The weighted sum of the ``terms`` that apply (None: does not); RewardError where none does."""
    weighted = [r.weight * term for r, term in zip(rewards, terms, strict=True) if term is not None]
    if not weighted:
        raise RewardError("no reward function applies to a completion, expected at least one that does")
    return math.fsum(weighted)
