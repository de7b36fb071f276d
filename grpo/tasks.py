"""Small verifiable tasks: questions with one right answer, split so that nothing held out was trained on.

A question is a chat: a few worked examples as turns, then the question. Train and held-out are split by the *set*
of operands, so a held-out pair never appears in training in any order; the operands of the worked examples appear
in neither.
"""

import difflib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations, combinations_with_replacement

from .tagged_answers import DEFAULT_TAGGED, SYSTEM_PROMPT, extract_answer, in_tags, same_answer, tagged


@dataclass(frozen=True)
class Example:
    """A question with its answer: chat messages, the exact reply expected, and the answer inside it."""

    messages: tuple[dict, ...]
    reply: str
    answer: int | str
    operands: tuple[int | str, ...]

    def accepts(self, text):
        """Whether a whole reply is right."""
        return text.strip() == self.reply

    def in_format(self, text):
        """Whether a whole reply has the form of the expected one, whatever its number."""
        pattern = re.escape(self.reply).replace(str(self.answer), "[0-9]+")
        return re.fullmatch(pattern, text.strip()) is not None


@dataclass(frozen=True)
class TaggedExample(Example):
    """A question whose answer is asked for between tags; any reasoning goes."""

    def accepts(self, text):
        answer = extract_answer(text)
        return answer is not None and same_answer(answer, str(self.answer))

    def in_format(self, text):
        return in_tags(text)


@dataclass(frozen=True)
class Task:
    """A family of questions over integer operands.

    question and reply are templates: ``{0}``, ``{1}``, ... are the operands, ``{answer}`` what ``solve`` returns;
    steps, rewards and max_completion_length: those of a run unless told otherwise, enough for SmolLM2-135M-Instruct.
    """

    name: str
    description: str
    question: str
    solve: Callable[[tuple[int, ...]], int]
    low: int
    high: int
    count: int
    worked: tuple[tuple[int, ...], ...]
    steps: int
    reply: str = "{answer}"
    distinct: bool = True
    rewards: str = "format:0.2,correct:0.8"
    max_completion_length: int = 8

    def example(self, operands):
        """The question about ``operands``, in that order, after the worked examples."""
        turns = []
        for shown in (*self.worked, operands):
            turns.append({"role": "user", "content": self.question.format(*shown)})
            turns.append({"role": "assistant", "content": self.reply.format(answer=self.solve(shown))})
        return Example(tuple(turns[:-1]), turns[-1]["content"], self.solve(operands), tuple(operands))

    def operand_sets(self):
        """Every unordered choice of operands but those of the worked examples, in ascending order."""
        choose = combinations if self.distinct else combinations_with_replacement
        shown = {tuple(sorted(operands)) for operands in self.worked}
        return [s for s in choose(range(self.low, self.high + 1), self.count) if s not in shown]

    def split(self, held_out, seed=0):
        """(training, held-out) operand sets, disjoint; the held-out ones are ``held_out`` drawn by ``seed``."""
        sets = self.operand_sets()
        if not 1 <= held_out < len(sets):
            raise ValueError(f"task {self.name} has {len(sets)} operand sets; cannot hold out {held_out}")
        random.Random(f"split/{seed}").shuffle(sets)
        return sets[held_out:], sets[:held_out]

    def draw(self, sets, count, key):
        """``count`` examples from ``sets``, each set in a random order and in its reverse; ``key`` fixes the draw.

        In both orders, what a place in the question is worth cancels out: a policy that answers by position
        alone ("always the first") gains nothing on average, instead of by the luck of a small batch.
        """
        rng = random.Random(f"draw/{key}")
        orders = [rng.sample(s, len(s)) for s in rng.choices(sets, k=(count + 1) // 2)]
        return [self.example(tuple(o)) for order in orders for o in (order, order[::-1])][:count]

    def draw_each(self, sets, key):
        """One example from each of ``sets``, its operands in an order that depends on ``key`` alone."""
        rng = random.Random(f"draw each/{key}")
        return [self.example(tuple(rng.sample(s, len(s)))) for s in sets]


@dataclass(frozen=True)
class DecimalTask(Task):
    """Which of two decimals with one to three places is the bigger: where "9.11" looks more than "9.9".

    Operands are written numbers; in three of four pairs the whole parts are equal. The pair of ``shown`` is held out
    in every split, as its first.
    """

    pairs: int = 6000
    shown: tuple[str, str] = ("9.11", "9.9")

    def example(self, operands):
        turns = [{"role": "system", "content": SYSTEM_PROMPT}]
        for a, b in (*self.worked, operands):
            answer = self.solve((a, b))
            turns.append({"role": "user", "content": self.question.format(a, b)})
            turns.append({"role": "assistant", "content": tagged(compared(a, b), answer)})
        return TaggedExample(tuple(turns[:-1]), turns[-1]["content"], self.solve(operands), tuple(operands))

    def operand_sets(self):
        """``pairs`` unordered pairs of different value, drawn once and for all, none of them shown or worked."""
        rng, found = random.Random("decimals"), {}
        left_out = {tuple(sorted(pair)) for pair in (*self.worked, self.shown)}
        while len(found) < self.pairs:
            whole = rng.randint(self.low, self.high)
            other = whole if rng.random() < 0.75 else rng.randint(self.low, self.high)
            pair = tuple(sorted(_decimal(rng, part) for part in (whole, other)))
            if Decimal(pair[0]) != Decimal(pair[1]) and pair not in left_out:
                found[pair] = None
        return list(found)

    def split(self, held_out, seed=0):
        train, kept = super().split(held_out if held_out < 2 else held_out - 1, seed)
        return train, [self.shown, *kept][:held_out]

    def draw_each(self, sets, key):
        examples = super().draw_each(sets, key)
        if sets and sets[0] == self.shown:
            examples[0] = self.example(self.shown)
        return examples


def _decimal(rng, whole):
    """A number of one to three places, the last of which is not 0."""
    places = rng.randint(1, 3)
    fraction = rng.randrange(10**places)
    fraction += fraction % 10 == 0
    return f"{whole}.{fraction:0{places}d}"


def bigger(operands):
    """The written number of the greater value."""
    return max(operands, key=Decimal)


def compared(a, b):
    """The comparison of two decimals in one line, written out to equal places."""
    places = max(len(x.partition(".")[2]) for x in (a, b))
    wide = [f"{Decimal(x):.{places}f}" for x in (a, b)]
    sign = ">" if Decimal(a) > Decimal(b) else "<"
    return f"{a} is {wide[0]}, {b} is {wide[1]}, {wide[0]} {sign} {wide[1]}."


TASKS = {
    task.name: task
    for task in (
        Task(
            name="larger",
            description="the larger of two numbers from 1 to 99",
            question="Which number is larger, {0} or {1}?",
            solve=max,
            low=1,
            high=99,
            count=2,
            worked=((2, 5),),
            steps=52,
        ),
        Task(
            name="smallest",
            description="the smallest of three numbers from 1 to 99",
            question="Which number is the smallest, {0}, {1} or {2}?",
            solve=min,
            low=1,
            high=99,
            count=3,
            worked=((64, 18, 35),),
            steps=70,
        ),
        Task(
            name="add",
            description="the sum of two numbers from 10 to 49",
            question="What is {0} + {1}?",
            solve=sum,
            low=10,
            high=49,
            count=2,
            worked=((21, 34), (17, 25), (40, 12)),
            steps=52,
            reply="Answer: {answer}",
            distinct=False,
        ),
        DecimalTask(
            name="decimals",
            description="the bigger of two decimals with one to three places, with reasoning",
            question="Which is bigger? {0} or {1}?",
            solve=bigger,
            low=0,
            high=20,
            count=2,
            worked=(("3.8", "3.27"), ("6.045", "6.4")),
            steps=300,
            rewards=DEFAULT_TAGGED,
            max_completion_length=96,
        ),
    )
}


def find_task(name):
    """The task of that name; ValueError with the nearest name where there is none."""
    from .records import find_record_task  # which builds on this file

    if name in TASKS:
        return TASKS[name]
    if (task := find_record_task(name)) is not None:
        return task
    nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown task {name!r}; nearest is {nearest!r}, expected one of {', '.join(TASKS)}, gsm8k, "
        "gsm8k:FOLDER or reasoning_gym:GENERATOR"
    )
