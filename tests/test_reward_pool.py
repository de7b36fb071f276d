"""The reward pool: order, errors and time limits."""

import subprocess
import sys
import threading
import time

import pytest
from nanogrpo.grpo.reward_pool import WORKERS, score
from nanogrpo.grpo.rewards import RewardError, WeightedReward
from nanogrpo.rollout import Completion
from tiny_run import environment


def said(text):
    return Completion([1], [-0.5], "stop", text)


PAIRS = [(said(str(n)), n) for n in range(20)]


def value(completion, example):
    return float(completion.text)


def even_only(completion, example):
    return None if example % 2 else 1.0


def weighted(*functions):
    return [WeightedReward(function, 1.0) for function in functions]


def test_order_is_kept_whatever_finishes_first():
    def reversed_speed(completion, example):
        time.sleep((20 - example) / 1000)
        return float(example)

    terms = score(weighted(reversed_speed, even_only), PAIRS, timeout=10)
    assert terms == [[float(n), None if n % 2 else 1.0] for n in range(20)]


def test_waiting_calls_overlap_but_not_more_than_the_pool():
    running, most, lock = 0, 0, threading.Lock()

    def waits(completion, example):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return 0.0

    score(weighted(waits), PAIRS, timeout=10)
    assert 1 < most <= WORKERS


def test_the_first_bad_completion_is_named_each_time():
    def fragile(completion, example):
        time.sleep(0.001 * (20 - example))
        return 1 / 0 if example in (5, 17) else 0.0

    for _ in range(3):
        with pytest.raises(RewardError, match="fragile raised ZeroDivisionError.* on completion '5'"):
            score(weighted(value, fragile), PAIRS, timeout=10)


def test_a_call_that_hangs_is_named():
    def stuck(completion, example):
        if example == 13:
            threading.Event().wait()
        return 0.0

    with pytest.raises(RewardError, match="stuck took more than 0.2 s on completion '13'"):
        score(weighted(value, stuck), PAIRS, timeout=0.2)


def test_a_function_that_exits_is_named():
    def leaves(completion, example):
        raise SystemExit(3)

    with pytest.raises(RewardError, match="leaves raised SystemExit.* on completion '0'"):
        score(weighted(leaves), PAIRS, timeout=10)


def test_after_an_error_no_more_calls_are_made():
    calls = []

    def stuck(completion, example):
        calls.append(example)
        threading.Event().wait(0.6 if example == 0 else 0.01)
        return 0.0

    with pytest.raises(RewardError, match="took more than"):
        score(weighted(stuck), PAIRS * 20, timeout=0.2)
    made = len(calls)
    time.sleep(0.3)
    assert len(calls) <= made + WORKERS < 400


def test_an_endless_limit():
    assert score(weighted(value), PAIRS[:2], timeout=1e12) == [[0.0], [1.0]]


def test_the_limit_is_a_call_s_not_the_whole_s():
    def brief(completion, example):
        time.sleep(0.05)
        return 0.0

    assert len(score(weighted(brief), PAIRS, timeout=0.1)) == 20  # 0.15 s or more in all


def test_a_stuck_thread_does_not_keep_the_process():
    program = """
import threading
from nanogrpo.grpo.reward_pool import score
from nanogrpo.grpo.rewards import WeightedReward
from nanogrpo.rollout import Completion
def stuck(completion, example):
    threading.Event().wait()
score([WeightedReward(stuck, 1.0)], [(Completion([1], [0.0], "stop", "x"), None)], timeout=0.1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "stuck took more than 0.1 s" in done.stderr


def test_nothing_to_score():
    assert score(weighted(value), [], timeout=1) == []


def test_a_call_that_keeps_the_interpreter_ends_the_process():
    """Nothing inside the interpreter can: the watchdog outside does, and says where it was."""
    program = """
import slow_rewards
import nanogrpo.grpo.reward_pool as pool
from nanogrpo.grpo.rewards import WeightedReward
from nanogrpo.rollout import Completion
pool.GRACE = 0.5
pairs = [(Completion([1], [0.0], "stop", "x"), n) for n in range(5)]
pool.score([WeightedReward(slow_rewards.endless, 1.0)], pairs, timeout=0.5)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 1 and "Timeout" in done.stderr and "in endless" in done.stderr


def test_the_watchdog_sleeps_afterwards():
    program = """
import time
import slow_rewards
import nanogrpo.grpo.reward_pool as pool
from nanogrpo.grpo.rewards import WeightedReward
from nanogrpo.rollout import Completion
pool.GRACE = 0.2
pool.score([WeightedReward(slow_rewards.value, 1.0)], [(Completion([1], [0.0], "stop", "1"), 1)], timeout=0.2)
time.sleep(1)
print("alive")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env=environment(),
    )  # fmt: skip
    assert done.stdout == "alive\n", done.stderr
