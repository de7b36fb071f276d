"""The shapes that benchmarks run at: real models as data, and from them the cases of each operation.

A case names a problem; its tensors are drawn by the benchmark. A new operation adds one function here.
"""

from typing import NamedTuple

from nanogrpo.rollout.random_weights import SHAPES


class Model(NamedTuple):
    """A transformer's sizes. ``heads * head_dim`` need not equal ``hidden``."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    tied: bool  # the LM head is the embedding


DECODE_ROWS = 128  # completions that decode at once


def _sizes(config):
    return Model(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
        config.num_hidden_layers,
        config.tie_word_embeddings,
    )


MODELS = {name: _sizes(config) for name, config in SHAPES.items() if not name.startswith("tiny")}


class Case(NamedTuple):
    """One problem: ``shape`` holds its sizes by the names that the operation's docstring uses."""

    name: str
    dtype: str
    shape: dict

    def __str__(self):
        return self.name


def linear_logprob(device):
    """LM heads: N rows, of which ``kept`` are not masked, D hidden size, V vocabulary."""

    def head(model, rows, *, kept=None, label="rows"):
        sizes = {"N": rows, "D": MODELS[model].hidden, "V": MODELS[model].vocab}
        if kept is not None:
            sizes["kept"] = kept
        return Case(f"{model} head, {rows} {label}", "bfloat16" if device == "cuda" else "float32", sizes)

    if device == "cpu":
        return [
            head("SmolLM2-135M", 256),
            head("SmolLM2-135M", 256, kept=128, label="rows half masked"),
            head("Qwen2.5-0.5B", 64),
        ]
    return [
        head("Qwen2.5-1.5B", 8192),
        head("Qwen2.5-1.5B", 2048),
        head("Llama-3.1-8B", 4096),
        head("Phi-4", 4096),
        head("Qwen2.5-1.5B", 8192, kept=4096, label="rows half masked"),
        head("Qwen2.5-1.5B", DECODE_ROWS, label="rows (a decode step)"),
    ]


def policy_loss(device):
    """Batches of B completions of T tokens at most."""
    sizes = [(64, 1024)] if device == "cpu" else [(64, 1024), (512, 4096)]
    return [Case(f"{B} completions of up to {T} tokens", "float32", {"B": B, "T": T}) for B, T in sizes]


def matmul_4bit(device):
    """Frozen linears of models' feed-forward blocks: M rows, K inputs, N outputs."""

    def linears(model, rows):
        hidden, ffn = MODELS[model].hidden, MODELS[model].ffn
        dtype = "bfloat16" if device == "cuda" else "float32"
        shapes = {"up": (hidden, ffn), "down": (ffn, hidden)}
        for name, (K, N) in shapes.items():
            for M in rows:
                yield Case(f"{model} {name}, {M} rows", dtype, {"M": M, "K": K, "N": N})

    if device == "cpu":
        return [*linears("SmolLM2-135M", (1, 64, 512))]
    rows = (1, 8, 16, 64, 256, 2048, 8192)
    return [case for model in ("Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.1-8B") for case in linears(model, rows)]


def lora_linear(device):
    """Frozen linears of models' feed-forward blocks with an adapter: M rows, K inputs, N outputs, rank r."""

    def linears(model, rows, r, names=("up", "down")):
        hidden, ffn = MODELS[model].hidden, MODELS[model].ffn
        dtype = "bfloat16" if device == "cuda" else "float32"
        shapes = {"up": (hidden, ffn), "down": (ffn, hidden)}
        for name in names:
            K, N = shapes[name]
            for M in rows:
                sizes = {"M": M, "K": K, "N": N, "r": r}
                yield Case(f"{model} {name}, rank {r}, {M} rows", dtype, sizes)

    if device == "cpu":
        return [*linears("SmolLM2-135M", (64, 512), 16)]
    rows = (512, 2048, 8192)
    return [*linears("Qwen2.5-1.5B", rows, 64), *linears("Llama-3.1-8B", rows, 16, names=("up",))]


def dequantize(device):
    """Weights (N, K) of models' feed-forward blocks."""
    models = ("SmolLM2-135M",) if device == "cpu" else ("Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.1-8B")
    dtype = "bfloat16" if device == "cuda" else "float32"
    return [
        Case(f"{model} up", dtype, {"N": MODELS[model].ffn, "K": MODELS[model].hidden}) for model in models
    ]
