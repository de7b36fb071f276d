"""Tensors in, tensors out: the operations that make GRPO fit and run fast. Needs torch and triton, nothing else."""

from .kv_store import store_kv
from .linear_logprob import LogprobOutput, fused_linear_logprob
from .lora_linear import lora_linear
from .matmul_4bit import matmul_4bit
from .paged_attention import append_attention, paged_attention
from .quantization import QuantizedWeight, dequantize_4bit, quantize_4bit

__all__ = [
    "LogprobOutput",
    "QuantizedWeight",
    "append_attention",
    "dequantize_4bit",
    "fused_linear_logprob",
    "lora_linear",
    "matmul_4bit",
    "paged_attention",
    "quantize_4bit",
    "store_kv",
]
