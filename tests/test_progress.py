"""The line of a step that takes long: on terminals alone, not for short steps, wiped at the end."""

import io
import time

import pytest
from nanogrpo.grpo.progress import progress_line, shown_progress
from tiny_run import tiny_trainer


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen_of(text):
    """What a terminal of one line shows after ``text``."""
    shown = ""
    for part in text.split("\r"):
        shown = part + shown[len(part) :]
    return shown


def test_line():
    assert progress_line(3, "rollout", 12.4, 0, 0) == "step 3: rollout, 12 s"
    line = progress_line(3, "backward", 61.0, 6, 8)
    assert line == "step 3: backward, 61 s [" + "#" * 18 + "." * 6 + "] 6/8 micro-batches"


def test_a_long_step_is_shown_and_wiped():
    terminal, states = (
        Terminal(),
        iter([(1, "rollout", 0, 0), (1, "backward", 1, 2)] + [(1, "forward", 2, 2)] * 99),
    )
    with shown_progress(terminal, lambda: next(states), patience=0.02, interval=0.02):
        time.sleep(0.15)
        assert "step 1: rollout" in terminal.getvalue() and "1/2 micro-batches" in terminal.getvalue()
    assert screen_of(terminal.getvalue()).strip() == ""


def test_a_short_step_shows_nothing():
    terminal = Terminal()
    with shown_progress(terminal, lambda: (1, "rollout", 0, 0)):
        pass
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_nothing_where_there_is_no_terminal(stream):
    with shown_progress(stream, lambda: 1 / 0, patience=0.01, interval=0.01):
        time.sleep(0.05)
    assert stream is None or stream.getvalue() == ""


def test_a_step_that_raises_leaves_no_line():
    terminal = Terminal()
    with pytest.raises(KeyError), shown_progress(terminal, lambda: (1, "reward", 0, 0), 0.01, 0.01):
        time.sleep(0.05)
        raise KeyError
    assert terminal.getvalue() and screen_of(terminal.getvalue()).strip() == ""


def test_the_trainer_says_where_it_is():
    trainer, seen = tiny_trainer(token_budget=210, share_prefix=False), []
    assert trainer.progress() == (1, "waiting", 0, 0)
    original = trainer.objective.micro_loss

    def micro_loss(*args, **options):
        seen.append(trainer.progress())
        return original(*args, **options)

    trainer.objective.micro_loss = micro_loss
    trainer.step()
    assert [state[:2] for state in seen] == [(1, "forward")] * len(seen)
    assert [state[2:] for state in seen] == [(i, len(seen)) for i in range(len(seen))] and len(seen) > 2
    assert trainer.progress() == (2, "waiting", 0, 0)
