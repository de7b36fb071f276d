"""The five rewards for answers between tags: the published ones with their traps, and the mended ones without."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.grpo.rewards import REWARDS, parse_rewards
from nanogrpo.grpo.tagged_answers import (
    DEFAULT_TAGGED,
    TAGGED_REWARDS,
    extract_answer,
    parse_number,
    same_answer,
    tagged,
)
from nanogrpo.grpo.tasks import TaggedExample
from nanogrpo.rollout import Completion

EXAMPLE = TaggedExample((), tagged("because", "72"), "72", ())
PERFECT = tagged("because", "72")
TWO_LINES = tagged("because\nof this", "72")
CLASSIC = [name for name in TAGGED_REWARDS if name.endswith("_classic")]
MENDED = [name for name in TAGGED_REWARDS if name not in CLASSIC]


def rewards(names, text, finish_reason="stop", example=EXAMPLE):
    completion = Completion([1], [-0.5], finish_reason, text)
    return [TAGGED_REWARDS[name](completion, example) for name in names]


# correctness, number, strict, soft, tag count
@pytest.mark.parametrize(
    "text, expected",
    [
        (PERFECT, [2, 0.5, 0.5, 0.5, 0.5]),
        (PERFECT + "\n", [2, 0.5, 0.5, 0.5, 0.5]),
        (TWO_LINES, [2, 0.5, 0.5, 0.5, 0.5]),
        (tagged("because", "72.0"), [2, 0.5, 0.5, 0.5, 0.5]),
        (tagged("because", "-5"), [0, 0.5, 0.5, 0.5, 0.5]),
        (tagged("because", "1,072"), [0, 0.5, 0.5, 0.5, 0.5]),
        (tagged("because", "²"), [0, 0, 0.5, 0.5, 0.5]),
        (tagged("because", "seventy-two"), [0, 0, 0.5, 0.5, 0.5]),
        ("<reasoning>x</reasoning><answer>72</answer>", [2, 0.5, 0, 0.5, 0.5]),
        ("72", [0, 0, 0, 0, 0]),
        ("<answer>72</answer>", [2, 0.5, 0, 0, 0.25]),
        ("<answer>72", [0, 0, 0, 0, 0.125]),
        (PERFECT + "\n" + PERFECT, [2, 0.5, 0, 0, 0]),
        ("Sure. " + PERFECT, [2, 0.5, 0, 0, 0.5]),
        (PERFECT + "\nDone!", [2, 0.5, 0, 0, 0.495]),
        (PERFECT + "x" * 1000, [2, 0.5, 0, 0, 0]),
        ("", [0, 0, 0, 0, 0]),
    ],
)
def test_mended(text, expected):
    assert rewards(MENDED, text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        (PERFECT + "\n", [2, 0.5, 0.5, 0, 0.5]),
        (PERFECT, [2, 0.5, 0, 0, 0.5 - 0.001 * len(PERFECT) + 0.001]),  # fined for its whole length
        (TWO_LINES + "\n", [2, 0.5, 0, 0, 0.5]),  # no expression crosses a line
        (
            "<reasoning>x</reasoning><answer>72</answer>",
            [2, 0.5, 0, 0.5, 0],
        ),  # the formats exclude each other
        (tagged("because", "-5") + "\n", [0, 0, 0.5, 0, 0.5]),
        (tagged("because", "72.0") + "\n", [0, 0, 0.5, 0, 0.5]),
        (tagged("because", "²") + "\n", [0, 0.5, 0.5, 0, 0.5]),
        ("72", [2, 0.5, 0, 0, 0]),  # without tags
        (PERFECT + "\nDone!", [2, 0.5, 0, 0, 0.5 - 0.005 - 0.005]),
    ],
)
def test_classic(text, expected):
    assert rewards(CLASSIC, text) == pytest.approx(expected)


def test_most_that_can_be_earned():
    assert sum(rewards(MENDED, PERFECT)) == 4.0
    # Strict needs a line break where soft's dot does not cross one.
    assert max(sum(rewards(CLASSIC, text)) for text in (PERFECT + "\n", "<reasoning>x</reasoning>\n")) == 3.5


def test_a_reply_that_was_cut_off():
    assert rewards(["tagged_correctness"], PERFECT, "length") == [0]
    assert rewards(["tagged_correctness_classic"], PERFECT, "length") == [2]


def test_they_are_known_by_name():
    assert set(TAGGED_REWARDS) <= set(REWARDS)
    assert [r.name for r in parse_rewards(DEFAULT_TAGGED)] == [
        "tag_count", "soft_format", "strict_format", "tagged_number", "tagged_correctness"
    ]  # fmt: skip
    assert all(reward.weight == 1 for reward in parse_rewards(DEFAULT_TAGGED))
    assert len(CLASSIC) == len(MENDED) == 5


@given(st.text(alphabet="ab \n<>/", max_size=30), st.text(alphabet="0123456789.,- \n", max_size=10))
def test_what_was_put_between_the_tags_is_found(reasoning, answer):
    assert extract_answer(tagged(reasoning, answer)) == answer.strip()


def test_the_last_whole_pair_counts():
    assert extract_answer("<answer>1</answer> <answer>2</answer>") == "2"
    assert extract_answer("<answer>1</answer> <answer>2") == "1"
    assert extract_answer("<answer><answer>3</answer>") == "3"
    assert extract_answer("</answer>4<answer>") is None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_numbers_are_read_back(number):
    for text in (f"{number}", f"{number:,}", f" {number:f}00 "):
        assert parse_number(text) == number
        assert same_answer(text, str(number))
    assert not same_answer(str(number + Decimal("0.001")), str(number))


@pytest.mark.parametrize(
    "text", ["", ".", "-", "1.2.3", "1,23", "1e5", "0x1", "²", "٣", "nan", "inf", "3 4", "--3", "5."]
)
def test_what_is_no_number(text):
    assert parse_number(text) is None
