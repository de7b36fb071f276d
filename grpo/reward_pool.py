"""Reward functions called side by side, each within a time limit."""

import queue
import threading
import time

from .rewards import RewardError

WORKERS = 8


def score(rewards, pairs, *, timeout):
    """Each reward's value for each (completion, example) of ``pairs``: a list of lists, None where it does not apply.

    At most ``WORKERS`` calls run at once, in threads, which suits functions that wait for something (a request, a
    subprocess); pure Python ones take turns as ever. Raises RewardError with the function and the completion for the
    first call, in order, that raised or returned no finite number, and for one that took more than ``timeout``
    seconds; that one's thread is left behind and does not keep the process from ending.
    """
    calls = [(reward, completion, example) for completion, example in pairs for reward in rewards]
    waiting, finished, began, outcomes = queue.SimpleQueue(), queue.SimpleQueue(), {}, {}
    for index in range(len(calls)):
        waiting.put(index)

    def work():
        while True:
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

    for _ in range(min(WORKERS, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    while len(outcomes) < len(calls):
        running = {index: start for index, start in began.copy().items() if index not in outcomes}
        oldest = min(running, key=running.get, default=None)
        left = timeout if oldest is None else running[oldest] + timeout - time.monotonic()
        try:
            index, outcome = finished.get(timeout=max(0.0, left))
            outcomes[index] = outcome
        except queue.Empty:
            if oldest is None:
                continue
            reward, completion, _ = calls[oldest]
            raise RewardError(
                f"reward function {reward.name} took more than {timeout:g} s on completion {completion.text!r}"
            ) from None
    for index in range(len(calls)):
        if isinstance(outcomes[index], RewardError):
            raise outcomes[index]
    values = iter(outcomes[index] for index in range(len(calls)))
    return [[next(values) for _ in rewards] for _ in pairs]
