"""Reward functions: plain callables from a completion and its example to a number, and their checked weighted sum."""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass


def format_reward(completion, example):
    """1 if the whole reply has the form of the expected one, whatever its number; it must also have ended."""
    pattern = re.escape(example.reply).replace(str(example.answer), "[0-9]+")
    return float(
        completion.finish_reason == "stop" and re.fullmatch(pattern, completion.text.strip()) is not None
    )


def correct_reward(completion, example):
    """1 if the reply is exactly the expected one."""
    return float(completion.finish_reason == "stop" and completion.text.strip() == example.reply)


REWARDS = {"format": format_reward, "correct": correct_reward}


class RewardError(ValueError):
    """A reward function raised, or returned something that is no finite number."""


@dataclass(frozen=True)
class WeightedReward:
    """A reward function with its weight in the sum."""

    function: Callable
    weight: float

    def __call__(self, completion, example):
        name = getattr(self.function, "__name__", repr(self.function))
        try:
            value = float(self.function(completion, example))
        except Exception as error:
            raise RewardError(
                f"reward function {name} raised {error!r} on completion {completion.text!r}"
            ) from error
        if not math.isfinite(value):
            raise RewardError(f"reward function {name} returned {value} on completion {completion.text!r}")
        return self.weight * value


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


def total_reward(rewards, completion, example):
    """The weighted sum of ``rewards`` for one completion."""
    return math.fsum(reward(completion, example) for reward in rewards)
