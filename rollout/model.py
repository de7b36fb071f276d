"""One decoder-only transformer for prefill, decode, scoring and training: Llama, Qwen2, Qwen3 and Phi-3 (Phi-4).

RMSNorm, rotary positions, grouped-query attention, SwiGLU, LoRA linears over dense or 4-bit weights. Tokens are
packed: hidden states are (T, D) with no batch dimension and no padding.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..kernels import QuantizedWeight, lora_linear, matmul_4bit

# With fewer rows a CPU BLAS sums in another order; from here on a row's result does not depend on the other rows.
MIN_ROWS = 16
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """A frozen dense or 4-bit weight (N, K) with an optional trainable low-rank adapter in float32."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.lora_a = self.lora_b = None
        self.scaling = 0.0
        self.adapter_on = True

    def add_adapter(self, r, alpha, generator):
        """Attach lora_a (r, K), uniform in +-1/sqrt(K) (Kaiming with a = sqrt 5, as PEFT), and lora_b (N, r) = 0."""
        n, k = self.weight.shape
        device = self.weight.device
        bound = 1 / math.sqrt(k)
        lora_a = torch.empty(r, k).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(lora_a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(n, r, device=device))
        self.scaling = alpha / r

    def forward(self, x):
        if self.lora_a is not None and self.adapter_on:
            return lora_linear(x, self.weight, self.lora_a, self.lora_b, self.scaling, self.bias)
        if isinstance(self.weight, QuantizedWeight):
            return matmul_4bit(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once to the dtype of x."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotary_frequencies(config):
    """Inverse frequencies (head_dim / 2,) float32 of RoPE, with Llama 3.1's scaling where the config asks for it."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (blend + (1 - blend) / scaling["factor"])


def rotate(x, cos, sin):
    """Rotary embedding in the half-split layout: x (T, H, D), cos and sin (T, 1, D/2) float32."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


class DecoderLayer(nn.Module):
    def __init__(self, config, index, weights):
        """weights: a callable from a name inside the layer ("self_attn.q_proj.weight") to its tensor or None."""
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.input_norm = weights("input_layernorm.weight")
        self.post_attention_norm = weights("post_attention_layernorm.weight")
        self.q_norm, self.k_norm = weights("self_attn.q_norm.weight"), weights("self_attn.k_norm.weight")
        for name in LINEARS:
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            linear = LoraLinear(weights(f"{block}.{name}.weight"), weights(f"{block}.{name}.bias"))
            setattr(self, name, linear)

    def forward(self, hidden_states, cos, sin, attend):
        x = rms_norm(hidden_states, self.input_norm, self.eps)
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        out = attend(self.index, rotate(q, cos, sin), rotate(k, cos, sin), v)
        hidden_states = hidden_states + self.o_proj(out.flatten(-2))
        x = rms_norm(hidden_states, self.post_attention_norm, self.eps)
        return hidden_states + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Transformer(nn.Module):
    """Hidden states of packed tokens. Every base weight is frozen; adapters are the only parameters."""

    def __init__(self, config, weights):
        """weights: dict of Hugging Face names to tensors or ``QuantizedWeight``; ``lm_head.weight`` unless tied."""
        super().__init__()
        self.config = config
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = self.embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        self.norm = weights["model.norm.weight"]
        self.inv_freq = rotary_frequencies(config).to(self.embedding.device)
        self.checkpoint_layers = False
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, lambda name, i=i: weights.get(f"model.layers.{i}.{name}"))
            for i in range(config.num_hidden_layers)
        )

    def linears(self):
        """(Hugging Face module name, LoraLinear) of every projection, in order."""
        for layer in self.layers:
            for name in LINEARS:
                block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                yield f"model.layers.{layer.index}.{block}.{name}", getattr(layer, name)

    def forward(self, input_ids, positions, attend):
        """input_ids, positions (T,) int64; attend: see ``attention``. Returns normalised hidden states (T, D)."""
        angles = positions[:, None].float() * self.inv_freq
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        hidden_states = F.embedding(input_ids, self.embedding)
        for layer in self.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                hidden_states = checkpoint(layer, hidden_states, cos, sin, attend, use_reentrant=False)
            else:
                hidden_states = layer(hidden_states, cos, sin, attend)
        return rms_norm(hidden_states, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden_states):
        """Float32 logits (T, V) of hidden states (T, D): for the few rows that are sampled, never for training."""
        if hidden_states.is_cuda and hidden_states.dtype != torch.float32:
            return torch.mm(hidden_states, self.head.T, out_dtype=torch.float32)
        padded = F.pad(hidden_states, (0, 0, 0, max(0, MIN_ROWS - len(hidden_states))))
        return F.linear(padded, self.head)[: len(hidden_states)].float()
