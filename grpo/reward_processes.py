"""Reward functions in processes of their own, which can be ended whatever they do.

A thread that hangs inside C code and keeps the interpreter, such as one endless regular expression, stops the whole
process; a process can be killed. The functions, completions and examples travel by pickle, so a function must be
importable by its module and name.
"""

import multiprocessing
import pickle
import time
from multiprocessing.connection import wait

from .rewards import RewardError


class RewardProcesses:
    """At most ``count`` processes that call reward functions; they start when needed and end with ``close``."""

    def __init__(self, count):
        self.count = count
        # A server that has torch imported forks each worker: quick to start, without this process's threads.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["nanogrpo.grpo.rewards"])
        self.workers = []

    def score(self, rewards, pairs, *, timeout):
        """As ``reward_pool.score``; a call over the limit has its process killed, and so have all after an error."""
        calls = [(reward, completion, example) for completion, example in pairs for reward in rewards]
        outcomes, began, waiting = {}, {}, list(range(len(calls)))[::-1]
        messages = [_pickled(call) for call in calls]
        try:
            while len(outcomes) < len(calls):
                while waiting and (worker := self._free(began)) is not None:
                    index = waiting.pop()
                    worker.pipe.send_bytes(messages[index])
                    began[worker] = index, time.monotonic()
                remaining = min(began.values(), key=lambda call: call[1])[1] + timeout - time.monotonic()
                ready = wait([worker.pipe for worker in began], timeout=max(0.0, min(remaining, 1e6)))
                for worker in [worker for worker in began if worker.pipe in ready]:
                    index, _ = began.pop(worker)
                    outcomes[index] = _answer(worker, calls[index])
                now = time.monotonic()
                for index, start in began.values():
                    if now - start > timeout:
                        raise _error(calls[index], f"took more than {timeout:g} s")
            for index in range(len(calls)):
                if isinstance(outcomes[index], RewardError):
                    raise outcomes[index]
        except BaseException:
            self.close()
            raise
        values = iter(outcomes[index] for index in range(len(calls)))
        return [[next(values) for _ in rewards] for _ in pairs]

    def _free(self, busy):
        """A worker with nothing to do, a new one where there may be more, or None."""
        for worker in self.workers:
            if worker not in busy:
                return worker
        if len(self.workers) < self.count:
            self.workers.append(_Worker(self.context))
            return self.workers[-1]
        return None

    def close(self):
        """Kill the processes."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self.workers = []


class _Worker:
    def __init__(self, context):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()


def _serve(pipe):
    """What a worker does: answer calls until the other end is closed."""
    while True:
        try:
            reward, completion, example = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = reward(completion, example)
        except RewardError as error:
            answer = str(error)
        pipe.send(answer)


def _pickled(call):
    try:
        return pickle.dumps(call)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"reward function {call[0].name} cannot go to another process ({error}): define it in a module, or "
            "leave reward_processes at 0"
        ) from error


def _answer(worker, call):
    """The value, None, or the RewardError of a call that ``worker`` has finished."""
    try:
        answer = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        return _error(call, f"ended its process (exit code {worker.process.exitcode})")
    return RewardError(answer) if isinstance(answer, str) else answer


def _error(call, what):
    return RewardError(f"reward function {call[0].name} {what} on completion {call[1].text!r}")
