"""One case, all contenders: check each against float64, count its extra memory, race them, record the outcome.

A peer that is less exact than ours is timed and its error shown; one that is plainly wrong, out of memory or broken
is not timed, and the record says why.
"""

import gc
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import NamedTuple

from measurement import Race, allocated, installed, lap_of, peak_bytes, poison, spread, timed, with_peak

RESULTS = Path(__file__).parent / "results"
SECONDS = 5  # of rounds for each case


class Peer(NamedTuple):
    """A contender: ``load()`` imports its package and returns its operation behind our bench's signature.

    ``distribution`` is the name that pip knows it by; None for what is in this tree. ``rounds``: for one whose call
    takes seconds, the rounds that it is timed in, after one call that is checked; 1: that call alone is timed.
    """

    name: str
    distribution: str | None
    load: Callable
    cuda_only: bool = False
    rounds: int | None = None


class Error(NamedTuple):
    """How far a result is from the truth, and the limit beyond which it is plainly wrong."""

    value: float
    limit: float


def distance(got, truth, limit):
    """The ``Error`` of a whole tensor: its distance from the float64 truth over the truth's norm."""
    return Error(((got.double() - truth).norm() / truth.norm()).item(), limit)


def import_alone(name):
    """Import ``package.module`` of an installed package without running the ``__init__`` of its parents.

    Training frameworks import half an ecosystem at the top; their kernels need torch and triton alone.
    """
    parents = name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        parent = ".".join(parents[:depth])
        if parent not in sys.modules:
            sys.modules[parent] = module_from_spec(find_spec(parent))
    return importlib.import_module(name)


def in_process(file, *arguments, seconds=None, ranks=None):
    """Run a benchmark's file as a script of its own; the JSON lines that it prints.

    After ``seconds`` it is ended, and what it has printed so far is all. RuntimeError where it fails. ranks: as so
    many processes of torchrun's; default one plain process.
    """
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    )
    command = [sys.executable, *launcher, file, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment, text=True) as process:
        try:
            printed, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # not killed: torchrun then ends its ranks, which would stay otherwise
            printed, _ = process.communicate()
        else:
            if process.returncode:
                raise RuntimeError(_reason(said) or f"exit code {process.returncode}")
    lines = printed.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def _reason(said):
    """The line of a failed process's stderr that says why: torchrun has more to say after it."""
    lines = said.strip().split("\n")
    return next((line for line in lines[::-1] if re.search(r"(Error|Exception): \S", line)), lines[-1])


def absent(peer, device):
    """Why this peer cannot run here, or None."""
    if peer.distribution and installed(peer.distribution) is None:
        return f"{peer.distribution} is not installed"
    return "needs CUDA" if peer.cuda_only and device != "cuda" else None


def compare(
    case, mode, device, *, peers, call, verify, flops, nbytes, floor=None, graph=False, drive=None,
    work=None, facts=None, rounds=None, seconds=None,
):  # fmt: skip
    """Measure one case; the record that ``store`` keeps and ``render`` shows.

    Args:
        case, mode: a ``cases.Case`` and what is measured of it ("forward", ...).
        device: "cuda" or "cpu".
        peers: list of ``Peer``, ours first.
        call: call(operation) -> list of callables without arguments, the timed work, one for each copy of the inputs;
            ``operation`` is what ``Peer.load`` returned.
        verify: verify(result of one such callable) -> {name: ``Error``}.
        flops, nbytes: the least work: operations, and bytes read and written once.
        floor: (name, callable): what the operation cannot beat, raced with the others.
        graph: replay CUDA graphs instead of launching; a contender that none can hold does not run, and the results
            of a replay are held against the truth as well.
        drive: see ``Race.run``.
        work: (unit, amount) that one callable does, shown as a rate: ("tokens", 1600).
        facts: facts(contenders so far) -> {name: number, or {part: number}}, what else is worth keeping of ours.
        rounds: arguments of ``Race.run`` for calls of seconds: {"warmup": 1, "fewest": 3}.
        seconds: of rounds, as many as fit; default ``SECONDS``.
    """
    results, laps = {}, {}

    def replayed(result):
        """A graph that lacks what a contender launched on another stream would be fast."""
        if reason := wrong(verify(result)):
            raise ValueError(f"replayed: {reason}")

    if floor is not None:
        laps[floor[0]] = lap_of([floor[1]], graph=graph)
        floor[1]()  # the libraries' workspaces are no contender's memory
    for position, peer in enumerate(peers):
        results[peer.name] = result = {"version": peer.distribution and installed(peer.distribution)}
        if reason := absent(peer, device):
            result["failed"] = reason
            continue
        try:
            lap = call(peer.load())
            result |= _examine(lap[0], verify, device, once=peer.rounds is not None)
            if (
                "failed" not in result and peer.rounds != 1
            ):  # a peer that no graph can hold is out, here already
                laps[peer.name] = lap_of(lap, graph=graph, check=replayed)
        except Exception as error:
            if position == 0:
                raise
            reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
            result["failed"] = reason.split("\n")[0][:120]
        gc.collect()
    ours = results[peers[0].name]
    assert "failed" not in ours, f"{peers[0].name}, {case}, {mode}: {ours['failed']}"
    race = Race(device, laps, most={peer.name: peer.rounds for peer in peers if peer.rounds is not None})
    seconds = SECONDS if seconds is None else seconds
    for name, times in race.run(seconds=seconds, drive=drive, **rounds or {}).items():
        results.setdefault(name, {}).update(times)
    more = {} if work is None else {"work": list(work)}
    more |= {} if facts is None else {"facts": facts(results)}
    return more | {
        "case": case.name, "mode": mode, "dtype": case.dtype, "shape": case.shape, "flops": flops, "bytes": nbytes,
        "floor": floor and floor[0], "ours": peers[0].name, "contenders": results,
    }  # fmt: skip


def _examine(lap, verify, device, *, once):
    """Errors and extra bytes of one contender, or why it is out. What its first call leaves behind counts.

    once: take both from one call, which for all others is a second one, with everything compiled.
    """
    poison(device)
    before, times = allocated(device), {}
    if once:
        (result, ms), peak = with_peak(lambda: timed(lap, device), device)
        times = spread([ms])
    else:
        result = lap()
    errors = verify(result)
    if reason := wrong(errors):
        return {"failed": reason}
    del result
    if not once:
        gc.collect()
        kept = allocated(device) - before
        peak = kept + peak_bytes(lap, device)
    return {"errors": {name: error.value for name, error in errors.items()}, "extra": peak, **times}


def wrong(errors):
    """What is plainly wrong of {name: ``Error``}, or None."""
    beyond = [f"{name} {error.value:.1e}" for name, error in errors.items() if not error.value <= error.limit]
    return "wrong: " + ", ".join(beyond) if beyond else None


def slug(device_name):
    return "-".join("".join(c if c.isalnum() else " " for c in device_name.lower()).split())


def store(operation, environment, record, results=RESULTS):
    """Put one record into ``results/<device>/<operation>.json``, in place of an earlier one of its case and mode."""
    path = results / slug(environment["device"]) / f"{operation}.json"
    records = json.loads(path.read_text()) if path.exists() else []
    key = lambda r: (r["case"], r["mode"])
    records = {key(r): r for r in records} | {key(record): _rounded(record | {"environment": environment})}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(list(records.values()), indent=1) + "\n")
    whole.replace(path)  # a run that is ended here leaves the records as they were


def _rounded(value):
    """Floats to five significant digits."""
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
