"""Published shapes with random weights: what speed and memory depend on, without anybody's checkpoint.

Weights are drawn with a standard deviation of 0.02, norms are 1: activations stay finite and the logits small, so
that no completion ends early. The tokenizer is the packaged SmolLM2's, whose ids lie inside every vocabulary here.
"""

import difflib
from dataclasses import replace

import torch

from .checkpoint import expected_tensors, open_checkpoint, resolve_checkpoint
from .config import ModelConfig
from .host_memory import in_host_memory, laid_out_again
from .linear import quantized, stack_weights
from .lora import DEFAULT_LORA
from .model import Transformer
from .policy import Policy, choose_device, is_linear, stays_in_host_memory

STD = 0.02


def _llama3_rope(factor):
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _shape(
    architecture, vocab, hidden, inner, layers, heads, kv_heads, head_dim, context, tied, theta, rope=None
):
    return ModelConfig(
        architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rms_norm_eps=1e-6 if architecture == "qwen2" else 1e-5,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        attention_bias=architecture == "qwen2",
        rope_scaling=rope,
    )


# From each model's config.json: vocabulary, hidden, feed-forward, layers, heads, key-value heads, head size, context.
SHAPES = {
    "SmolLM2-135M": _shape("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, True, 1e5),
    "Qwen2.5-0.5B": _shape("qwen2", 151936, 896, 4864, 24, 14, 2, 64, 32768, True, 1e6),
    "Qwen2.5-1.5B": _shape("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, 32768, True, 1e6),
    "Qwen2.5-7B": _shape("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 32768, False, 1e6),
    "Llama-3.2-1B": _shape("llama", 128256, 2048, 8192, 16, 32, 8, 64, 131072, True, 5e5, _llama3_rope(32.0)),
    "Llama-3.1-8B": _shape(
        "llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072, False, 5e5, _llama3_rope(8.0)
    ),
    "Phi-4": _shape("phi3", 100352, 5120, 17920, 40, 40, 10, 128, 16384, False, 2.5e5),
    # For tests: every architecture's parts in a few million parameters.
    "tiny-llama": _shape("llama", 49152, 64, 128, 2, 4, 2, 32, 2048, True, 1e4, _llama3_rope(8.0)),
    "tiny-qwen2": _shape("qwen2", 49152, 64, 128, 2, 4, 1, 32, 2048, True, 1e4),
    "tiny-phi3": _shape("phi3", 49152, 64, 128, 2, 4, 2, 32, 2048, False, 1e4),
}


def find_shape(name):
    """(name as written in ``SHAPES``, its ``ModelConfig``), whatever the case; ValueError with the nearest name."""
    known = {shape.lower(): shape for shape in SHAPES}
    if str(name).lower() not in known:
        nearest = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown shape {name!r}; nearest is {nearest!r}, expected one of {', '.join(known)}"
        )
    return known[name.lower()], SHAPES[known[name.lower()]]


def random_policy(name, quantize=None, lora=DEFAULT_LORA, device=None, dtype=None, seed=0):
    """A policy of the named shape with random weights, drawn and quantised tensor by tensor on the device.

    name: a key of ``SHAPES``, in any case; the others as ``Policy.load`` has them. Beside the finished weights, at
    most one tensor in ``dtype`` (and, quantising it, a few MiB) is alive. The same arguments give the same weights
    on the same kind of device. Raises ValueError for an unknown name or format.
    """
    if quantize not in (None, "nf4", "int4"):
        raise ValueError(f'quantize must be "nf4", "int4" or None, got {quantize!r}')
    name, config = find_shape(name)
    device = choose_device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer = open_checkpoint(resolve_checkpoint()).tokenizer
    config = replace(config, bos_token_id=tokenizer.bos_token_id, eos_token_ids=tokenizer.eos_token_ids)
    generator = torch.Generator(device).manual_seed(seed)
    far = stays_in_host_memory(config, quantize, device)

    def drawn():
        for tensor_name, shape in expected_tensors(config).items():
            if tensor_name.endswith("norm.weight"):
                yield tensor_name, torch.ones(shape, device=device, dtype=dtype)
                continue
            tensor = torch.empty(shape, device=device, dtype=dtype).normal_(std=STD, generator=generator)
            if quantize is not None and is_linear(tensor_name):
                tensor = quantized(tensor, quantize, tensor_name)
            yield tensor_name, in_host_memory(tensor) if tensor_name == far else tensor

    weights = dict(stack_weights(drawn()))
    if quantize is not None and device.type == "cuda":
        weights = laid_out_again(weights, device, but=far)
    policy = Policy(Transformer(config, weights), tokenizer, name=f"{name} with random weights")
    if lora is not None:
        policy.add_adapters(lora, seed=seed)
    return policy
