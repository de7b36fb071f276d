"""Reward functions called side by side, each within a time limit."""

import contextlib
import faulthandler
import queue
import sys
import threading
import time

from .rewards import RewardError

WORKERS = 8
PATIENCE = 0.5  # seconds between looks at the clock
GRACE = 10.0  # seconds past the limit after which nothing but a held interpreter explains the silence
LONGEST = 1e6  # seconds that the watchdog can count


def score(rewards, pairs, *, timeout):
    """Each reward's value for each (completion, example) of ``pairs``: a list of lists, None where it does not apply.

    At most ``WORKERS`` calls run at once, in threads, which suits functions that wait for something (a request, a
    subprocess); pure Python ones take turns as ever. Raises RewardError with the function and the completion for the
    first call, in order, that raised or returned no finite number, and for one that took more than ``timeout``
    seconds. That one's thread is left behind and does not keep the process from ending. Code that never lets go of
    the interpreter, such as one endless regular expression, cannot be interrupted or even timed by another thread: a
    watchdog outside the interpreter ends the process ``GRACE`` seconds past the limit, with the stack of every thread
    on stderr. ``RewardProcesses`` can end such a call alone.
    """
    calls = [(reward, completion, example) for completion, example in pairs for reward in rewards]
    waiting, finished, began, outcomes = queue.SimpleQueue(), queue.SimpleQueue(), {}, {}
    for index in range(len(calls)):
        waiting.put(index)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            reward, completion, example = calls[index]
            began[index] = time.monotonic()
            try:
                finished.put((index, reward(completion, example)))
            except RewardError as error:
                finished.put((index, error))

    _watch(timeout + GRACE)  # before any thread can keep the interpreter
    for _ in range(min(WORKERS, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    try:
        while len(outcomes) < len(calls):
            _watch(timeout + GRACE)
            with contextlib.suppress(queue.Empty):
                index, outcome = finished.get(timeout=min(timeout, PATIENCE))
                outcomes[index] = outcome
            running = {index: start for index, start in began.copy().items() if index not in outcomes}
            oldest = min(running, key=running.get, default=None)
            if oldest is not None and time.monotonic() - running[oldest] > timeout and finished.empty():
                reward, completion, _ = calls[oldest]
                raise RewardError(
                    f"reward function {reward.name} took more than {timeout:g} s on completion {completion.text!r}"
                )
        for index in range(len(calls)):
            if isinstance(outcomes[index], RewardError):
                raise outcomes[index]
    finally:
        faulthandler.cancel_dump_traceback_later()
        stop.set()
    values = iter(outcomes[index] for index in range(len(calls)))
    return [[next(values) for _ in rewards] for _ in pairs]


def _watch(seconds):
    """End the process in ``seconds``, unless asked again before; nothing where there is no stderr to write to."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        faulthandler.dump_traceback_later(min(seconds, LONGEST), exit=True, file=sys.__stderr__)
