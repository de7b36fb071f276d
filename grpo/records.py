"""Tasks from records: GSM8K (arXiv 2110.14168), from a folder or the hub, and the generators of reasoning-gym."""

import functools
import importlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .tagged_answers import DEFAULT_TAGGED, SYSTEM_PROMPT, extract_answer, tagged
from .tasks import TaggedExample

GSM8K_HUB = "openai/gsm8k"
GENERATED = 2000  # questions that reasoning-gym makes


@dataclass(frozen=True)
class Record:
    """A question, its answer, the reasoning where there is one, and what a scorer of its own needs."""

    question: str
    answer: str
    reasoning: str = ""
    entry: dict | None = None


@dataclass(frozen=True)
class ScoredExample(TaggedExample):
    """A question of reasoning-gym: ``source`` names the generator whose own scorer decides."""

    source: str = ""
    entry: dict | None = None

    def accepts(self, text):
        answer = extract_answer(text)
        score = _scorer(_reasoning_gym().get_score_answer_fn, self.source)
        return answer is not None and score(answer, self.entry) >= 1


@dataclass(frozen=True)
class RecordTask:
    """Questions of a collection, asked with the system prompt of the tags.

    load: gives (training records, held-out records or none, in which case they are taken out of the training ones);
    source: a generator of reasoning-gym, or "".
    """

    name: str
    description: str
    load: Callable[[], tuple[list[Record], list[Record]]]
    steps: int = 250
    rewards: str = DEFAULT_TAGGED
    max_completion_length: int = 200
    source: str = ""

    def split(self, held_out, seed=0):
        """(training, held-out) records without a question in common; the held-out ones are drawn by ``seed``."""
        training, reserved = self.load()
        distinct = {record.question: record for record in reserved or training}
        if not 1 <= held_out < len(distinct) + bool(reserved):
            raise ValueError(f"task {self.name} has {len(distinct)} questions; cannot hold out {held_out}")
        chosen = random.Random(f"split/{seed}").sample(sorted(distinct), held_out)
        kept_out = set(distinct) if reserved else set(chosen)
        training = [record for record in training if record.question not in kept_out]
        if not training:
            raise ValueError(f"task {self.name} has no question to train on beside the held-out ones")
        return training, [distinct[question] for question in chosen]

    def draw(self, sets, count, key):
        """``count`` examples from the records ``sets``; ``key`` fixes the draw."""
        return [self.example(record) for record in random.Random(f"draw/{key}").choices(sets, k=count)]

    def draw_each(self, sets, key):
        """One example from each of ``sets``, in order."""
        return [self.example(record) for record in sets]

    def example(self, record):
        messages = (
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": record.question},
        )
        reply = tagged(record.reasoning or "...", record.answer)
        if self.source:
            return ScoredExample(messages, reply, record.answer, (), self.source, record.entry)
        return TaggedExample(messages, reply, record.answer, ())


def gsm8k_record(item):
    """The ``Record`` of a line of GSM8K, whose answer stands behind "####"; ValueError where it has another form."""
    try:
        reasoning, mark, answer = item["answer"].rpartition("####")
        question = item["question"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no GSM8K record: {str(item)[:80]!r} has no text under {error}") from error
    if not mark or not answer.strip():
        raise ValueError(f"no GSM8K record: the answer {item['answer'][-60:]!r} has no '#### number'")
    return Record(question.strip(), answer.strip().replace(",", "").removeprefix("$"), reasoning.strip())


def load_gsm8k(folder=None):
    """(training, test) records from ``folder``/train.jsonl and test.jsonl as published, default from the hub.

    Raises ValueError naming the file and line, or what to install or to give where nothing can be had.
    """
    if folder is not None:
        return tuple(_read_jsonl(Path(folder) / f"{part}.jsonl") for part in ("train", "test"))
    advice = "or give the folder of train.jsonl and test.jsonl: --task gsm8k:FOLDER"
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"task gsm8k from the hub needs datasets: pip install datasets, {advice}") from error
    try:
        parts = [library.load_dataset(GSM8K_HUB, "main", split=part) for part in ("train", "test")]
    except Exception as error:  # the library and its HTTP client raise many classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"could not get {GSM8K_HUB} from the hub ({reason}): check the network, {advice}"
        ) from error
    return tuple([gsm8k_record(item) for item in part] for part in parts)


def _read_jsonl(path):
    if not path.is_file():
        raise ValueError(f"{path} does not exist, expected GSM8K's train.jsonl and test.jsonl in its folder")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(gsm8k_record(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return records


def _reasoning_gym():
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ValueError(
            f"tasks of reasoning-gym need the package: pip install reasoning-gym ({error})"
        ) from error


@functools.cache
def _scorer(get_score_answer_fn, source):
    """The scorer of a generator: asking for one makes the generator, which reads a book for letter_counting."""
    return get_score_answer_fn(source)


def load_reasoning_gym(source):
    """(records, []) of ``GENERATED`` questions of a generator of reasoning-gym, always the same ones."""
    library = _reasoning_gym()
    try:
        generated = library.create_dataset(source, size=GENERATED, seed=0)
    except ValueError as error:
        raise ValueError(f"reasoning-gym has no generator {source!r}: {error}") from error
    return [Record(entry["question"], str(entry["answer"]), entry=entry) for entry in generated], []


def find_record_task(name):
    """The task "gsm8k", "gsm8k:FOLDER" or "reasoning_gym:GENERATOR"; None for any other name. Nothing is read yet."""
    kind, _, where = name.partition(":")
    if kind == "gsm8k":
        load = functools.partial(load_gsm8k, where or None)
        return RecordTask(name, "grade-school mathematics in words", load)
    if kind == "reasoning_gym" and where:
        load = functools.partial(load_reasoning_gym, where)
        return RecordTask(name, f"{where} of reasoning-gym", load, source=where)
    return None
