"""Tasks: right answers, disjoint splits, draws that repeat."""

import re

import pytest
from nanogrpo.grpo.tagged_answers import extract_answer, tagged
from nanogrpo.grpo.tasks import TASKS, find_task

SOLVERS = {
    "larger": lambda a: sorted(a)[-1],
    "smallest": lambda a: sorted(a)[0],
    "add": lambda a: a[0] + a[1],
}
each_task = pytest.mark.parametrize("task", [TASKS[name] for name in SOLVERS], ids=SOLVERS.keys())


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


DECIMALS = TASKS["decimals"]


def test_every_task_is_tested():
    assert set(TASKS) == {*SOLVERS, "decimals"}


@pytest.mark.parametrize("held_out", [1, 2, 500])
def test_decimals_hold_out_the_pair_that_is_shown(held_out):
    train, kept = DECIMALS.split(held_out, seed=3)
    assert len(kept) == held_out and kept[0] == ("9.11", "9.9")
    train_keys, kept_keys = {unordered(s) for s in train}, {unordered(s) for s in kept}
    assert not train_keys & kept_keys and len(train_keys) == len(train) and len(kept_keys) == held_out
    assert not {unordered(w) for w in DECIMALS.worked} & (train_keys | kept_keys)
    assert DECIMALS.split(held_out, 3) == (train, kept)
    assert DECIMALS.draw_each(kept, "x")[0].messages[-1]["content"] == "Which is bigger? 9.11 or 9.9?"
    if held_out == 500:
        assert DECIMALS.split(500, 4)[1] != kept


def test_decimals_are_right_and_written_in_one_to_three_places():
    examples = DECIMALS.draw(DECIMALS.split(1)[0], 2000, "answers")
    longer_wins = equal_wholes = first_wins = 0
    for example in examples:
        asked = re.fullmatch(
            r"Which is bigger\? (\d+\.\d{1,3}) or (\d+\.\d{1,3})\?", example.messages[-1]["content"]
        )
        a, b = asked.groups()
        assert (a, b) == example.operands and float(a) != float(b)
        assert not a.endswith("0") and not b.endswith("0")
        assert example.answer == (a if float(a) > float(b) else b)
        assert example.accepts(example.reply) and not example.accepts(
            tagged("", a if example.answer == b else b)
        )
        equal_wholes += a.partition(".")[0] == b.partition(".")[0]
        first_wins += example.answer == a
        if len(a.partition(".")[2]) != len(b.partition(".")[2]):
            longer_wins += len(example.answer.partition(".")[2]) == max(
                len(x.partition(".")[2]) for x in (a, b)
            )
    # Neither place nor length gives the answer away: both shares are near one half (2,000 draws: 4.5 sigma is 5%).
    assert 1400 < equal_wholes < 1700 and 900 < first_wins < 1100
    different = sum(
        len(e.operands[0].partition(".")[2]) != len(e.operands[1].partition(".")[2]) for e in examples
    )
    assert 0.4 < longer_wins / different < 0.6


def test_worked_decimals():
    messages = DECIMALS.example(("9.11", "9.9")).messages
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    for question, reply in ((messages[1], messages[2]), (messages[3], messages[4])):
        a, b = re.findall(r"\d+\.\d+", question["content"])
        assert extract_answer(reply["content"]) == (a if float(a) > float(b) else b)
    assert "9.11 is 9.11, 9.9 is 9.90, 9.11 < 9.90." in DECIMALS.example(("9.11", "9.9")).reply
    # Otherwise the last number seen, or the shorter one, would be the answer of every example.
    answers = [extract_answer(messages[i]["content"]) for i in (2, 4)]
    asked = [re.findall(r"\d+\.\d+", messages[i]["content"]) for i in (1, 3)]
    assert [numbers.index(answer) for numbers, answer in zip(asked, answers, strict=True)] == [0, 1]


def test_a_reply_is_right_by_value_whatever_its_reasoning():
    example = DECIMALS.example(("9.11", "9.9"))
    assert example.accepts("<reasoning>\nI guess.\n</reasoning>\n<answer>\n9.90\n</answer>\n")
    for text in ("9.9", "<answer>9.11</answer>", "<answer>9.9", ""):
        assert not example.accepts(text)


def test_the_form_of_a_reply_is_apart_from_its_number():
    plain, decimal = TASKS["add"].example((12, 30)), TASKS["decimals"].example(("9.11", "9.9"))
    assert plain.in_format("Answer: 7\n") and not plain.in_format("Answer: x") and not plain.in_format("42")
    right = decimal.reply
    assert (
        decimal.in_format(right) and decimal.in_format(right.replace("9.9", "1")) and decimal.accepts(right)
    )
    assert not decimal.in_format(right + "<answer>") and not decimal.in_format("9.9")
