"""Rewards in other processes: as in threads, and a call that keeps the interpreter is ended."""

import time

import pytest
import slow_rewards
from nanogrpo.grpo.reward_processes import RewardProcesses
from nanogrpo.grpo.rewards import RewardError, WeightedReward
from nanogrpo.rollout import Completion

PAIRS = [(Completion([1], [-0.5], "stop", str(n)), n) for n in range(20)]


def weighted(*functions):
    return [WeightedReward(function, 1.0) for function in functions]


@pytest.fixture(scope="module")
def pool():
    pool = RewardProcesses(2)
    yield pool
    pool.close()


def test_order_is_kept_and_workers_stay(pool):
    rewards = weighted(slow_rewards.slow_first, slow_rewards.even_only, slow_rewards.awaited)
    terms = pool.score(rewards, PAIRS, timeout=30)
    assert terms == [[float(n), None if n % 2 else 1.0, float(n)] for n in range(20)]
    processes = [worker.process.pid for worker in pool.workers]
    assert 1 <= len(processes) <= 2
    assert pool.score(weighted(slow_rewards.value), PAIRS, timeout=30) == [[float(n)] for n in range(20)]
    assert [worker.process.pid for worker in pool.workers] == processes
    assert pool.score(rewards, [], timeout=1) == []


def test_the_first_bad_completion_is_named(pool):
    with pytest.raises(RewardError, match="fragile raised ZeroDivisionError.* on completion '5'"):
        pool.score(weighted(slow_rewards.value, slow_rewards.fragile), PAIRS, timeout=30)


def test_a_call_that_keeps_the_interpreter_is_killed(pool):
    pool.score(weighted(slow_rewards.value), PAIRS, timeout=30)  # workers are up
    start = time.monotonic()
    with pytest.raises(RewardError, match="endless took more than 0.5 s on completion '3'"):
        pool.score(weighted(slow_rewards.endless), PAIRS, timeout=0.5)
    assert time.monotonic() - start < 10
    assert pool.workers == []
    assert pool.score(weighted(slow_rewards.value), PAIRS[:2], timeout=30) == [[0.0], [1.0]]


def test_a_call_that_ends_its_process_is_named(pool):
    with pytest.raises(RewardError, match=r"leaves ended its process \(exit code 7\) on completion '4'"):
        pool.score(weighted(slow_rewards.leaves), PAIRS, timeout=30)


def test_a_function_that_cannot_travel(pool):
    with pytest.raises(ValueError, match="cannot go to another process .*leave reward_processes at 0"):
        pool.score(weighted(lambda completion, example: 0.0), PAIRS, timeout=30)
