"""Tiny random models: our policy and the transformers model of the same weights."""

import torch
import transformers
from checkpoints import random_tensors, small_config
from nanogrpo.rollout import Policy
from nanogrpo.rollout.checkpoint import FUSED
from nanogrpo.rollout.model import Transformer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class LetterTokenizer:
    """Token i is the letter chr(97 + i % 26); ``eos_token_ids`` are skipped when decoding."""

    def __init__(self, eos_token_ids=()):
        self.eos_token_ids = tuple(eos_token_ids)

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids if i not in self.eos_token_ids)

    def decode_batch(self, batch):
        return [self.decode(ids) for ids in batch]


def tiny_weights(config, seed=0):
    """Float32 weights of an ordinary scale: matrices 1.5 / sqrt(columns), norms about 1, biases about 0.5."""
    weights = {}
    for name, tensor in random_tensors(config, seed).items():
        if tensor.dim() == 2:
            weights[name] = tensor * 1.5 / tensor.shape[1] ** 0.5
        else:
            weights[name] = 0.5 * tensor if name.endswith("bias") else 1 + 0.1 * tensor
    return weights


def tiny_policy(config=None, weights=None, *, seed=0, lora=None, eos_token_ids=()):
    """A float32 CPU policy; its adapters, where asked for, have non-zero lora_b."""
    config = config or small_config()
    model = Transformer(config, weights or tiny_weights(config, seed))
    policy = Policy(model, LetterTokenizer(eos_token_ids), name="tiny")
    if lora is not None:
        policy.add_adapters(lora, seed=seed)
        perturb_adapters(policy, seed)
    return policy


def perturb_adapters(policy, seed=0):
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in policy.adapters().values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device))


class KeptSteps:
    """What ``StepGraphs`` does, with the functions themselves: states are used again with what they last held."""

    def __init__(self):
        self.captured = {}

    def get(self, key, make):
        if key not in self.captured:
            self.captured[key] = make()
        return self.captured[key]

    def clear(self):
        self.captured.clear()


def transformers_weights(config, weights):
    """``weights`` as transformers keeps them: Phi-3's projections fused, differentiably."""
    if config.architecture != "phi3":
        return weights
    fused = dict(weights)
    for layer in range(config.num_hidden_layers):
        for block, (whole, parts) in zip(("self_attn", "mlp"), FUSED.items(), strict=True):
            prefix = f"model.layers.{layer}.{block}"
            rows = [fused.pop(f"{prefix}.{part}.weight") for part in parts]
            fused[f"{prefix}.{whole}.weight"] = torch.cat(rows)
    return fused


def transformers_model(config, weights):
    """The transformers model of the same config and weights, in float32 on the CPU."""
    rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
    sizes = {
        name: getattr(config, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
        )
    }  # fmt: skip
    if config.architecture == "phi3":  # its padding token lies outside a small vocabulary
        sizes |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}[config.architecture]
    theirs = getattr(transformers, f"{family}Config")(**sizes, head_dim=config.head_dim, rope_parameters=rope)
    model = getattr(transformers, f"{family}ForCausalLM")(theirs)
    missing, unexpected = model.load_state_dict(transformers_weights(config, weights), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model.float().eval()
