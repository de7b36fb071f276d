"""A policy's layers and log-probs in float64, from the references of its kernels: the truth of whole layers.

Sequences of one length, each whole: tensors are (S * L, ...).
"""

import torch
import torch.nn.functional as F
from nanogrpo.kernels import QuantizedWeight, dequantize_4bit
from nanogrpo.kernels.lora_linear import lora_linear_stacked_ref
from nanogrpo.kernels.rms_norm import rms_norm_ref
from nanogrpo.kernels.rotary import rotary_ref
from nanogrpo.kernels.swiglu import swiglu_ref
from torch.utils.checkpoint import checkpoint


def wide_parameters(parameters):
    """{id of a parameter: its float64 leaf}."""
    return {id(p): p.detach().double().requires_grad_() for p in parameters}


def linear_in_float64(linear, x, wide):
    """A ``StackedLinear`` with its adapters, whose parameters are looked up in ``wide``."""
    weight = linear.weight
    if isinstance(weight, QuantizedWeight):
        weight = dequantize_4bit(weight, torch.float32)
    bias = None if linear.bias is None else linear.bias.double()
    if not linear.lora_a:
        return F.linear(x, weight.double(), bias)
    a, b = ([wide[id(p)] for p in half] for half in (linear.lora_a, linear.lora_b))
    return lora_linear_stacked_ref(x, weight.double(), a, b, linear.scaling, bias)


def layer_in_float64(layer, hidden_states, cos, sin, length, wide):
    """One ``DecoderLayer`` of Llama or Qwen2 over sequences of ``length`` tokens."""

    def sequences(x):
        return x.view(-1, length, *x.shape[1:]).transpose(1, 2)

    x = rms_norm_ref(hidden_states, layer.input_norm.double(), layer.eps)
    qkv = linear_in_float64(layer.qkv_proj, x, wide).unflatten(-1, (-1, layer.head_dim))
    q, k, v = qkv.split(layer.heads, dim=1)
    q, k, v = map(sequences, (*rotary_ref(q, k, cos.double(), sin.double()), v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1).flatten(1)
    middle = hidden_states + linear_in_float64(layer.o_proj, out, wide)
    x = rms_norm_ref(middle, layer.post_attention_norm.double(), layer.eps)
    gated = swiglu_ref(linear_in_float64(layer.gate_up_proj, x, wide))
    return middle + linear_in_float64(layer.down_proj, gated, wide)


def logprobs_in_float64(policy, ids, first, wide):
    """Log-probs (S, L - first) of the tokens from ``first`` on of ids (S, L), differentiable to ``wide``."""
    model, length = policy.model, ids.shape[1]
    angles = torch.arange(length, device=ids.device).repeat(len(ids))[:, None].float() * model.inv_freq
    hidden_states = F.embedding(ids.flatten(), model.embedding).double()
    for layer in model.layers:
        arguments = layer, hidden_states, angles.cos(), angles.sin(), length, wide
        hidden_states = checkpoint(layer_in_float64, *arguments, use_reentrant=False)
    hidden_states = rms_norm_ref(hidden_states, model.norm.double(), policy.config.rms_norm_eps)

    def of_one(x, targets):
        return (x @ model.head.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    rows = hidden_states.view(len(ids), length, -1)[:, first - 1 : -1]
    return torch.stack(
        [checkpoint(of_one, *pair, use_reentrant=False) for pair in zip(rows, ids[:, first:], strict=True)]
    )
