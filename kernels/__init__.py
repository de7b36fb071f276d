"""Tensors in, tensors out: the operations that make GRPO fit and run fast. Needs torch and triton, nothing else."""

from .decode_rows import advance_rows
from .embedding import embed
from .head_sampling import sample_from_head
from .kv_store import store_kv
from .linear_logprob import LogprobOutput, fused_linear_logprob
from .lora_linear import lora_linear, lora_linear_stacked
from .matmul_4bit import matmul_4bit
from .paged_attention import append_attention, paged_attention
from .quantization import QuantizedWeight, dequantize_4bit, quantize_4bit
from .rms_norm import rms_norm
from .rotary import rotary
from .swiglu import swiglu
from .token_sampling import counter_uniform, sample_tokens
from .tree_attention import tree_attention, tree_plan

__all__ = [
    "LogprobOutput",
    "QuantizedWeight",
    "advance_rows",
    "append_attention",
    "counter_uniform",
    "dequantize_4bit",
    "embed",
    "fused_linear_logprob",
    "lora_linear",
    "lora_linear_stacked",
    "matmul_4bit",
    "paged_attention",
    "quantize_4bit",
    "rms_norm",
    "rotary",
    "sample_from_head",
    "sample_tokens",
    "store_kv",
    "swiglu",
    "tree_attention",
    "tree_plan",
]
