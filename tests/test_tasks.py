"""Tasks: right answers, disjoint splits, draws that repeat."""

import re

import pytest
from nanogrpo.grpo.tasks import TASKS, find_task

SOLVERS = {
    "larger": lambda a: sorted(a)[-1],
    "smallest": lambda a: sorted(a)[0],
    "add": lambda a: a[0] + a[1],
}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


def unordered(operands):
    return tuple(sorted(operands))


@each_task
@pytest.mark.parametrize("seed", [0, 1, 7, 12345])
def test_split_shares_no_operand_set(task, seed):
    train, held_out = task.split(50, seed)
    train_keys, held_keys = {unordered(s) for s in train}, {unordered(s) for s in held_out}
    assert len(held_out) == len(held_keys) == 50
    assert len(train) == len(train_keys)
    assert not train_keys & held_keys
    assert train_keys | held_keys == {unordered(s) for s in task.operand_sets()}
    worked = {unordered(w) for w in task.worked}
    assert not worked & (train_keys | held_keys)


@each_task
def test_drawn_examples_stay_inside_their_split(task):
    train, held_out = task.split(40)
    drawn = {unordered(e.operands) for e in task.draw(train, 3000, "a")}
    asked = {unordered(e.operands) for e in task.draw_each(held_out, "held out")}
    assert not drawn & asked
    assert asked == {unordered(s) for s in held_out}


@each_task
def test_split_depends_on_its_seed_alone(task):
    assert task.split(30, 3) == task.split(30, 3)
    assert task.split(30, 3)[1] != task.split(30, 4)[1]


@each_task
def test_draws_repeat_by_key(task):
    train, held_out = task.split(30)
    assert task.draw(train, 20, "0/1") == task.draw(train, 20, "0/1")
    assert task.draw(train, 20, "0/1") != task.draw(train, 20, "0/2")
    assert task.draw_each(held_out, "k") == task.draw_each(held_out, "k")


@each_task
def test_answers_are_right(task):
    train, _ = task.split(10)
    for example in task.draw(train, 300, "answers"):
        question = example.messages[-1]
        numbers = tuple(int(n) for n in re.findall(r"\d+", question["content"]))
        assert question["role"] == "user"
        assert numbers == example.operands
        assert all(task.low <= n <= task.high for n in numbers)
        assert example.answer == SOLVERS[task.name](numbers)
        assert int(re.findall(r"\d+", example.reply)[-1]) == example.answer


@each_task
def test_worked_examples_are_right_and_come_first(task):
    example = task.draw_each(task.split(1)[1], "x")[0]
    roles = [m["role"] for m in example.messages]
    assert roles == ["user", "assistant"] * len(task.worked) + ["user"]
    for user, assistant in zip(example.messages[:-1:2], example.messages[1::2], strict=True):
        numbers = [int(n) for n in re.findall(r"\d+", user["content"])]
        assert int(re.findall(r"\d+", assistant["content"])[-1]) == SOLVERS[task.name](numbers)


@each_task
def test_both_orders_of_operands_are_drawn(task):
    drawn = task.draw(task.split(10)[0], 200, "orders")
    assert len({e.operands == unordered(e.operands) for e in drawn}) == 2


def test_split_too_large():
    task = TASKS["add"]
    count = len(task.operand_sets())
    with pytest.raises(ValueError, match=f"add has {count} operand sets; cannot hold out {count}"):
        task.split(count)
    with pytest.raises(ValueError, match="cannot hold out 0"):
        task.split(0)


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="unknown task 'largr'; nearest is 'larger'"):
        find_task("largr")
