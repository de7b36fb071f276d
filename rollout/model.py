"""One decoder-only transformer for prefill, decode, scoring and training: Llama, Qwen2, Qwen3 and Phi-3 (Phi-4).

RMSNorm, rotary positions, grouped-query attention, SwiGLU, LoRA linears over dense or 4-bit weights. Tokens are
packed: hidden states are (T, D) with no batch dimension and no padding.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import embed, rms_norm
from .linear import STACKS, StackedLinear, share_stacks
from .recompute import LiveStep, PinnedStore, recompute_step

# With fewer rows a CPU BLAS sums in another order; from here on a row's result does not depend on the other rows.
MIN_ROWS = 16


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


class DecoderLayer(nn.Module):
    """Launches a call of 16-bit rows on CUDA, with 16-bit adapters on packed codes: 4 linears of 2 up to 256 rows on
    Hopper (large ones from 17 rows on 3; elsewhere from 17 rows on 3 or 4), with SwiGLU and the last addition in
    them, 2 norms, and attention's own, which rotates q and k; 2 more for a norm of these.
    """

    def __init__(self, config, index, weights):
        """weights: a callable from a name inside the layer ("self_attn.qkv_proj.weight") to its tensor or None."""
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        self.input_norm = weights("input_layernorm.weight")
        self.post_attention_norm = weights("post_attention_layernorm.weight")
        self.q_norm, self.k_norm = weights("self_attn.q_norm.weight"), weights("self_attn.k_norm.weight")
        sizes = {
            "qkv_proj": tuple(heads * config.head_dim for heads in self.heads),
            "o_proj": (config.hidden_size,),
            "gate_up_proj": (config.intermediate_size,) * 2,
            "down_proj": (config.hidden_size,),
        }
        for name, parts in STACKS.items():
            tensors = weights(f"{_block(name)}.{name}.weight"), weights(f"{_block(name)}.{name}.bias")
            setattr(self, name, StackedLinear(parts, sizes[name], *tensors))

    def parameters_in_use(self):
        """The adapters' parameters that take part: none where they are switched off."""
        linears = [getattr(self, name) for name in STACKS]
        return [p for linear in linears if linear.adapter_on for p in (*linear.lora_a, *linear.lora_b)]

    def forward(self, hidden_states, cos, sin, attend):
        x = rms_norm(hidden_states, self.input_norm, self.eps)
        qkv = self.qkv_proj(x)
        q, k, v = qkv.view(len(x), sum(self.heads), self.head_dim).split(self.heads, dim=1)
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        out = attend(self.index, q, k, v, cos, sin)
        out = self.o_proj(out.flatten(-2))
        x, hidden_states = rms_norm(out, self.post_attention_norm, self.eps, residual=hidden_states)
        return self.down_proj(self.gate_up_proj(x, gated=True), residual=hidden_states)


def _block(name):
    return "mlp" if name in ("gate_up_proj", "down_proj") else "self_attn"


class Transformer(nn.Module):
    """Hidden states of packed tokens. Every base weight is frozen; adapters are the only parameters.

    checkpoint_layers: keep the layers' inputs alone for backward and compute each layer a second time.
    offload_checkpoints: keep those inputs in pinned CPU memory; on a GPU only.
    """

    def __init__(self, config, weights):
        """weights: dict of Hugging Face names, as they are or stacked by ``stack_weights``, to tensors or
        ``QuantizedWeight``; ``lm_head.weight`` unless tied. Projections in it become views of their stacks."""
        super().__init__()
        self.config = config
        weights = share_stacks(weights)
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = self.embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        self.norm = weights["model.norm.weight"]
        self.inv_freq = rotary_frequencies(config).to(self.embedding.device)
        self.checkpoint_layers = self.offload_checkpoints = False
        self.copies = None  # the stream of offloaded inputs
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, lambda name, i=i: weights.get(f"model.layers.{i}.{name}"))
            for i in range(config.num_hidden_layers)
        )

    def linears(self):
        """(module name, StackedLinear) of every linear layer, in order."""
        for layer in self.layers:
            for name in STACKS:
                yield f"model.layers.{layer.index}.{_block(name)}.{name}", getattr(layer, name)

    def projections(self):
        """(Hugging Face module name, Projection) of every projection, in order."""
        for name, linear in self.linears():
            for projection in linear.projections():
                yield f"{name.rpartition('.')[0]}.{projection.name}", projection

    def forward(self, input_ids, positions, attend, steps=None):
        """input_ids, positions (T,) int64; attend: see ``attention``; steps: ``LayerSteps`` to run the layers with.

        Returns normalised hidden states (T, D).
        """
        hidden_states, cos, sin = embed(input_ids, positions, self.embedding, self.inv_freq)
        others = cos, sin, attend
        parameters = [()] * len(self.layers)
        if torch.is_grad_enabled():
            parameters = [layer.parameters_in_use() for layer in self.layers]
        differentiable = any(p.requires_grad for own in parameters for p in own)
        checkpointed, ready = differentiable and self.checkpoint_layers, None
        if steps is not None and (checkpointed or not differentiable):
            ready = steps.start(*others, differentiable=differentiable)
        store = None
        if checkpointed and self.offload_checkpoints and hidden_states.is_cuda:
            self.copies = self.copies or torch.cuda.Stream(hidden_states.device)
            store = PinnedStore(self.copies)
        for layer, own in zip(self.layers, parameters, strict=True):
            step = LiveStep(layer, others, own) if ready is None else ready[layer.index]
            if checkpointed:
                hidden_states = recompute_step(step, hidden_states, own, store)
            else:
                hidden_states = step.forward(hidden_states)
        return rms_norm(hidden_states, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden_states):
        """Float32 logits (T, V) of hidden states (T, D): for the few rows that are sampled, never for training."""
        if hidden_states.is_cuda and hidden_states.dtype != torch.float32:
            return torch.mm(hidden_states, self.head.T, out_dtype=torch.float32)
        padded = F.pad(hidden_states, (0, 0, 0, max(0, MIN_ROWS - len(hidden_states))))
        return F.linear(padded, self.head)[: len(hidden_states)].float()
