"""Our policies as the libraries' models: transformers' classes, bitsandbytes' linears, PEFT's adapters, our values.

So the peers compute the same function as ours, and are held against the same truth. Their packages are imported when
a peer is loaded.
"""

import torch
from nanogrpo.kernels import QuantizedWeight, dequantize_4bit


def linear4bit(weight, bias=None, *, nested=False):
    """bitsandbytes' NF4 linear of a dense weight (N, K), which it quantises; nested: its scales in 8 bits too."""
    import bitsandbytes

    linear = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias is not None, weight.dtype, nested, "nf4", device="meta"
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        weight.detach(), requires_grad=False, blocksize=64, compress_statistics=nested, quant_type="nf4"
    )
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    return linear.to(weight.device)


def lora(base, lora_a, lora_b, alpha):
    """PEFT's adapter of these values on one linear, 4-bit or dense."""
    holder = torch.nn.ModuleDict({"linear": base})
    _inject(holder, len(lora_a), alpha, ["linear"])
    _fill(holder["linear"], lora_a, lora_b)
    return holder["linear"]


def causal_lm(policy, layers=None):
    """transformers' model of ``policy`` (its first ``layers``), 4-bit where it is, with its values and adapters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config, model = policy.config, policy.model
    described = AutoConfig.for_model(
        config.architecture,
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=layers or config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim, rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(policy.device):
        peer = AutoModelForCausalLM.from_config(described, dtype=policy.dtype)
    peer.requires_grad_(False)
    peer.model.embed_tokens.weight.data = model.embedding
    peer.lm_head.weight = (
        peer.model.embed_tokens.weight if model.head is model.embedding else _frozen(model.head)
    )
    peer.model.norm.weight.data = model.norm
    for layer, own in zip(peer.model.layers, model.layers, strict=False):
        layer.input_layernorm.weight.data = own.input_norm
        layer.post_attention_layernorm.weight.data = own.post_attention_norm
    projections = [
        (name, own) for name, own in policy.model.projections() if _layer(name) < len(peer.model.layers)
    ]
    for name, own in projections:
        weight, bias = own.weight, bias_of(own)
        if isinstance(weight, QuantizedWeight):
            peer.set_submodule(name, linear4bit(dequantize_4bit(weight, policy.dtype), bias))
            continue
        linear = peer.get_submodule(name)
        linear.weight = _frozen(weight)
        linear.bias = None if bias is None else _frozen(bias)
    adapted = [(name, own) for name, own in projections if own.lora_a is not None]
    if adapted:
        _inject(peer, policy.lora.r, policy.lora.alpha, list(policy.lora.targets))
        for name, own in adapted:
            _fill(peer.get_submodule(name), own.lora_a, own.lora_b)
    return peer


def _inject(module, r, alpha, targets):
    from peft import LoraConfig, inject_adapter_in_model

    module.is_loaded_in_4bit = True  # what PEFT asks before it knows a 4-bit linear
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, target_modules=targets), module)


def _fill(linear, lora_a, lora_b):
    for half, values in ((linear.lora_A, lora_a), (linear.lora_B, lora_b)):
        half["default"].weight = torch.nn.Parameter(values.detach().clone())


def _frozen(tensor):
    return torch.nn.Parameter(tensor, requires_grad=False)


def _layer(name):
    return int(name.split(".")[2])


def bias_of(projection):
    linear = projection.linear
    if linear.bias is None:
        return None
    return linear.bias.split(linear.sizes)[projection.index].contiguous()
