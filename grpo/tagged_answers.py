"""Answers between tags, and the well-known five rewards for them: as published, and mended.

    <reasoning>
    ...
    </reasoning>
    <answer>
    ...
    </answer>

Each function takes a completion and its example and returns its own scale: correctness 2.0, the others 0.5 at most,
so that the weights are 1. The ``*_classic`` ones do what the notebooks that made them known do, with their traps: no
regular expression there crosses a line, so that "strict" fails on two lines of reasoning, and the two formats
exclude each other; a number is a run of digits, so "-5" and "3.0" are none and "²" is one; an answer without tags
counts; and a perfect reply that does not end in a line break is fined for its whole length. The mended ones have none
of these, and a reply that was cut off earns no correctness.
"""

import re
from decimal import Decimal

SYSTEM_PROMPT = "Respond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
STRICT = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n?", re.DOTALL)
SOFT = re.compile(r"\s*<reasoning>.*?</reasoning>\s*<answer>.*?</answer>\s*", re.DOTALL)
STRICT_CLASSIC = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
SOFT_CLASSIC = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")
NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?", re.ASCII)
TAIL_FINE = 0.001  # a character after the end


def tagged(reasoning, answer):
    """A reply in the format."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def extract_answer(text):
    """What stands between the last pair of answer tags, without spaces around it; None where there is no pair."""
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return found[-1].strip() if found else None


def parse_number(text):
    """The ``Decimal`` that ``text`` writes, commas between thousands allowed; None where it is no plain number."""
    text = text.strip().removeprefix("$")
    if not any(char.isdigit() for char in text) or NUMBER.fullmatch(text) is None:
        return None
    return Decimal(text.replace(",", ""))


def same_answer(text, expected):
    """Whether two answers are equal: as numbers where both are (9.90 is 9.9), else as text."""
    ours, theirs = parse_number(text), parse_number(expected)
    if ours is not None and theirs is not None:
        return ours == theirs
    return text.strip() == expected.strip()


def _tags_once(text):
    return all(text.count(tag) == 1 for tag in TAGS)


def tagged_correctness(completion, example):
    """2 if the reply has ended and its answer is accepted."""
    return 2.0 * (completion.finish_reason == "stop" and example.accepts(completion.text))


def tagged_number(completion, example):
    """0.5 if the answer is a number: signed, with a fraction or with thousands marked, in ASCII digits."""
    answer = extract_answer(completion.text)
    return 0.5 * (answer is not None and parse_number(answer) is not None)


def strict_format(completion, example):
    """0.5 if the reply is the format and nothing else, every tag on a line of its own."""
    return 0.5 * (_tags_once(completion.text) and STRICT.fullmatch(completion.text) is not None)


def in_tags(text):
    """Whether a reply is reasoning, then an answer, between their tags, with any space around them."""
    return _tags_once(text) and SOFT.fullmatch(text) is not None


def soft_format(completion, example):
    """0.5 if the reply is ``in_tags``."""
    return 0.5 * in_tags(completion.text)


def tag_count(completion, example):
    """0.125 for each tag that occurs once, less 0.001 for each character after the last answer; 0 at least."""
    value = sum(0.125 for tag in TAGS if completion.text.count(tag) == 1)
    _, end, tail = completion.text.rpartition("</answer>")
    return max(0.0, value - TAIL_FINE * len(tail.strip())) if end else value


def _answer_classic(text):
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def tagged_correctness_classic(completion, example):
    """2 if what follows the last <answer>, or a reply without tags, is the expected answer to the letter."""
    return 2.0 * (_answer_classic(completion.text) == str(example.answer))


def tagged_integer_classic(completion, example):
    """0.5 if the answer is made of digits alone, of any script, superscripts included."""
    return 0.5 * _answer_classic(completion.text).isdigit()


def strict_format_classic(completion, example):
    """0.5 for the format with one line of reasoning, one of answer, and a line break at the end."""
    return 0.5 * (STRICT_CLASSIC.match(completion.text) is not None)


def soft_format_classic(completion, example):
    """0.5 for a beginning of reasoning and answer in which no tag holds a line break."""
    return 0.5 * (SOFT_CLASSIC.match(completion.text) is not None)


def tag_count_classic(completion, example):
    """0.125 for each tag that occurs once with its line breaks, less 0.001 a character after the end, twice."""
    text, value = completion.text, 0.0
    value += 0.125 * (text.count("<reasoning>\n") == 1)
    value += 0.125 * (text.count("\n</reasoning>\n") == 1)
    if (
        text.count("\n<answer>\n") == 1
    ):  # without the line break at the end, all of the text counts as its tail
        value += 0.125 - TAIL_FINE * len(text.split("\n</answer>\n")[-1])
    if text.count("\n</answer>") == 1:
        value += 0.125 - TAIL_FINE * (len(text.split("\n</answer>")[-1]) - 1)
    return value


TAGGED_REWARDS = {
    "tagged_correctness": tagged_correctness,
    "tagged_number": tagged_number,
    "strict_format": strict_format,
    "soft_format": soft_format,
    "tag_count": tag_count,
    "tagged_correctness_classic": tagged_correctness_classic,
    "tagged_integer_classic": tagged_integer_classic,
    "strict_format_classic": strict_format_classic,
    "soft_format_classic": soft_format_classic,
    "tag_count_classic": tag_count_classic,
}
DEFAULT_TAGGED = "tag_count,soft_format,strict_format,tagged_number,tagged_correctness"
