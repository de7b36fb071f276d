"""Reward functions that another process can import, well behaved and not."""

import os
import re
import time


def value(completion, example):
    return float(completion.text)


def odd(completion, example):
    return sum(token % 2 for token in completion.token_ids) / len(completion.token_ids)


def even_only(completion, example):
    return None if example % 2 else 1.0


def slow_first(completion, example):
    time.sleep((20 - example) / 1000)
    return float(example)


def fragile(completion, example):
    return 1 / 0 if example in (5, 17) else 0.0


def endless(completion, example):
    """One call of C code that keeps the interpreter for longer than anybody waits."""
    if example == 3:
        re.match(r"(a+)+$", "a" * 60 + "b")
    return 0.0


def leaves(completion, example):
    if example == 4:
        os._exit(7)
    return 0.0


async def awaited(completion, example):
    import asyncio

    await asyncio.sleep(0.001)
    return float(example)
