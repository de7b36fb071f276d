"""The meter of a step: nested phases, none counted twice; memory on CUDA."""

import time

import pytest
import torch
from nanogrpo.grpo.measurement import PHASES, StepMeter, unmeasured
from tiny_run import tiny_trainer


def test_time_belongs_to_the_innermost_phase():
    meter = StepMeter(torch.device("cpu"))
    start = time.perf_counter()
    with meter("forward"):
        time.sleep(0.02)
        with meter("scoring"):
            time.sleep(0.05)
        time.sleep(0.01)
    time.sleep(0.02)  # in no phase
    with meter("forward"):
        time.sleep(0.01)
    total, seconds = time.perf_counter() - start, meter.metrics()
    assert set(seconds) == {f"seconds_{phase}" for phase in PHASES}
    assert seconds["seconds_forward"] >= 0.04 and seconds["seconds_scoring"] >= 0.05
    assert sum(seconds.values()) <= total - 0.02
    assert seconds["seconds_rollout"] == 0


def test_a_phase_that_raises_has_ended():
    meter = StepMeter(torch.device("cpu"))
    with pytest.raises(KeyError), meter("forward"), meter("scoring"):
        raise KeyError
    assert meter.running == []


def test_unmeasured_does_nothing():
    with unmeasured("forward"):
        pass


def test_the_phases_of_a_step_are_most_of_it():
    trainer = tiny_trainer(kl_coef=0.1, prompts_per_step=4, max_completion_length=20)
    trainer.step()
    start = time.perf_counter()
    metrics = trainer.step()
    total = time.perf_counter() - start
    phases = {name: metrics[f"seconds_{name}"] for name in PHASES}
    assert all(value > 0 for value in phases.values()), phases
    assert 0.6 * total <= sum(phases.values()) <= total


@pytest.mark.gpu
def test_memory_on_cuda():
    meter = StepMeter(torch.device("cuda", torch.cuda.current_device()))
    with meter("forward"):
        block = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
        del block
    metrics = meter.metrics()
    assert metrics["memory_card"] >= metrics["memory_reserved"] >= metrics["memory_allocated"] >= 64 << 20
