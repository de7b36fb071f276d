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
    rows = (1, 8, 16, 64, 256, 2048, 8192)  # of which int4 leaves out some: bench_matmul_4bit
    return [case for model in ("Qwen2.5-1.5B", "Llama-3.1-8B", "Qwen2.5-7B") for case in linears(model, rows)]


def dequantize(device):
    """Weights (N, K) of models' feed-forward blocks."""
    models = ("SmolLM2-135M",) if device == "cpu" else ("Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.1-8B")
    dtype = "bfloat16" if device == "cuda" else "float32"
    return [
        Case(f"{model} up", dtype, {"N": MODELS[model].ffn, "K": MODELS[model].hidden}) for model in models
    ]


def lora_linear(device):
    """Linears with adapters of rank r: M rows, K inputs, N outputs."""

    def linear(model, name, r, rows):
        K, N = MODELS[model].hidden, MODELS[model].ffn
        K, N = (K, N) if name == "up" else (N, K)
        dtype = "bfloat16" if device == "cuda" else "float32"
        return [
            Case(f"{model} {name}, r={r}, {M} rows", dtype, {"M": M, "K": K, "N": N, "r": r}) for M in rows
        ]

    if device == "cpu":
        return linear("SmolLM2-135M", "up", 16, (256,))
    rows = (512, 2048, 8192)
    return [
        *linear("Qwen2.5-1.5B", "up", 64, rows),
        *linear("Qwen2.5-1.5B", "down", 64, rows),
        *linear("Llama-3.1-8B", "up", 16, rows),
    ]


def decode_linears(device):
    """The four linears of a layer as a decode step calls them: M rows, ranks of r."""
    model, r, all_rows = ("tiny-qwen2", 8, (3,)) if device == "cpu" else ("Qwen2.5-1.5B", 64, (8, 64, 256))
    dtype = "bfloat16" if device == "cuda" else "float32"
    return [Case(f"{model} layer, r={r}, {M} rows", dtype, {"M": M, "r": r}) for M in all_rows]


def tree_attention(device):
    """Packed trees: a prefix of ``prefix`` tokens and ``branches`` of ``length`` tokens, of H / KVH heads of D."""

    def tree(model, branches, length, prefix=0):
        m = MODELS[model]
        sizes = {"prefix": prefix, "branches": branches, "length": length}
        name = f"{prefix} + " * (prefix > 0) + f"{branches} x {length} tokens, {model} heads"
        heads = {"H": m.heads, "KVH": m.kv_heads, "D": m.head_dim}
        return Case(name, "bfloat16" if device == "cuda" else "float32", sizes | heads)

    if device == "cpu":
        return [tree("SmolLM2-135M", 4, 64), tree("SmolLM2-135M", 4, 32, prefix=48)]
    return [
        tree(model, *sizes)
        for model in ("Qwen2.5-1.5B", "Llama-3.1-8B")
        for sizes in ((8, 328), (8, 1152), (8, 200, 128), (16, 512, 1024))
    ]


def paged_attention(device):
    """Decode steps of S sequences with C tokens of context, the first ``shared`` of which are stored once."""

    def step(model, S, C, shared=0):
        m = MODELS[model]
        sizes = {"S": S, "C": C, "shared": shared, "H": m.heads, "KVH": m.kv_heads, "D": m.head_dim}
        name = f"{model}, {S} sequences of {C} tokens" + f", {shared} shared" * (shared > 0)
        return Case(name, "bfloat16" if device == "cuda" else "float32", sizes)

    if device == "cpu":
        return [step("SmolLM2-135M", 8, 128), step("SmolLM2-135M", 8, 512, shared=256)]
    contexts = (128, 328, 1152, 4096)
    steps = [step("Qwen2.5-1.5B", S, C) for S in (8, 64, 256) for C in contexts]
    shared = [step("Qwen2.5-1.5B", 64, 2304, shared=2048), step("Qwen2.5-1.5B", 16, 1536, shared=1024)]
    return [*shared, *steps]


def small_kernels(device):
    """What stands between the products of a layer and after the head: T tokens of a model, B draws."""
    model = "SmolLM2-135M" if device == "cpu" else "Qwen2.5-1.5B"
    rows = (64,) if device == "cpu" else (DECODE_ROWS, 8 * 328, 8 * 1152)
    dtype, m = "bfloat16" if device == "cuda" else "float32", MODELS[model]
    heads = {"H": m.heads, "KVH": m.kv_heads, "head_dim": m.head_dim}
    return [
        Case(f"{model}, {T} tokens", dtype, {"T": T, "D": m.hidden, "F": m.ffn, "V": m.vocab, **heads})
        for T in rows
    ]


def decoder_layer(device):
    """One layer under LoRA of rank r and recomputation: ``sequences`` of ``length`` tokens, packed."""
    model, r, sizes = (
        ("tiny-qwen2", 8, ((2, 24),)) if device == "cpu" else ("Qwen2.5-1.5B", 64, ((8, 328), (8, 1152)))
    )
    dtype = "bfloat16" if device == "cuda" else "float32"
    return [
        Case(f"{model} layer, {S} x {L} tokens", dtype, {"sequences": S, "length": L, "r": r})
        for S, L in sizes
    ]


class Rollout(NamedTuple):
    """What generation and whole steps run on: a shape's name, its 4-bit format, its rank (0: no LoRA), sizes."""

    model: str
    quantize: str | None
    r: int
    sizes: dict

    def __str__(self):
        adapters = f" + LoRA r={self.r}" * (self.r > 0)
        return f"{self.model}, {self.quantize or 'dense'}{adapters}"

    def case(self, device, text):
        """The ``Case`` under which it is recorded; ``text`` may name sizes."""
        dtype = "bfloat16" if device == "cuda" else "float32"
        return Case(f"{self}, {text.format(**self.sizes)}", dtype, {**self.sizes, "r": self.r})


def generate(device):
    """Groups of 8 completions; B in all."""
    if device == "cpu":
        sizes = {"B": 8, "group": 8, "prompt": 16, "completion": 8}
        return [Rollout("tiny-qwen2", "nf4", 8, sizes), Rollout("tiny-qwen2", None, 0, sizes)]
    sizes = {
        ("nf4", 64): ((8, 200), (64, 200), (256, 200), (8, 1024)),
        (None, 0): ((8, 200), (64, 200)),
        ("nf4", 0): ((8, 200), (64, 200), (256, 200)),
    }
    return [
        Rollout("Qwen2.5-1.5B", quantize, r, {"B": B, "group": 8, "prompt": 128, "completion": C})
        for (quantize, r), all_of_them in sizes.items()
        for B, C in all_of_them
    ]


class Step(NamedTuple):
    """Whole GRPO steps of one group: the rollout (sizes: group, prompt, completion), the limit of the whole card in
    MiB (0: none), further settings of ``GRPOConfig``, and how many steps: before measuring, and measured."""

    rollout: Rollout
    limit: int
    settings: dict
    warmup: int
    steps: int

    def __str__(self):
        sizes = self.rollout.sizes
        return f"{self.rollout}, {sizes['prompt']} + {sizes['group']} x {sizes['completion']} tokens"


def step(device):
    """Models under the limits of cards that people own."""

    def steps(model, r, group, prompt, completion, gib, warmup, count, **settings):
        sizes = {"group": group, "prompt": prompt, "completion": completion}
        return Step(Rollout(model, "nf4", r, sizes), int(gib * 1024), settings, warmup, count)

    if device == "cpu":
        return [steps("tiny-qwen2", 8, 4, 48, 8, 0, 1, 2)]
    long = {"kv_memory": 6, "offload_checkpoints": True}
    return [
        steps("Qwen2.5-1.5B", 64, 8, 128, 200, 2.2, 3, 8, token_budget=768),
        steps("Qwen2.5-1.5B", 64, 8, 128, 1024, 2.7, 2, 3, token_budget=1152),
        steps("Llama-3.1-8B", 32, 8, 128, 1024, 8, 1, 1, token_budget=1152),
        steps("Phi-4", 16, 6, 128, 512, 11.5, 1, 1, token_budget=1280),
        # two completions a micro-batch: each computes the prompt anew
        steps("Llama-3.1-8B", 32, 8, 16384, 3600, 20, 1, 1, token_budget=23600, **long),
    ]


class Scaling(NamedTuple):
    """Whole GRPO steps on one and on two devices: the rollout (sizes: prompts, half of them a device of two, group,
    prompt, completion), further settings of ``GRPOConfig``, and steps as ``Step`` has them."""

    rollout: Rollout
    settings: dict
    warmup: int
    steps: int

    def __str__(self):
        return f"{self.rollout}, {self.rollout.sizes['prompts']} prompts"


def ranks(device):
    """Groups of completions to many prompts."""
    if device == "cpu":
        sizes = {"prompts": 4, "group": 4, "prompt": 48, "completion": 8}
        return [Scaling(Rollout("tiny-qwen2", "nf4", 8, sizes), {}, 1, 2)]
    sizes = {"prompts": 16, "group": 8, "prompt": 128, "completion": 200}
    return [Scaling(Rollout("Qwen2.5-1.5B", "nf4", 64, sizes), {"token_budget": 8192}, 2, 4)]


class Training(NamedTuple):
    """A model's forward and backward pass under LoRA of rank r: ``sequences`` of ``length`` tokens, of which the
    first ``prompt`` are not scored; ``shared``: they are one prompt; ``budget``: tokens of a micro-batch (0: all);
    ``offload``: gradients leave for the CPU's memory, as the optimiser adamw_offload has it."""

    model: str
    r: int
    sequences: int
    prompt: int
    length: int
    shared: bool
    budget: int = 0
    offload: bool = False

    def __str__(self):
        own = self.length - self.prompt * self.shared
        prompt = f"{self.prompt} shared + " * self.shared
        budget = f" in micro-batches of {self.budget}" * (self.budget > 0)
        leave = ", gradients to the CPU" * self.offload
        return f"{self.model}, r={self.r}, {prompt}{self.sequences} x {own} tokens{budget}{leave}"

    def case(self, device):
        names = ["sequences", "prompt", "length", "r"] + ["budget"] * (self.budget > 0)
        sizes = {name: getattr(self, name) for name in names}
        return Case(str(self), "bfloat16" if device == "cuda" else "float32", sizes)


def training(device):
    """Whole models: packed sequences, at once and in micro-batches, and a group that shares its prompt."""
    if device == "cpu":
        return [
            Training("tiny-qwen2", 8, 2, 8, 24, False),
            Training("tiny-qwen2", 8, 2, 8, 24, False, offload=True),
            Training("tiny-qwen2", 8, 5, 8, 24, False, budget=48),
            Training("tiny-qwen2", 8, 3, 20, 30, True),
        ]
    return [
        Training("Qwen2.5-1.5B", 64, 8, 128, 328, False),
        Training("Qwen2.5-1.5B", 64, 8, 128, 328, False, budget=1312, offload=True),
        Training("Qwen2.5-1.5B", 64, 8, 128, 1152, False),
        Training("Qwen2.5-1.5B", 64, 8, 128, 1152, False, budget=2304),
        Training("Qwen2.5-1.5B", 64, 16, 1024, 1536, True),
    ]


def cold_start(device):
    """Models that are loaded from disk."""
    return ["tiny-qwen2"] if device == "cpu" else ["Qwen2.5-1.5B"]
