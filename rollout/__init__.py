"""A policy that can speak: weights, transformer, tokenizer, paged KV cache, sampler."""

from .checkpoint import Checkpoint, open_checkpoint, resolve_checkpoint
from .config import ModelConfig
from .lora import LoraConfig
from .packing import pack_tree, split_by_budget
from .policy import Policy
from .sampler import Completion, Sampler
from .sampling import SamplingParams
from .tokenizer import Tokenizer

__all__ = [
    "Checkpoint",
    "Completion",
    "LoraConfig",
    "ModelConfig",
    "Policy",
    "Sampler",
    "SamplingParams",
    "Tokenizer",
    "open_checkpoint",
    "pack_tree",
    "resolve_checkpoint",
    "split_by_budget",
]
