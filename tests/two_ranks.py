"""The command line with the tiny policy, as torchrun starts it on each rank: arguments are those of ``nanogrpo``.

A folder in NANOGRPO_TEST_ADAPTERS gets each rank's adapters; NANOGRPO_TEST_DIES names a rank that ends in step 3.
"""

import os
import sys

import pytest
import tiny_run
import torch
from nanogrpo.grpo import GRPOTrainer
from nanogrpo.grpo.__main__ import main
from safetensors.torch import save_file

torch.set_num_threads(1)
patch = pytest.MonkeyPatch()
tiny_run.install(patch.setattr, patch.setitem)
trainers, original = [], GRPOTrainer.step


def step(trainer):
    if os.environ.get("NANOGRPO_TEST_DIES") == str(trainer.ranks.rank) and trainer.step_count == 2:
        os._exit(9)
    trainers[:] = [trainer]
    return original(trainer)


GRPOTrainer.step = step
code = main(sys.argv[1:])
if code == 0 and "NANOGRPO_TEST_ADAPTERS" in os.environ:
    rank = trainers[0].ranks.rank
    save_file(tiny_run.adapters(trainers[0]), f"{os.environ['NANOGRPO_TEST_ADAPTERS']}/{rank}.safetensors")
sys.exit(code)
