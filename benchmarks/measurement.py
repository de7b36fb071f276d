"""Time, extra memory, roofs and environment, measured alike for every contender.

Times are CUDA events around each call (the host's clock on the CPU). Contenders take turns inside one run, so that
clocks, heat and neighbours are shared; figures of different runs or machines compare only as ratios. Before each call
256 MiB are overwritten: it begins with a cold L2 cache, and its launches are queued while the device is busy.
"""

import datetime
import math
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves


class Lap(NamedTuple):
    """One contender's turn: ``call()`` does the work ``copies`` times; a graph does not keep alive what it reads."""

    call: Callable
    copies: int
    reads: object = None


def lap_of(copies, *, graph=False, check=None):
    """The ``Lap`` over callables without arguments, one for each copy of the inputs.

    graph: as one CUDA graph, of which ``check`` gets the first copy's result as a replay computes it.
    """
    call = lambda: [copy() for copy in copies]
    if graph:
        call = captured(call, check and (lambda results: check(results[0])))
    return Lap(call, len(copies), copies)


class Race:
    """Contenders that take turns: a round runs every one once, in a new order each time.

    Args:
        device: "cuda" or "cpu".
        calls: contender -> ``Lap``, or list of callables, of which one is made (see ``rotated``); a lap counts as the
            mean of its copies.
        graph: replay each lap as one CUDA graph, for kernels shorter than their launch.
        most: contender -> number of rounds that it takes part in, for those that are slow; they are not warmed up.
    """

    def __init__(self, device, calls, *, graph=False, most=None):
        self.cuda = device == "cuda"
        self.flush = torch.empty(2**28 if self.cuda else 0, dtype=torch.int8, device=device)
        self.laps = {
            name: call if isinstance(call, Lap) else lap_of(call, graph=graph) for name, call in calls.items()
        }
        self.most = most or {}
        self.order = random.Random(0)
        self.samples = {name: [] for name in calls}

    def round(self):
        left = [name for name in self.laps if len(self.samples[name]) < self.most.get(name, math.inf)]
        marks = []
        for name in self.order.sample(left, len(left)):
            self.flush.zero_()
            start = self._mark()
            self.laps[name].call()
            marks.append((name, start, self._mark()))
        if self.cuda:
            torch.cuda.synchronize()
        for name, start, stop in marks:
            elapsed = start.elapsed_time(stop) if self.cuda else (stop - start) * 1e3
            self.samples[name].append(elapsed / self.laps[name].copies)

    def run(self, *, seconds, warmup=3, fewest=5, most=50, drive=None):
        """Warm up, then run as many rounds as fit into ``seconds``; the spread of milliseconds by contender.

        ``seconds`` is for those who run in every round, and bounded by ``fewest`` and ``most`` rounds.

        ``drive(round, count)`` runs the rounds instead, where another tool is to see them.
        """
        slow, self.most = self.most, dict.fromkeys(self.most, 0)
        count = fewest
        for _ in range(warmup):
            began = time.perf_counter()
            self.round()
            count = min(most, max(fewest, int(seconds / (time.perf_counter() - began))))
        self.samples, self.most = {name: [] for name in self.samples}, slow
        if drive is None:
            for _ in range(count):
                self.round()
        else:
            drive(self.round, count)
        return {name: spread(samples) for name, samples in self.samples.items()}

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def spread(samples):
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
    return {"ms": statistics.median(samples), "p20": cuts[0], "p80": cuts[3], "rounds": len(samples)}


def captured(call, check=None):
    """What replays ``call()`` as one CUDA graph; ``check`` gets what a replay has written over NaN."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compilation and handles must exist before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    if check is not None:
        with torch.inference_mode():
            for tensor in tree_leaves(results):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.data.fill_(math.nan)  # else what the capture itself left there could pass
        graph.replay()
        check(results)
    return graph.replay


def rotated(inputs, device):
    """Copies of a tuple of tensors, together three times the L2 cache: a lap over them reads device memory."""
    if device == "cpu":
        return [inputs]
    size = sum(tensor.nbytes for tensor in inputs)
    copies = -(-3 * torch.cuda.get_device_properties(device).L2_cache_size // size)
    return [inputs] + [tuple(tensor.clone() for tensor in inputs) for _ in range(copies - 1)]


POISON = 2**32  # bytes


def poison(device):
    """Leave NaN in the memory that the next allocations get: an element that nobody writes shows in the check."""
    if device == "cuda":
        torch.cuda.empty_cache()
        small = [
            torch.full((2**18,), float("nan"), device=device) for _ in range(64)
        ]  # served from their own pool
        size = min(torch.cuda.mem_get_info()[0] // 2, POISON)
        large = torch.full((size // 4,), float("nan"), device=device)
        del small, large


def allocated(device):
    """Bytes of device memory in use now, all that captured graphs work in among them.

    0 on the CPU, where only ``peak_bytes`` can count.
    """
    if device != "cuda":
        return 0
    unseen = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if any(segment["segment_pool_id"])  # not the common pool, (0, 0)
    )
    return torch.cuda.memory_allocated() + unseen


def peak_bytes(call, device):
    """The most bytes that ``call()`` holds at once above those in use before it, its result included."""
    return with_peak(call, device)[1]


def timed(call, device):
    """(what ``call()`` returns, milliseconds by the host's clock until the device has done it)."""
    began = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, 1e3 * (time.perf_counter() - began)


def with_peak(call, device):
    """(what ``call()`` returns, its ``peak_bytes``)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    return result, highest(
        e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"
    )


def highest(changes):
    """Highest value of the running sum of allocations (+) and frees (-)."""
    now = top = 0
    for change in changes:
        now += change
        top = max(top, now)
    return top


def kernel_times(call):
    """What ``call()`` runs on the GPU: {kernel: (microseconds, launches)}, those in CUDA graphs included."""
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    times = {}
    for event in profiler.key_averages():
        if event.self_device_time_total > 0:
            before = times.get(event.key[:60], (0.0, 0))
            times[event.key[:60]] = before[0] + event.self_device_time_total, before[1] + event.count
    return times


def roofs(device):
    """What this machine reaches now: a large matmul (FLOP/s) and a copy and a read past every cache (bytes/s)."""
    n, dtype, size = (8192, torch.bfloat16, 2**30) if device == "cuda" else (1024, torch.float32, 2**27)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    calls = {
        "matmul": [lambda: torch.mm(a, b, out=product)],
        "copy": [lambda: target.copy_(source)],
        "read": [lambda: source.sum()],
    }
    times = {name: sample["ms"] / 1e3 for name, sample in Race(device, calls).run(seconds=2).items()}
    return {
        "matmul": 2 * n**3 / times["matmul"],
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "copy": 2 * source.nbytes / times["copy"],
        "read": source.nbytes / times["read"],
    }


def installed(distribution):
    """Version of a distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _output(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return None
    return done.stdout.strip().split("\n")[0] or None


def environment(device, commit=None):
    """Where and when: the device, the versions that decide its speed, the date, the commit and the measured roofs."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "commit": commit or _output("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
    }
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["cuda"] = torch.version.cuda
    else:
        names = [
            line for line in Path("/proc/cpuinfo").read_text().split("\n") if line.startswith("model name")
        ]
        facts["device"] = "CPU " + (names[0].split(":")[1].strip() if names else platform.machine())
        facts["threads"] = torch.get_num_threads()
    return facts | {"roofs": roofs(device)}
