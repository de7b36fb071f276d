"""Profiles, the ``gpu`` and ``oracle`` markers, NaN-filled allocations and the device that kernel tests run on."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("NANOGRPO_CHECK", "1")  # read when nanogrpo.kernels is imported, later
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("dev", max_examples=10, **COMMON)
settings.register_profile("ci", max_examples=10 if INTERPRET else 25, derandomize=True, **COMMON)
settings.register_profile("interpreter", max_examples=8, derandomize=True, **COMMON)
settings.register_profile("nightly", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "interpreter" if INTERPRET else "dev"))


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("oracle") and "oracle" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="make test-oracles"))


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    """torch.empty returns NaN (integers: the largest value), so that an unwritten output cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)
