"""Benchmarks under pytest: which device, what it is, and where records go."""

import comparison
import measurement
import pytest
import render
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STORED = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--commit", help="commit to record where the working tree has no .git")


def pytest_configure(config):
    config.stash[STORED] = []


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
def compare(benchmark, record):
    """``comparison.compare`` whose rounds pytest-benchmark drives and whose record is stored.

    pytest-benchmark's own figure is the host time of one round of all contenders; the figures of each contender are
    in its ``extra_info`` (``--benchmark-json``) and in ``results/``.
    """

    def run(case, mode, **arguments):
        drive = lambda round, count: benchmark.pedantic(round, rounds=count)
        found = comparison.compare(case, mode, DEVICE, drive=drive, **arguments)
        benchmark.extra_info.update(found)
        record(found)

    return run


def pytest_terminal_summary(terminalreporter, config):
    for record in config.stash[STORED]:
        terminalreporter.write_line(render.verdict(record))
