"""GSM8K and reasoning-gym: records of the published form, splits without a question in common, clear errors."""

import json
import sys
from types import SimpleNamespace

import pytest
from nanogrpo.grpo import GRPOConfig
from nanogrpo.grpo.records import GENERATED, gsm8k_record, load_gsm8k
from nanogrpo.grpo.rewards import parse_rewards
from nanogrpo.grpo.run import default_folder
from nanogrpo.grpo.tagged_answers import tagged
from nanogrpo.grpo.tasks import find_task
from nanogrpo.rollout import Completion

# In GSM8K's form; the questions are our own.
ITEMS = [
    {
        "question": "Ana has 3 boxes of 12 eggs. How many eggs?",
        "answer": "3 * 12 = <<3*12=36>>36 eggs.\n#### 36",
    },
    {
        "question": "A car costs $12,500 and a bike $500. Together?",
        "answer": "12500 + 500 = 13000\n#### 13,000",
    },
    {"question": "It is 4 degrees and falls by 9. How cold is it?", "answer": "4 - 9 = -5\n#### -5"},
    {"question": "Half of 5 litres?", "answer": "5 / 2 = 2.5\n#### 2.5"},
    {"question": "Two at $7 each?", "answer": "2 * 7 = 14\n#### $14"},
]


@pytest.fixture
def folder(tmp_path):
    write = lambda name, items: (tmp_path / name).write_text(
        "".join(json.dumps(item) + "\n" for item in items)
    )
    write("train.jsonl", ITEMS[:3])
    write("test.jsonl", [*ITEMS[3:], ITEMS[0]])
    return tmp_path


def test_records():
    assert [gsm8k_record(item).answer for item in ITEMS] == ["36", "13000", "-5", "2.5", "14"]
    assert gsm8k_record(ITEMS[2]).reasoning == "4 - 9 = -5"


@pytest.mark.parametrize(
    "item", [{"question": "x"}, {"question": "x", "answer": "7"}, [], {"question": "x", "answer": "#### "}]
)
def test_what_is_no_record(item):
    with pytest.raises(ValueError, match="no GSM8K record"):
        gsm8k_record(item)


def test_a_task_from_a_folder(folder):
    task = find_task(f"gsm8k:{folder}")
    train, held_out = task.split(2)
    assert task.split(2) == (train, held_out) and len(held_out) == 2
    assert {r.question for r in train} == {ITEMS[1]["question"], ITEMS[2]["question"]}  # one is in both files
    examples = task.draw(train, 6, "a")
    assert examples == task.draw(train, 6, "a") != task.draw(train, 6, "b")
    assert [m["role"] for m in examples[0].messages] == ["system", "user"]
    assert "<answer>" in examples[0].messages[0]["content"]
    assert [e.messages[-1]["content"] for e in task.draw_each(held_out, "x")] == [
        r.question for r in held_out
    ]
    with pytest.raises(ValueError, match="has 3 questions; cannot hold out 4"):
        task.split(4)


def test_its_rewards_are_the_tagged_ones(folder):
    config = GRPOConfig(task=f"gsm8k:{folder}", held_out=1)
    assert (config.steps, config.max_completion_length) == (250, 200)
    task = find_task(config.task)
    for example in task.draw_each(task.split(1)[0], "x"):
        good = Completion([1], [0.0], "stop", tagged("so", f"{float(example.answer):,.2f}"))
        assert sum(reward(good, example) for reward in parse_rewards(config.rewards)) == 4.0
        assert example.accepts(example.reply) and not example.accepts(tagged("so", "1"))
    assert str(default_folder(config)).startswith("runs/gsm8k-") and ":" not in str(default_folder(config))


def test_a_damaged_file_is_named_with_its_line(folder):
    with open(folder / "train.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(ValueError, match=r"train.jsonl, line 4: "):
        load_gsm8k(folder)
    (folder / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="train.jsonl does not exist, expected GSM8K's"):
        load_gsm8k(folder)


def test_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return ITEMS[:3] if split == "train" else ITEMS[3:]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    train, held_out = find_task("gsm8k").split(2)
    assert len(train) == 3 and len(held_out) == 2
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]


def test_without_the_library_or_the_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs datasets: pip install datasets, or give .* gsm8k:FOLDER"):
        load_gsm8k()

    def fails(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fails))
    with pytest.raises(
        ValueError, match=r"could not get openai/gsm8k .*\(no route\): check the network, or give"
    ):
        load_gsm8k()


def fake_gym(asked):
    """reasoning_gym's three functions, over a generator that repeats some questions."""

    def create_dataset(name, size, seed):
        if name != "chain_sum":
            raise ValueError(f"Dataset '{name}' not registered")
        asked.append((name, size, seed))
        return [
            {"question": f"{n % 50} + 1 =", "answer": str(n % 50 + 1), "metadata": {"n": n}}
            for n in range(size)
        ]

    score = lambda answer, entry: 1.0 if answer == entry["answer"] else 0.5 if answer == "close" else 0.0
    return SimpleNamespace(create_dataset=create_dataset, get_score_answer_fn=lambda name: score)


def test_reasoning_gym(monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake_gym(asked))
    task = find_task("reasoning_gym:chain_sum")
    train, held_out = task.split(10)
    assert asked == [("chain_sum", GENERATED, 0)]
    assert not {r.question for r in train} & {r.question for r in held_out} and len(held_out) == 10
    for example in task.draw_each(held_out, "x"):
        assert example.accepts(example.reply)
        assert not example.accepts(tagged("", "close")) and not example.accepts(str(example.answer))
    with pytest.raises(ValueError, match="no generator 'chain_sun'"):
        find_task("reasoning_gym:chain_sun").split(3)
    with pytest.raises(ValueError, match="has 50 questions; cannot hold out 50"):
        task.split(50)


def test_reasoning_gym_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="need the package: pip install reasoning-gym"):
        find_task("reasoning_gym:chain_sum").split(3)


def test_the_real_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    task = find_task("reasoning_gym:chain_sum")
    train, held_out = task.split(5)
    for example in task.draw(train, 20, "a") + task.draw_each(held_out, "b"):
        assert example.accepts(example.reply) and not example.accepts(tagged("", "never"))


def test_unknown_kinds():
    for name in ("reasoning_gym:", "gsm9k", "other:x"):
        with pytest.raises(ValueError, match="unknown task .*gsm8k:FOLDER or reasoning_gym:GENERATOR"):
            find_task(name)
