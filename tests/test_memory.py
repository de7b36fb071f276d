"""The memory plan against tensors that exist, and what a limit that is too small is told."""

import importlib
import weakref
from dataclasses import replace

import pytest
import torch
from nanogrpo.grpo import GRPOConfig, memory
from nanogrpo.grpo.memory import (
    CARDS,
    CONTEXT,
    GIB,
    check_fits,
    kv_bytes,
    layer_bytes,
    linear_shapes,
    micro_batch,
    optimizer_bytes,
    plan_memory,
    plan_report,
    remedies,
    trained_sizes,
    weight_bytes,
)
from nanogrpo.grpo.optimizer import make_optimizer
from nanogrpo.kernels import QuantizedWeight, rotary
from nanogrpo.rollout import LoraConfig, ModelConfig, Policy
from nanogrpo.rollout.checkpoint import expected_tensors
from nanogrpo.rollout.kv_cache import KVCache
from nanogrpo.rollout.model import Transformer
from nanogrpo.rollout.packing import pack_tree, split_by_budget
from nanogrpo.rollout.random_weights import SHAPES, random_policy
from tiny_run import CharTokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TINY = [name for name in SHAPES if name.startswith("tiny")]


def tensors_of(thing, seen):
    """Every tensor that can be reached from ``thing`` through objects, lists and dicts: {storage: bytes}."""
    if id(thing) in seen[1]:
        return seen[0]
    seen[1].add(id(thing))
    seen[2].append(thing)  # alive, so that no other object takes its id
    if isinstance(thing, torch.Tensor):
        seen[0][thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, QuantizedWeight):
        tensors_of(thing.tensors(), seen)
    elif isinstance(thing, dict):
        for value in thing.values():
            tensors_of(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            tensors_of(value, seen)
    elif isinstance(thing, torch.nn.Module):
        tensors_of(vars(thing), seen)
    return seen[0]


def held_bytes(thing):
    return sum(tensors_of(thing, ({}, set(), [])).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "nf4", "int4"])
@pytest.mark.parametrize("name", TINY)
def test_weights_are_exact(name, quantize, dtype):
    policy = random_policy(name, quantize, None, "cpu", dtype)
    assert held_bytes(policy.model) == weight_bytes(policy.config, quantize, dtype.itemsize, "cpu")
    far = policy.model.embedding.nbytes if quantize and not policy.config.tie_word_embeddings else 0
    on_a_gpu = weight_bytes(policy.config, quantize, dtype.itemsize)
    assert on_a_gpu == weight_bytes(policy.config, quantize, dtype.itemsize, "cpu") - far


@pytest.mark.parametrize("name", TINY)
def test_adapters_and_their_gradients_are_exact(name):
    policy = random_policy(name, "nf4", LoraConfig(r=3, alpha=3), "cpu")
    parameters = policy.adapters().values()
    assert sorted(p.numel() for p in parameters) == sorted(trained_sizes(policy.config, 3))
    assert sum(p.nbytes for p in parameters) == 4 * sum(trained_sizes(policy.config, 3))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_optimizer_is_exact(name):
    sizes = [4096, 4095, 10, 70_000]
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = make_optimizer(name, parameters, 1e-3)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert held_bytes(dict(optimizer.state)) == optimizer_bytes(sizes, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("tokens, sequences", [(1, 1), (16, 3), (17, 5), (500, 8)])
def test_keys_and_values_are_exact(tokens, sequences, dtype):
    config = SHAPES["tiny-llama"]
    blocks = sequences * -(-tokens // 16)
    cache = KVCache(config, blocks, 16, device="cpu", dtype=dtype)
    assert cache.data.nbytes == kv_bytes(config, tokens, sequences, dtype.itemsize)


class Watch(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, while they live."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = lambda tree: [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        for storage in (t.untyped_storage() for t in tensors(out)):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self.known:
                self.known[key] = weakref.ref(storage, lambda _, key=key, size=size: self.gone(key, size))
                self.alive += size
                self.peak = max(self.peak, self.alive)
        return out

    def gone(self, key, size):
        del self.known[key]
        self.alive -= size


WIDE = ModelConfig("llama", 64, 128, 384, 6, 4, 2, 32)


class Attended(torch.autograd.Function):
    """Keeps what ``tree_attention`` keeps on a GPU; its CPU path works in float64, tile by tile."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q + (k + v).repeat_interleave(q.shape[1] // k.shape[1], 1)
        ctx.save_for_backward(q, k, v, out, out[..., 0].float())
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        total = grad.unflatten(1, (k.shape[1], -1)).sum(2)
        return grad.clone(), total, total.clone()


class Gated(torch.autograd.Function):
    """Keeps and makes what ``swiglu`` does on a GPU; its CPU path works in many tensors."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return gate_up[:, : gate_up.shape[1] // 2].clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0].clone()


def attended(layer, q, k, v, cos, sin):
    return Attended.apply(*rotary(q, k, cos, sin), v)


def training_peak(model, sequences, *, checkpoint_layers):
    generator = torch.Generator().manual_seed(0)
    shapes = expected_tensors(model).items()
    weights = {n: 0.05 * torch.randn(s, generator=generator) for n, s in shapes}
    policy = Policy(Transformer(model, weights), CharTokenizer(), name="wide")
    policy.add_adapters(LoraConfig(r=4, alpha=4))
    policy.model.checkpoint_layers = checkpoint_layers
    for parameter in policy.adapters().values():
        parameter.grad = torch.zeros_like(parameter)  # counted apart
    tree = pack_tree(sequences)
    with Watch() as watch:
        hidden_states = policy.model(tree.input_ids, tree.positions, attended)
        hidden_states.float().square().sum().backward()
        del hidden_states
    return watch.peak, tree.input_ids.numel()


@pytest.mark.parametrize("checkpoint_layers", [True, False])
@pytest.mark.parametrize("tokens", [256, 768])
def test_activations_are_bounded(checkpoint_layers, tokens, monkeypatch):
    module = importlib.import_module(
        "nanogrpo.kernels.lora_linear"
    )  # the package has a function of that name
    monkeypatch.setattr(module, "swiglu", Gated.apply)
    monkeypatch.setattr(memory, "attention_bytes", lambda *sizes: 0)  # nothing of it is in ``Attended``
    monkeypatch.setattr(memory, "GAPS", 1)  # these are the CUDA allocator's
    monkeypatch.setattr(memory, "_held", lambda count, size: count * size)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(64, (4, tokens // 4), generator=generator).tolist()
    peak, T = training_peak(WIDE, rows, checkpoint_layers=checkpoint_layers)
    config = GRPOConfig(
        token_budget=T, lora_r=4, checkpoint_layers=checkpoint_layers, max_completion_length=T - 1
    )
    plan = plan_memory(WIDE, config, 1, dtype=torch.float32)
    bound = plan.training["checkpoints"] + plan.always["layer"]
    assert 0.95 * peak <= bound <= 1.4 * peak, f"{peak} measured, {bound} planned"


def config(**settings):
    return GRPOConfig(**{"random_weights": "qwen2.5-1.5b", "max_completion_length": 200, **settings})


@pytest.mark.parametrize(
    "count, size, held",
    [(28, 2359296, 80), (28, 3538944, 120), (5, 12 * 2**20 + 1, 70), (9, 300_000, 4), (0, 99, 0)],
)
def test_the_allocator_cuts_pieces(count, size, held):
    """Tensors of 1 to 10 MiB share pieces of 20, smaller ones of 2; larger ones have their own in steps of 2 MiB."""
    assert memory._held(count, size) == held * 2**20


def test_parts_grow_with_what_they_are_made_of(monkeypatch):
    monkeypatch.setattr(memory, "_held", lambda count, size: count * size)
    model = SHAPES["Qwen2.5-1.5B"]
    plan = lambda **settings: plan_memory(model, config(**settings), 128)
    base = plan()
    assert base.total == sum(base.always.values()) + max(
        sum(p.values()) for p in (base.rollout, base.training)
    )
    assert plan(quantize="nf4").always["weights"] < 0.55 * base.always["weights"]
    assert plan(lora_r=32).always["adapters"] == 2 * base.always["adapters"]
    assert plan(optimizer="adamw8bit").always["optimizer"] < 0.27 * base.always["optimizer"]
    prompts = kv_bytes(model, 128, base_prompts := 8, 2)
    assert plan(group_size=16).rollout["KV cache"] == 2 * base.rollout["KV cache"] - prompts
    longer = plan_memory(model, config(), 128 + 16 * 100).rollout["KV cache"]
    assert longer - base.rollout["KV cache"] == kv_bytes(model, 16 * 100, base_prompts, 2)
    codes = plan(kv_dtype="int8").rollout["KV cache"]
    assert codes == base.rollout["KV cache"] * (128 + 4) // (2 * 128)
    far = plan(offload_checkpoints=True)
    assert far.training["checkpoints"] * model.num_hidden_layers == 3 * base.training["checkpoints"]
    offloaded = plan(optimizer="adamw_offload")
    assert (
        offloaded.always["adapters"] == base.always["adapters"] / 2 and offloaded.training["gradients"] == 0
    )
    assert offloaded.always["optimizer"] < 2**12 and offloaded.always["layer"] == base.always["layer"]
    assert plan(kv_memory=0.1).rollout["KV cache"] == int(0.1 * GIB)
    budget = lambda tokens: plan(token_budget=tokens, prompts_per_step=4)
    assert budget(512).training["checkpoints"] == budget(1024).training["checkpoints"] * 384 / 1024
    assert budget(1024).training["gradients"] > base.always["adapters"], "several micro-batches"
    one = plan(prompts_per_step=1, group_size=8).training
    assert sum(one.values()) == max(budget(1024).training["gradients"], one["checkpoints"] + one["logits"])
    assert plan(token_budget=100) == plan(token_budget=328), "a sequence is never cut"
    assert plan(checkpoint_layers=False).training["checkpoints"] > 5 * base.training["checkpoints"]
    assert base.always["layer"] > sum(layer_bytes(model, 2, 1792, quantize=None, r=16))
    assert 0.45 < budget(1024).always["layer"] / budget(2048).always["layer"] < 0.6
    dense, nf4 = (layer_bytes(model, 2, 64, quantize=q, r=16)[1] for q in (None, "nf4"))
    assert dense < nf4 < 2 * 2 * 1536 * 8960
    # Two ranks: half the prompts each, the same micro-batches.
    two = plan_memory(model, config(), 128, ranks=2)
    assert two.rollout["KV cache"] == base.rollout["KV cache"] / 2


def test_a_sequence_that_cannot_be_trained_on():
    with pytest.raises(ValueError, match="more than the model's 2048"):
        plan_memory(SHAPES["tiny-llama"], config(token_budget=4000, max_completion_length=2000), 128)


def test_a_limit_that_is_too_small_is_told_the_sum_and_the_way_out():
    model = SHAPES["Qwen2.5-1.5B"]
    need = plan_memory(model, config(), 128).total / GIB
    check_fits(model, config(vram_limit=need + 0.01), 128)
    with pytest.raises(ValueError) as caught:
        check_fits(model, config(vram_limit=need - 0.05), 128)
    text = str(caught.value)
    assert "\n" not in text and f"needs about {need:.2f} GiB (weights " in text
    for part in ("CUDA context", "adapters", "optimizer"):
        assert part in text
    assert "it would fit with --" in text
    with pytest.raises(ValueError, match="no single setting makes it fit; combine --"):
        check_fits(model, config(vram_limit=1.0), 128)


def test_remedies_do_what_they_promise():
    model, settings = SHAPES["Llama-3.1-8B"], config(random_weights="llama-3.1-8b", prompts_per_step=2)
    before = plan_memory(model, settings, 128).total
    changes = remedies(model, settings, 128, 12 * GIB)
    assert changes[0][0].startswith("--") and any(flag == "--quantize nf4" for flag, _ in changes)
    for flag, total in changes:
        name, _, text = flag.removeprefix("--").replace("-", "_").partition(" ")
        texts = dict.fromkeys(("quantize", "optimizer", "kv_dtype"), str)
        kind = (texts | {"kv_memory": float, "offload_checkpoints": bool}).get(name, int)
        value = kind(text or True)
        changed = plan_memory(model, replace(settings, **{name: value}), 128).total
        assert changed == total < before


def test_report():
    model = SHAPES["Qwen2.5-1.5B"]
    lines = plan_report(model, config(), 128)
    assert sum(": fits" in line or ": does not fit" in line for line in lines) == len(CARDS)
    assert any(line.startswith("weights ") for line in lines)
    [verdict] = [line for line in plan_report(model, config(), 128, "h200") if "h200" in line]
    assert verdict == "  h200 (141 GiB): fits"
    small = plan_report(model, config(), 128, "2")
    assert "does not fit" in small[-2] and "combine --" in small[-1]
    assert "2.5 (2.5 GiB)" in "".join(plan_report(model, config(vram_limit=2.5), 128))
    with pytest.raises(ValueError, match="unknown card 'rtx', expected GiB or one of"):
        plan_report(model, config(), 128, "rtx")
    assert CONTEXT < min(CARDS.values()) * GIB
    assert len(linear_shapes(model)) == 7 * model.num_hidden_layers


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("algorithm, unit", [("grpo", 1), ("online_dpo", 2)])
@pytest.mark.parametrize("budget", [10, 60, 100, 150, 1000])
def test_micro_batches_are_cut_as_the_trainer_cuts_them(budget, algorithm, unit, share_prefix):
    settings = {"max_completion_length": 20, "group_size": 4, "token_budget": budget, "algorithm": algorithm}
    groups = [[[prompt] * 30 + [100 * prompt + i] * 20 for i in range(4)] for prompt in range(1, 4)]
    sequences = [sequence for group in groups for sequence in group]
    runs = split_by_budget(sequences, budget, share_prefix=share_prefix, unit=unit)
    packed = [
        len(pack_tree([sequences[i] for i in run], share_prefix=share_prefix).input_ids) for run in runs
    ]
    assert micro_batch(3, 30, GRPOConfig(share_prefix=share_prefix, **settings)) == (max(packed), len(runs))
