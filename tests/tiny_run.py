"""A policy of a few thousand random weights with a tokenizer of characters, and a reward that it can vary."""

import os
import sys
from pathlib import Path

import torch
from nanogrpo.grpo.config import GRPOConfig
from nanogrpo.grpo.rewards import REWARDS, WeightedReward
from nanogrpo.grpo.trainer import GRPOTrainer
from nanogrpo.rollout import LoraConfig, ModelConfig, Policy
from nanogrpo.rollout.checkpoint import expected_tensors
from nanogrpo.rollout.model import Transformer

CONFIG = ModelConfig(
    "llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    eos_token_ids=(0,),
)

# What a step reports.
FIELDS = {
    "step", "loss", "lr", "grad_norm", "reward", "reward_std", "completion_length", "kl", "signal_share",
    "truncated_share", "completion_tokens", "trained_tokens", "sampler_logprob_diff_max",
    "sampler_logprob_diff_mean", "skipped", "token_budget", "seconds_rollout", "seconds_reward",
    "seconds_scoring", "seconds_forward", "seconds_backward", "seconds_optimizer",
}  # fmt: skip


class CharTokenizer:
    """Printable ASCII characters are tokens 1 to 95; 0 ends a completion."""

    eos_token_ids = (0,)

    def encode(self, text):
        return [ord(char) - 31 if " " <= char <= "~" else 95 for char in text]

    def decode(self, ids):
        return "".join(chr(i + 31) for i in ids if i)

    def decode_batch(self, batch):
        return [self.decode(ids) for ids in batch]

    def apply_chat_template(self, messages):
        return self.encode("~".join(message["content"] for message in messages) + "~")


def tiny_policy(config=None, seed=0):
    """A stand-in for ``load_policy``: in float32 on the CPU where the config does not say."""
    device = torch.device(config and config.device or "cpu")
    dtype = getattr(torch, config and config.dtype or "float32")
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_tensors(CONFIG).items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = (1 + 0.1 * noise if len(shape) == 1 else 0.25 * noise).to(device, dtype)
    policy = Policy(Transformer(CONFIG, weights), CharTokenizer(), name="tiny")
    policy.add_adapters(LoraConfig(r=2, alpha=4), seed=seed)
    policy.model.checkpoint_layers = device.type == "cuda"
    return policy


def odd(completion, example):
    """The share of tokens with an odd id: some of it everywhere, so that groups have signal."""
    return sum(token % 2 for token in completion.token_ids) / len(completion.token_ids)


def settings(**overrides):
    """Settings of a run that takes milliseconds a step."""
    small = {
        "steps": 4, "group_size": 4, "prompts_per_step": 2, "max_completion_length": 5, "held_out": 3,
        "lora_r": 2, "lora_alpha": 4.0, "lr": 1e-2, "warmup_steps": 0, "temperature": 1.0,
    }  # fmt: skip
    return {**small, **overrides}


def tiny_trainer(rewards=odd, **overrides):
    functions = rewards if isinstance(rewards, (list, tuple)) else [rewards]
    config = GRPOConfig(**settings(**overrides))
    return GRPOTrainer(config, tiny_policy(), rewards=[WeightedReward(f, 1.0) for f in functions])


def adapters(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.policy.adapters().items()}


def wake(trainer, seed=1):
    """Give lora_b values, without which lora_a has no gradient and the KL to the base is 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainer.policy.adapters().items():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def install(setattr, setitem):
    """Make runs use the tiny policy and know the reward "odd"; both as ``pytest.MonkeyPatch`` has them."""
    setattr("nanogrpo.grpo.trainer.load_policy", tiny_policy)
    setitem(REWARDS, "odd", odd)


def environment():
    """That of a child process which finds the modules that this one does, and those beside this file."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
