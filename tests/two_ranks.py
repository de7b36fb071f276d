"""The command line with the tiny policy, as torchrun starts it on each rank: arguments are those of ``nanogrpo``.

A folder in NANOGRPO_TEST_ADAPTERS gets each rank's adapters. NANOGRPO_TEST_DIES names a rank that ends in step 3 and
where: "1 step", at its beginning, or "1 sum", while the other adds up gradients.
"""

import os
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from nanogrpo.grpo import GRPOTrainer, distributed
from nanogrpo.grpo.__main__ import main
from safetensors.torch import save_file

torch.set_num_threads(1)
patch = pytest.MonkeyPatch()
tiny_run.install(patch.setattr, patch.setitem)
trainers, step, sum_gradients = [], GRPOTrainer.step, distributed.Ranks.sum_gradients


def may_die(place):
    [trainer] = trainers
    if os.environ.get("NANOGRPO_TEST_DIES") == f"{trainer.ranks.rank} {place}" and trainer.step_count == 2:
        os._exit(9)


def watched_step(trainer):
    trainers[:] = [trainer]
    may_die("step")
    return step(trainer)


def watched_sum(ranks, parameters):
    may_die("sum")
    sum_gradients(ranks, parameters)


patch.setattr(GRPOTrainer, "step", watched_step)
patch.setattr(distributed.Ranks, "sum_gradients", watched_sum)
patch.setattr(distributed, "BUCKET", 100)  # values: several sums a step
code = main(sys.argv[1:])
if code == 0 and "NANOGRPO_TEST_ADAPTERS" in os.environ:
    rank = trainers[0].ranks.rank
    save_file(tiny_run.adapters(trainers[0]), f"{os.environ['NANOGRPO_TEST_ADAPTERS']}/{rank}.safetensors")
if code == 0:  # a thread of Gloo's that asks for the interpreter while that ends now and then aborts it
    assert not any("gloo" in name.read_text() for name in Path("/proc/self/task").glob("*/comm"))
sys.exit(code)
