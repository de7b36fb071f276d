"""Small verifiable tasks: questions with one right answer, split so that nothing held out was trained on.

A question is a chat: a few worked examples as turns, then the question. Train and held-out are split by the *set*
of operands, so a held-out pair never appears in training in any order; the operands of the worked examples appear
in neither.
"""

import difflib
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement


@dataclass(frozen=True)
class Example:
    """A question with its answer: chat messages, the exact reply expected, and the number inside it."""

    messages: tuple[dict, ...]
    reply: str
    answer: int
    operands: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """A family of questions over integer operands.

    question and reply are templates: ``{0}``, ``{1}``, ... are the operands, ``{answer}`` what ``solve`` returns;
    steps: the length of a run unless told otherwise, enough for SmolLM2-135M-Instruct.
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
    )
}


def find_task(name):
    """The task of that name; ValueError with the nearest name where there is none."""
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown task {name!r}; nearest is {nearest!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name]
