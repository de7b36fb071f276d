"""Policies with random weights and adapters that change their outputs, built once for the files that share them."""

import functools

import torch
from nanogrpo.rollout import LoraConfig
from nanogrpo.rollout.random_weights import random_policy


@functools.lru_cache(maxsize=2)
def policy_of(model, quantize, r, device, adapters="float32", spread=0.1):
    """adapters: their dtype; spread: standard deviation of what is added to them, lora_b among them."""
    lora = LoraConfig(r=r, alpha=r, dtype=adapters) if r else None
    policy = random_policy(model, quantize, lora, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in policy.adapters().values():
        drawn = torch.randn(parameter.shape, generator=generator, device=device)
        parameter.data += (spread * drawn).to(parameter.dtype)
    return policy
