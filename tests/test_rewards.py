"""Reward functions, their parser, and errors that name the completion."""

import asyncio
import math

import pytest
from nanogrpo.grpo.rewards import (
    RewardError,
    WeightedReward,
    correct_reward,
    format_reward,
    parse_rewards,
    soft_overlong,
    total_reward,
)
from nanogrpo.grpo.tasks import TASKS
from nanogrpo.rollout import Completion

LARGER = TASKS["larger"].example((3, 42))
ADD = TASKS["add"].example((11, 22))


def said(text, finish_reason="stop"):
    return Completion([1], [-0.5], finish_reason, text)


@pytest.mark.parametrize(
    "example, text, form, correct",
    [
        (LARGER, "42", 1, 1),
        (LARGER, " 42\n", 1, 1),
        (LARGER, "7", 1, 0),
        (LARGER, "042", 1, 0),
        (LARGER, "42.", 0, 0),
        (LARGER, "4 2", 0, 0),
        (LARGER, "-42", 0, 0),
        (LARGER, "", 0, 0),
        (LARGER, "\u0664\u0662", 0, 0),  # 42 in Arabic-Indic digits
        (ADD, "Answer: 33", 1, 1),
        (ADD, "Answer: 34", 1, 0),
        (ADD, "Answer 33", 0, 0),
        (ADD, "33", 0, 0),
        (ADD, "Answer: 33 Answer: 33", 0, 0),
    ],
)
def test_values(example, text, form, correct):
    assert format_reward(said(text), example) == form
    assert correct_reward(said(text), example) == correct


def test_a_reply_cut_by_length_earns_nothing():
    assert format_reward(said("42", "length"), LARGER) == 0
    assert correct_reward(said("42", "length"), LARGER) == 0


def total(rewards, completion):
    rewards = parse_rewards(rewards)
    return total_reward(rewards, [reward(completion, LARGER) for reward in rewards])


def test_weighted_sum():
    assert total("format:0.2, correct:0.8", said("42")) == pytest.approx(1.0, abs=1e-15)
    assert total("format:0.2, correct:0.8", said("41")) == 0.2
    assert total("format:0.2, correct:0.8", said("what")) == 0
    assert total("correct", said("42")) == 1
    assert total("correct:-2", said("42")) == -2


def not_applying(completion, example):
    return None


def test_a_reward_that_does_not_apply_leaves_the_sum():
    rewards = [WeightedReward(not_applying, 5.0), WeightedReward(correct_reward, 0.5)]
    terms = [reward(said("42"), LARGER) for reward in rewards]
    assert terms == [None, 1.0]
    assert total_reward(rewards, terms) == 0.5


def test_a_completion_without_any_reward_is_an_error():
    rewards = [WeightedReward(not_applying, 1.0)]
    with pytest.raises(RewardError, match="no reward function applies"):
        total_reward(rewards, [None])


@pytest.mark.parametrize("length, expected", [(1, 0), (6, 0), (7, -0.25), (9, -0.75), (10, -1)])
def test_soft_overlong_punishment(length, expected):
    completion = Completion([1] * length, [-0.5] * length, "stop", "")
    assert soft_overlong(10, 4)(completion, LARGER) == expected


@pytest.mark.parametrize("buffer", [0, -1, 11])
def test_an_overlong_buffer_that_does_not_fit(buffer):
    with pytest.raises(ValueError, match=f"from 1 to 10 tokens, got {buffer}"):
        soft_overlong(10, buffer)


def test_unknown_reward_names_the_nearest():
    with pytest.raises(ValueError, match="unknown reward 'corect'; nearest is 'correct'"):
        parse_rewards("format:1,corect:1")


@pytest.mark.parametrize("weight", ["x", "nan", "inf"])
def test_bad_weight(weight):
    with pytest.raises(ValueError, match=f"reward 'format' has weight '{weight}', expected a finite number"):
        parse_rewards(f"format:{weight}")


def test_a_reward_that_raises_is_named_with_its_completion():
    def fragile(completion, example):
        return 1 / 0

    with pytest.raises(
        RewardError, match="fragile raised ZeroDivisionError.*on completion 'hello'"
    ) as caught:
        WeightedReward(fragile, 1.0)(said("hello"), LARGER)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named_with_its_completion(value):
    def broken(completion, example):
        return value

    with pytest.raises(RewardError, match=f"broken returned {value} on completion 'hello'"):
        WeightedReward(broken, 1.0)(said("hello"), LARGER)


async def slow_to_answer(completion, example):
    await asyncio.sleep(0.01)
    return len(completion.text)


def test_an_async_reward_is_awaited():
    assert WeightedReward(slow_to_answer, 1.0)(said("four"), LARGER) == 4


def test_a_reward_that_returns_no_number():
    with pytest.raises(RewardError, match="raised TypeError"):
        WeightedReward(lambda completion, example: [1], 1.0)(said("hello"), LARGER)
