"""Compile every Triton launch of a call for a card that is not there, and hold it to its shared memory."""

import contextlib
import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program, by compute capability
every_card = pytest.mark.parametrize("cc", sorted(SHARED_LIMIT))


class _Driver:
    """Enough of a Triton driver to compile: the compute capability doubles as the device id and cache key."""

    def __init__(self, cc):
        self.cc = cc

    def get_current_device(self):
        return self.cc

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.cc, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def recorded_launches(cc):
    """Inside, launches on CPU tensors are compiled for compute capability ``cc`` and recorded, not run."""
    from nanogrpo.kernels import _runtime

    launches, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((self.fn.__name__, compiled))
        return compiled

    previous = driver._active if hasattr(driver, "_active") else None
    driver.set_active(_Driver(cc))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(_runtime, "arch", lambda device: cc),
        ):
            yield launches
    finally:
        driver._active = previous


def resource_usage(compiled, folder):
    """{"REG": registers a thread, "STACK": bytes of spilled ones and the like, ...} of a compiled kernel's cubin."""
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    told = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"\b([A-Z]+):(\d+)", told)}


def assert_resident(launches, folder):
    """A multiprocessor has 65,536 registers, given out by eights: one program of each launch must fit."""
    for name, compiled in launches:
        lanes, each = 32 * compiled.metadata.num_warps, -(-resource_usage(compiled, folder)["REG"] // 8) * 8
        assert lanes * each <= 65536, f"{name}: {each} registers for each of {lanes} threads"


def assert_compiles(launcher, cc, expected_kernels):
    """Run ``launcher()`` on CPU tensors; each kernel named must compile for ``cc`` within its shared memory.

    Returns the launches, (name, compiled kernel) each.
    """
    with recorded_launches(cc) as launches:
        launcher()
    assert {name for name, _ in launches} == set(expected_kernels)
    for name, compiled in launches:
        assert compiled.metadata.target.arch == cc
        used = compiled.metadata.shared / 1024
        assert used <= SHARED_LIMIT[cc], f"{name}: {used:.1f} KiB of shared memory on sm_{cc}"
    return launches
