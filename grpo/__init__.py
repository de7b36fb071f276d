"""Learning from what a policy said: rewards, advantages, loss, trainer.

``GRPOTrainer`` is loaded when first asked for, so that the loss and the advantages need torch alone.
"""

from .advantages import (
    gae_advantages,
    group_advantages,
    group_has_signal,
    multi_reward_advantages,
    whiten,
)
from .config import GRPOConfig
from .loss import (
    PRESETS,
    LossConfig,
    LossOutput,
    entropy_quantile,
    kl_penalty,
    kl_reward_penalty,
    loss_denominator,
    policy_loss,
    preset,
)
from .rollout_batch import RolloutBatch

__all__ = [
    "PRESETS",
    "GRPOConfig",
    "GRPOTrainer",
    "LossConfig",
    "LossOutput",
    "RolloutBatch",
    "entropy_quantile",
    "gae_advantages",
    "group_advantages",
    "group_has_signal",
    "kl_penalty",
    "kl_reward_penalty",
    "loss_denominator",
    "multi_reward_advantages",
    "policy_loss",
    "preset",
    "whiten",
]


def __getattr__(name):
    if name == "GRPOTrainer":
        from .trainer import GRPOTrainer

        return GRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
