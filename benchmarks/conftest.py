"""Benchmarks under pytest: which device, what it is, and where records go."""

import gc
import math
import sys
import time

import comparison
import measurement
import pytest
import render
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STORED, STARTED, IMPORTED = pytest.StashKey[list](), pytest.StashKey[dict](), pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption("--commit", help="commit to record where the working tree has no .git")
    seconds = f"of rounds for each case (default: {comparison.SECONDS})"
    parser.addoption("--seconds", type=float, default=comparison.SECONDS, help=seconds)
    limit = "skip what is left of a file (bench_step=60) once it has taken so long"
    parser.addoption("--limit", action="append", default=[], metavar="FILE=SECONDS", help=limit)


def pytest_configure(config):
    config.stash[STORED], config.stash[STARTED], config.stash[IMPORTED] = [], {}, 0


def pytest_runtest_setup(item):
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the GPU's context is lost: {error}", returncode=3)
    limits = dict(limit.split("=") for limit in item.config.getoption("limit"))
    if item.config.stash[IMPORTED] != len(sys.modules):
        item.config.stash[IMPORTED] = len(sys.modules)
        gc.collect()
        gc.freeze()  # each capture of a graph collects garbage: let it not walk through every library again
    now = time.monotonic()
    started = item.config.stash[STARTED].setdefault(item.path.stem, now)
    if now - started > float(limits.get(item.path.stem, math.inf)):
        pytest.skip(f"{item.path.stem} has taken its {limits[item.path.stem]} seconds")


def pytest_report_header(config):
    if DEVICE == "cpu":
        return "no CUDA GPU found: running the CPU cases alone; the GPU cases need one of compute capability >= 8.0"


@pytest.fixture(scope="session")
def environment(pytestconfig):
    return measurement.environment(DEVICE, pytestconfig.getoption("commit"))


@pytest.fixture
def record(environment, request):
    """Stores a record of ``comparison.compare``'s form."""

    def store(record):
        comparison.store(request.path.stem.removeprefix("bench_"), environment, record)
        request.config.stash[STORED].append(record | {"environment": environment})

    return store


@pytest.fixture
def compare(benchmark, record, pytestconfig):
    """``comparison.compare`` whose rounds pytest-benchmark drives and whose record is stored.

    pytest-benchmark's own figure is the host time of one round of all contenders; the figures of each contender are
    in its ``extra_info`` (``--benchmark-json``) and in ``results/``.
    """

    def run(case, mode, **arguments):
        drive = lambda round, count: benchmark.pedantic(round, rounds=count)
        found = comparison.compare(
            case, mode, DEVICE, drive=drive, seconds=pytestconfig.getoption("seconds"), **arguments
        )
        benchmark.extra_info.update(found)
        record(found)

    return run


def pytest_terminal_summary(terminalreporter, config):
    for record in config.stash[STORED]:
        terminalreporter.write_line(render.verdict(record))
