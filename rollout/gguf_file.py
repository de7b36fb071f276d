"""Llama, Qwen2 and Qwen3 weights from a GGUF file (llama.cpp's format), under Hugging Face's names and row order.

The gguf package parses the file, memory-mapped, and dequantises; this file renames the tensors, undoes llama.cpp's
permutation of the q and k rows and keeps Q4_1 linears in 4 bits where asked.
"""

import logging
import math
import re
from collections import Counter
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
import torch

from ..kernels import QuantizedWeight
from .config import ModelConfig

logger = logging.getLogger("nanogrpo")

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"
DENSE = {gguf.GGMLQuantizationType[kind] for kind in ("F64", "F32", "F16", "BF16")}
# Every Llama 3.x was trained with these three; only the factor differs (8 for 3.1, 32 for 3.2).
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_gguf(path):
    """Open a GGUF file; ``ValueError`` where it is not one, is cut short or is of an unknown architecture."""
    return GGUFFile(path)


class GGUFFile:
    """A parsed GGUF file: ``metadata`` (dict), ``config``, ``shapes`` and, one at a time, ``tensors``.

    Parsing a vocabulary of 50,000 tokens takes a second or more, so keep the object rather than open it again.
    """

    def __init__(self, path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
        try:
            reader = _Reader(self.path)
        except ValueError as error:  # the package's own do not name the file
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        self.metadata = {name: entry.contents() for name, entry in reader.fields.items()}
        self._tensors = {hf_name(tensor.name): tensor for tensor in reader.tensors}
        self._rope_freqs = self._tensors.pop(ROPE_FREQS, None)

    @cached_property
    def config(self):
        config = ModelConfig.from_gguf_metadata(
            self.metadata, tie_word_embeddings="lm_head.weight" not in self._tensors
        )
        if self._rope_freqs is None:
            return config
        scaling = llama3_rope_scaling(self._rope_freqs.data, config.rope_theta, config.head_dim)
        return ModelConfig.from_gguf_metadata(
            self.metadata, tie_word_embeddings=config.tie_word_embeddings, rope_scaling=scaling
        )

    @property
    def shapes(self):
        """Shape of every tensor by its Hugging Face name; a name with no counterpart keeps GGUF's."""
        return {name: _shape(tensor) for name, tensor in self._tensors.items()}

    def tensors(self, keep_4bit=False):
        """Yield ``(Hugging Face name, float32 tensor)`` in the file's order, each dequantised as it comes.

        With ``keep_4bit`` a Q4_1 linear inside a block comes as a ``QuantizedWeight`` of its own 4-bit codes. The log
        (logger "nanogrpo", level INFO) says once how many tensors of which quantised type lose theirs.
        """
        self._log_dequantised(keep_4bit)
        for name, tensor in self._tensors.items():
            data, shape = tensor.data, _shape(tensor)
            if self.config.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                # Rows are quantised one by one, so packed rows can be reordered like dense ones.
                data = data[rope_row_order(shape[0], self.config.head_dim)]
            if keep_4bit and _is_int4_linear(name, tensor):
                yield name, QuantizedWeight.from_gguf_q4_1(torch.from_numpy(np.array(data)), shape)
            else:
                values = gguf.quants.dequantize(data, tensor.tensor_type)
                yield name, torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))

    def _log_dequantised(self, keep_4bit):
        counts = Counter(
            tensor.tensor_type.name
            for name, tensor in self._tensors.items()
            if tensor.tensor_type not in DENSE and not (keep_4bit and _is_int4_linear(name, tensor))
        )
        if counts:
            found = ", ".join(f"{count} of {kind}" for kind, count in sorted(counts.items()))
            logger.info(
                "%s: quantised tensors dequantised to float32 as they load: %s%s", self.path, found,
                "; linears among them are quantised anew to the format asked for" if keep_4bit else "",
            )  # fmt: skip


def _is_int4_linear(name, tensor):
    is_matrix = tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1 and len(tensor.shape) == 2
    return is_matrix and name.startswith("model.layers.")


def hf_name(name):
    """Hugging Face's name of the GGUF tensor ``name``; an unknown name is returned as it is."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in BLOCK_NAMES:
        return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.{block[3]}"
    return TOP_NAMES.get(name, name)


def rope_row_order(rows, head_dim):
    """Index that puts q or k rows back into Hugging Face's order.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + head_dim / 2).
    """
    return np.arange(rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def llama3_rope_scaling(factors, rope_theta, head_dim):
    """Llama 3's ``rope_scaling`` dict from GGUF's ``rope_freqs`` (head_dim / 2 divisors of the frequencies).

    GGUF stores the divisors and not the settings that gave them: the settings are recovered and checked, and
    divisors that Llama 3's rule does not give raise ``ValueError``. All ones mean ``None``.
    """
    factors = np.asarray(factors, dtype=np.float64)
    factor = round(float(factors.max()), 4)
    if factor == 1.0:
        return None
    low, high, original = LLAMA3_ROPE.values()
    wavelengths = 2 * math.pi * rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = ((original / wavelengths - low) / (high - low)).clip(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ValueError(f"{ROPE_FREQS} does not follow Llama 3's RoPE scaling, the only one supported")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}


class _Reader(gguf.GGUFReader):
    """The gguf package's reader, which a truncated file fails with errors that name neither file nor size."""

    def __init__(self, path):
        self.path = path
        super().__init__(path)

    def _get(self, offset, dtype, count=1, override_order=None):
        # A plain array slices several times faster than np.memmap, and a vocabulary takes 10^5 slices.
        if isinstance(self.data, np.memmap):
            self.data = np.asarray(self.data)
        self._expect(offset + np.dtype(dtype).itemsize * int(count), "at least ")
        return super()._get(offset, dtype, count, override_order)

    def _build_tensors(self, start_offs, fields):
        ends = [start_offs]
        for field in fields:
            *_, dims, kind, offset = field.parts
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
            ends.append(start_offs + int(offset[0]) + math.prod(dims.tolist()) // block * size)
        self._expect(max(ends))
        super()._build_tensors(start_offs, fields)

    def _expect(self, size, bound=""):
        if size > len(self.data):
            raise ValueError(f"{self.path} is truncated: {len(self.data)} bytes, expected {bound}{size}")


def _shape(tensor):
    return tuple(reversed(tensor.shape.tolist()))
