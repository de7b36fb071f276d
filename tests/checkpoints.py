"""Small checkpoints that tests write themselves: GGUF files and random tensors for a config."""

import gguf
import numpy as np
import torch
from nanogrpo.rollout.checkpoint import expected_tensors
from nanogrpo.rollout.config import ModelConfig
from nanogrpo.rollout.gguf_file import BLOCK_NAMES, TOP_NAMES

GGUF_NAMES = {hf: name for name, hf in (TOP_NAMES | BLOCK_NAMES).items()}


def small_config(architecture="llama", **overrides):
    """A decoder of two layers with grouped heads whose rows are whole blocks of every 4- and 8-bit format."""
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    sizes |= {"attention_bias": architecture == "qwen2", "qk_norm": architecture == "qwen3"}
    return ModelConfig(architecture, **{**sizes, **overrides})


def random_tensors(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_tensors(config).items()}


def gguf_name(hf_name):
    if hf_name in GGUF_NAMES:
        return GGUF_NAMES[hf_name]
    _, _, layer, rest = hf_name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def llama_cpp_rows(weight, head_dim):
    """llama.cpp's convert_hf_to_gguf.py: (heads, 2, head_dim / 2) -> (heads, head_dim / 2, 2)."""
    heads = weight.shape[0] // head_dim
    return weight.reshape(heads, 2, head_dim // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, config, tensors, *, kind="F32", metadata=None, extra=None):
    """Write ``tensors`` (Hugging Face names) as llama.cpp's converter does, matrices in the format ``kind``.

    ``metadata`` overrides keys (name without the architecture -> value, None leaves it out); ``extra`` adds
    tensors under GGUF's own names.
    """
    writer = gguf.GGUFWriter(path, config.architecture)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
        **(metadata or {}),
    }
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add[type(value)](key if key.startswith("tokenizer.") else f"{config.architecture}.{key}", value)
    for name, tensor in tensors.items():
        data = tensor.numpy()
        if config.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            data = np.ascontiguousarray(llama_cpp_rows(data, config.head_dim))
        quant = gguf.GGMLQuantizationType[kind if data.ndim == 2 else "F32"]
        data = data if quant == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(data, quant)
        writer.add_tensor(gguf_name(name), data, raw_dtype=quant)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
