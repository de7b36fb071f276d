"""What ``--algorithm`` stands for: a loss preset, with its own advantages and KL, and the objective around it."""

import difflib
from dataclasses import dataclass

from .loss import PRESETS, LossConfig


@dataclass(frozen=True)
class Algorithm:
    """loss: a preset; objective: what builds batches and losses around it, a key of ``OBJECTIVES``."""

    name: str
    loss: LossConfig
    objective: str = "policy"


ALGORITHMS = {name: Algorithm(name, loss) for name, loss in PRESETS.items() if name != "ppo"} | {
    "ppo": Algorithm("ppo", PRESETS["ppo"], objective="ppo"),
    # Ranks completions instead of weighing them: of the preset it takes the place of a KL penalty alone.
    "online_dpo": Algorithm("online_dpo", PRESETS["grpo"], objective="online_dpo"),
}


def find_algorithm(name):
    """The algorithm of that name; ValueError with the nearest name where there is none."""
    if name not in ALGORITHMS:
        nearest = difflib.get_close_matches(str(name), ALGORITHMS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"algorithm: got {name!r}, nearest is {nearest!r}, expected one of {', '.join(ALGORITHMS)}"
        )
    return ALGORITHMS[name]
