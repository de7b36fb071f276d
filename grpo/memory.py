"""How much GPU memory a run takes, part by part, from formulas alone; and a limit on it that the allocator enforces.

With b bytes an element of the compute dtype, N x K the linears, L layers, D the hidden size, F the feed-forward size,
A = heads * head_dim, V words, T packed tokens a micro-batch, C completion tokens in it, S sequences at once:

    weights      dense b N K; nf4 N K / 2 + 4 N K / 64 + 64; int4 N K / 2 + 4 N K / 32; all but the linears is dense
    adapters     4 r (N + K) a linear (2 in 16 bits), gradients as many bytes, those of one layer in float32 beside
    optimizer    AdamW twice the adapters; in 8 bits 2 bytes a value and two float32 scales for 256; offloaded none,
                 and no gradients but one layer's: these are in CPU memory, 16 bytes a value (``MasterWeights``)
    layer        what one layer keeps and works in while it is computed again and differentiated, T tokens at once:
                 ``layer_bytes``, with the gaps between tensors ``pool_bytes``. Graphs hold it from step to step, and
                 prompts and decode steps are computed in it
    KV cache     2 L b (KV heads * head_dim) * block_size * blocks, for S sequences of full length, the whole blocks
                 of a prompt once (int8: a byte a value, 4 more a head); rollout only
    checkpoints  L T D b, the inputs of the layers, as the allocator cuts them; offloaded ``OFFLOADED_AT_ONCE`` of
                 them; without checkpointing every layer keeps all that one does
    logits       training: the head's workspace, and hidden states and gradients of C rows;
                 rollout: V float32 values in four copies and float64 sums, of the prompts at once; those of all
                 sequences, and attention's parts, only as far as they are more than graphs hold for a layer
    libraries    cuBLAS' workspaces: WORKSPACES
    context      of CUDA, with the loaded kernels: CONTEXT

Rollout and training take turns, and each gives back what it alone needs: the sum is what both have and the larger of
the two. T is the token budget, or the longest sequence, in whole multiples of ``TOKENS``. Where one micro-batch is
all, its gradients grow into the room that checkpoints leave. What carries over from step to step is exact.
"""

import math
from dataclasses import dataclass

import torch

GIB = 2**30
# CUDA 13 on an H200 with ``lean_cuda``: 263 MiB, then 94 of torch's kernels, 66 of cuBLAS, the rest ours and graphs'
CONTEXT = 500 * 2**20
ATTENTION_WORKSPACE = 64 * 2**20
WORKSPACES = 2 * (8 * 2**20 + 2**18)  # cuBLAS' own, one for captured work and one for what is not
# Layers' inputs on the card while the others wait: at work, leaving or coming, kept for a copy.
OFFLOADED_AT_ONCE = 3
# In one piece a layer of Qwen2.5-1.5B, Llama-3.1-8B or Phi-4 took up to 1.19 times its bytes, placed as torch does.
GAPS = 1.2
BLOCK_SIZE = 16
CARDS = {
    "rtx-4060": 8, "rtx-3080": 10, "rtx-3060": 12, "rtx-4080": 16, "rtx-3090": 24, "rtx-4090": 24, "rtx-5090": 32,
    "a100-40": 40, "l40s": 48, "a100-80": 80, "h100": 80, "h200": 141, "b200": 180,
}  # fmt: skip


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part: ``always``, and beside it ``rollout`` and ``training`` in turn; each a dict of part to bytes."""

    always: dict
    rollout: dict
    training: dict

    @property
    def total(self):
        """Bytes at the highest point of a step."""
        turns = max(sum(self.rollout.values()), sum(self.training.values()))
        return sum(self.always.values()) + turns

    def table(self):
        """The sum as lines of text, in GiB."""
        lines = [f"{'part':<24} {'rollout':>9} {'training':>9}  GiB"]
        row = lambda name, a, b: f"{name:<24} {_gib(a):>9} {_gib(b):>9}"
        lines += [row(name, size, size) for name, size in self.always.items()]
        for name in dict.fromkeys((*self.rollout, *self.training)):
            lines.append(row(name, self.rollout.get(name), self.training.get(name)))
        always = sum(self.always.values())
        sums = (always + sum(part.values()) for part in (self.rollout, self.training))
        return [*lines, row("sum", *sums)]


def _gib(size):
    return "-" if size is None else f"{size / GIB:.3f}"


def linear_shapes(model):
    """{Hugging Face name: (N, K)} of the adapted linears of a ``ModelConfig``."""
    from ..rollout.checkpoint import expected_tensors

    return {
        name.removesuffix(".weight"): shape
        for name, shape in expected_tensors(model).items()
        if name.endswith("_proj.weight")
    }


def weight_bytes(model, quantize, itemsize, device="cuda"):
    """Bytes on the device of the frozen weights, biases and norms, and of the rotary frequencies."""
    from ..rollout.checkpoint import expected_tensors
    from ..rollout.policy import stays_in_host_memory

    total, far = 4 * (model.head_dim // 2), stays_in_host_memory(model, quantize, torch.device(device))
    for name, shape in expected_tensors(model).items():
        values = 0 if name == far else math.prod(shape)
        if quantize is None or not name.endswith("_proj.weight"):
            total += values * itemsize
        elif quantize == "nf4":
            first_of_its_stack = not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight"))
            total += values // 2 + 4 * values // 64 + 64 * first_of_its_stack  # with one code book a stack
        else:
            total += values // 2 + 4 * values // 32
    return total


def trained_sizes(model, r, *, value_head=False):
    """Number of values of each trained tensor: lora_a and lora_b of every linear, then the value head."""
    sizes = [r * k for _, k in linear_shapes(model).values()]
    sizes += [n * r for n, _ in linear_shapes(model).values()]
    return sizes + [model.hidden_size + 1] * value_head


def optimizer_bytes(sizes, name, itemsize=4):
    """Bytes of the optimiser's state for trained tensors of ``sizes`` values of ``itemsize`` bytes: as in
    ``OPTIMIZERS``."""
    if name == "adamw_offload":
        return 4 * len(sizes)
    if name == "adamw":
        return sum(2 * itemsize * size + 4 for size in sizes)
    # bitsandbytes keeps what is below 4,096 values in float32, and one pair of code books.
    small = sum(8 * size for size in sizes if size < 4096)
    return small + sum(2 * size + 8 * -(-size // 256) for size in sizes if size >= 4096) + 2 * 256 * 4


def kv_bytes(model, tokens, sequences, itemsize):
    """Bytes of keys and values for ``sequences`` of up to ``tokens`` tokens, in whole blocks; itemsize 1: of codes,
    with their scales."""
    head = model.head_dim * itemsize + 4 * (itemsize == 1)
    blocks = -(-tokens // BLOCK_SIZE) * sequences
    return 2 * model.num_hidden_layers * model.num_key_value_heads * head * BLOCK_SIZE * blocks


def layer_bytes(model, itemsize, tokens, *, quantize, r):
    """Bytes for ``tokens`` tokens that one layer keeps for its backward pass, and that it works in beside: (kept,
    working). Kept: both norms and their results, q, k and v with and without rotation, what was attended, gate, up
    and their product, and the rounded adapters; working: the largest of what the parts need as they run backward."""
    from ..rollout.linear import dense_at_once

    b, D, F = itemsize, model.hidden_size, model.intermediate_size
    A, KV = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    kept = b * (5 * D + 3 * A + 3 * KV + 3 * F) + 4 * model.num_attention_heads
    dense = b * D * F if quantize else 0  # one dequantised projection of the feed-forward block
    both = (
        b * dense_at_once(2 * F, D) if quantize else 0
    )  # of gate and up; as two their dx is summed in float32
    both += 4 * D * tokens * (both < 2 * dense)
    # dy and g enter one product (``lora_products``), side by side, as W and A do.
    down = b * ((D + r) * tokens + r * F) if quantize else 0
    stages = (
        b * 2 * F * tokens,  # SwiGLU: the gradients of gate, up and their product in the place of the product
        b * F * tokens + dense + down,  # down: the gradient of its input
        b * (D - F) * tokens + both,  # gate and up as one, after what SwiGLU kept has gone
        b * (D + 2 * A + 4 * KV - 3 * F) * tokens + attention_bytes(model, tokens),  # after all of these
    )
    adapters = r * sum(n + k for n, k in linear_shapes(model).values()) // model.num_hidden_layers
    return tokens * kept + b * adapters, max(0, *stages)


def pool_bytes(model, itemsize, tokens, *, quantize, r):
    """Bytes that the layers' graphs take in one piece for ``tokens`` tokens, with the gaps between their tensors."""
    return int(GAPS * sum(layer_bytes(model, itemsize, tokens, quantize=quantize, r=r)))


def _held(count, size):
    """Bytes that torch's allocator takes for ``count`` tensors of ``size`` bytes each."""
    if size >= 10 * 2**20:
        return count * (-(-size // 2**21) * 2**21)
    piece = 20 * 2**20 if size > 2**20 else 2 * 2**20
    return -(-count // (piece // size)) * piece


def attention_bytes(model, tokens):
    """Bytes beside its result that ``tree_attention`` works in: its lists of tiles, and partial dk and dv."""
    tiles, heads = -(-tokens // 64), model.num_key_value_heads
    rows = max(tokens + 64, 256 // heads * 64)
    return 4 * tiles * (2 + tiles) + 8 * rows * heads * model.head_dim


def micro_batch(prompts, prompt_length, config):
    """(packed tokens of the largest micro-batch, number of micro-batches) where every completion has full length."""
    unit, length = 2 if config.algorithm == "online_dpo" else 1, config.max_completion_length
    tokens, largest, count = 0, 0, 1
    for index in range(prompts * (config.group_size // unit)):
        opens = index % (config.group_size // unit) == 0
        alone = unit * length + prompt_length * (1 if config.share_prefix else unit)
        more = alone if opens or not config.share_prefix else unit * length
        if tokens + more > config.token_budget and tokens:
            count, tokens, more = count + 1, 0, alone
        tokens += more
        largest = max(largest, tokens)
    return largest, count


def plan_memory(model, config, prompt_length, *, dtype=None, ranks=1):
    """The ``MemoryPlan`` of a run on CUDA.

    model: ``ModelConfig``; config: ``GRPOConfig``; prompt_length: tokens of the longest prompt; dtype: default that
    of the config, or bfloat16. Raises ValueError where a sequence does not fit the model's context.
    """
    from ..rollout.layer_steps import TOKENS
    from ..rollout.policy import HEAD_WORKSPACE

    if dtype is None:
        dtype = getattr(torch, config.dtype or "bfloat16")
    b, length = dtype.itemsize, prompt_length + config.max_completion_length
    if length > model.max_position_embeddings:
        raise ValueError(
            f"a sequence has up to {length} tokens, more than the model's {model.max_position_embeddings}"
        )
    prompts = -(-config.prompts_per_step // ranks)
    sequences = prompts * config.group_size
    T, micro_batches = micro_batch(prompts, prompt_length, config)
    completion = min(T, sequences * config.max_completion_length)
    T = TOKENS * -(-T // TOKENS)
    sizes = trained_sizes(model, config.lora_r, value_head=config.algorithm == "ppo")
    offloaded = config.optimizer == "adamw_offload"
    itemsize = b if offloaded else getattr(torch, config.lora_dtype).itemsize
    trained, L, D = itemsize * sum(sizes), model.num_hidden_layers, model.hidden_size
    flat = 4 * sum(sizes) // L  # of the gradients of one layer
    layer = {"quantize": config.quantize, "r": config.lora_r}
    kept, _ = layer_bytes(model, b, T, **layer)
    checkpointed = config.checkpoint_layers in (None, True)
    on_card = OFFLOADED_AT_ONCE if config.offload_checkpoints else L
    pool = pool_bytes(model, b, T, **layer)
    shared = prompt_length // BLOCK_SIZE * BLOCK_SIZE  # tokens that a group has once
    kv = b if config.kv_dtype is None else 1
    # Behind the whole blocks of its prompt a member needs most where those leave BLOCK_SIZE - 1 tokens over.
    own = config.max_completion_length + BLOCK_SIZE - 1
    cache = kv_bytes(model, shared, prompts, kv) + kv_bytes(model, own, sequences, kv)
    decode = sequences * model.vocab_size * (4 * 4 + 8) + ATTENTION_WORKSPACE
    if config.kv_memory is not None:
        cache = min(cache, int(config.kv_memory * GIB))
    training = {
        "gradients": 0 if offloaded else trained + trained // L,
        "checkpoints": _held(on_card, T * D * b) if checkpointed else (L - 1) * kept,
        "logits": HEAD_WORKSPACE + (T + 3 * completion) * D * b,
    }
    if micro_batches == 1 and checkpointed:  # gradients come as the checkpoints of the only micro-batch go
        first = min(training["gradients"], training["checkpoints"] + training["logits"])
        training["gradients"] -= first
    return MemoryPlan(
        always={
            "CUDA context": CONTEXT,
            "weights": weight_bytes(model, config.quantize, b),
            "adapters": trained,
            "optimizer": optimizer_bytes(sizes, config.optimizer, itemsize),
            "layer": pool + 2 * b * D * T + flat,
            "libraries": WORKSPACES,
        },
        rollout={
            "KV cache": cache,
            "logits": max(0, decode - pool) + prompts * model.vocab_size * (4 * 4 + 8),
        },
        training=training,
    )


def remedies(model, config, prompt_length, limit):
    """[(flag and value, bytes then)] of single changes that would lower the need, those that fit ``limit`` first."""
    from dataclasses import replace

    length = prompt_length + config.max_completion_length
    candidates = [("token_budget", max(length, config.token_budget // n)) for n in (2, 4, 8)]
    candidates += [("quantize", "nf4"), ("optimizer", "adamw_offload"), ("checkpoint_layers", True)]
    candidates += [("offload_checkpoints", True)]
    candidates += [("lora_r", max(1, config.lora_r // n)) for n in (2, 4)]
    candidates += [("prompts_per_step", max(1, config.prompts_per_step // n)) for n in (2, 4)]
    candidates += [("group_size", max(2, config.group_size // 2))]
    if config.overlong_buffer <= config.max_completion_length // 2:
        candidates += [("max_completion_length", max(1, config.max_completion_length // 2))]
    # A pool of half the cache makes sequences wait for each other, with the same result.
    cache = plan_memory(model, config, prompt_length).rollout["KV cache"]
    one = kv_bytes(model, length, 1, 2)
    candidates += [("kv_memory", round(max(cache // n, one) / GIB + 1e-3, 3)) for n in (2, 4)]
    candidates += [("kv_dtype", "int8")]
    before, found = plan_memory(model, config, prompt_length).total, {}
    for name, value in candidates:
        if getattr(config, name) != value and not (name == "quantize" and config.quantize):
            total = plan_memory(model, replace(config, **{name: value}), prompt_length).total
            fits = found.get(name, (None, math.inf))[1] <= limit
            if total < before and not fits:  # the mildest change of a setting that fits, else its strongest
                found[name] = (value, total)
    flag = lambda name, value: f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
    changes = [(flag(name, value), total) for name, (value, total) in found.items()]
    return sorted(changes, key=lambda change: (change[1] > limit, change[1]))


def check_fits(model, config, prompt_length):
    """ValueError with the sum by part and the flags that would help, where ``vram_limit`` is too small for a run."""
    limit = int(config.vram_limit * GIB)
    need = plan_memory(model, config, prompt_length)
    if need.total <= limit:
        return
    raise ValueError(
        f"vram_limit of {config.vram_limit:g} GiB is too small: this run needs about {need.total / GIB:.2f} GiB ("
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in peak_parts(need).items())
        + "); "
        + advice(remedies(model, config, prompt_length, limit), limit)
    )


def peak_parts(plan):
    """{part: bytes} at the highest point of a step, the largest first."""
    turn = max(plan.rollout, plan.training, key=lambda part: sum(part.values()))
    return dict(sorted({**plan.always, **turn}.items(), key=lambda item: -item[1]))


def advice(changes, limit):
    """What to change, in words; ``changes`` as ``remedies`` gives them."""
    fitting = [f"{flag} ({total / GIB:.2f} GiB)" for flag, total in changes if total <= limit]
    if fitting:
        return "it would fit with " + " or ".join(fitting[:4])
    helping = [f"{flag} ({total / GIB:.2f} GiB)" for flag, total in changes]
    if not helping:
        return "no setting makes it smaller; take a smaller model"
    return "no single setting makes it fit; combine " + ", ".join(helping[:4])


def plan_report(model, config, prompt_length, card=None):
    """Lines of text: the table of ``plan_memory`` and what cards of ``CARDS`` it fits, or whether it fits ``card``.

    card: a name in ``CARDS``, or GiB as a number or text; ValueError where it is neither. With ``vram_limit`` set in
    the config and no card given, that is the card.
    """
    if prompt_length < 1:
        raise ValueError(f"the prompt's length must be at least 1 token, got {prompt_length}")
    cards = CARDS
    if card is None and config.vram_limit is not None:
        card = config.vram_limit
    if card is not None:
        try:
            cards = {str(card): CARDS[card] if card in CARDS else float(card)}
        except ValueError as error:
            raise ValueError(f"unknown card {card!r}, expected GiB or one of {', '.join(CARDS)}") from error
        if not 0 < cards[str(card)] < math.inf:
            raise ValueError(f"a card's memory must be a positive number of GiB, got {card}")
    need = plan_memory(model, config, prompt_length)
    lines = [
        f"prompts of {prompt_length} tokens, completions of {config.max_completion_length}; "
        f"{config.prompts_per_step} x {config.group_size} a step, {config.token_budget} tokens a micro-batch",
        *need.table(),
        f"highest point of a step: {need.total / GIB:.2f} GiB",
    ]
    for name, size in cards.items():
        verdict = "fits" if need.total <= size * GIB else "does not fit"
        lines.append(f"  {name} ({size:g} GiB): {verdict}")
    if len(cards) == 1 and need.total > size * GIB:
        lines.append(advice(remedies(model, config, prompt_length, size * GIB), size * GIB))
    return lines


def limit_vram(config):
    """Make the allocator refuse what would bring the process over ``vram_limit`` GiB, context included."""
    if not torch.cuda.is_available() or (config.device or "cuda").split(":")[0] != "cuda":
        raise ValueError("vram_limit needs a CUDA device, and this run is on the CPU")
    index = torch.device(config.device or "cuda").index
    index = torch.cuda.current_device() if index is None else index
    total = torch.cuda.get_device_properties(index).total_memory
    allowed = config.vram_limit * GIB - CONTEXT
    if allowed <= 0:
        raise ValueError(
            f"vram_limit of {config.vram_limit:g} GiB is less than CUDA itself takes, {CONTEXT / GIB:.2f} GiB"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), index)
