"""Layers run from captured steps: padding, replays and their order change nothing of log-probs and gradients."""

import contextlib

import pytest
import torch
from checkpoints import small_config
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.rollout import LoraConfig, layer_steps
from nanogrpo.rollout.graphs import StepGraphs
from nanogrpo.rollout.layer_steps import TOKENS, WORKSPACE_TOKENS, LayerSteps, padded_tokens
from nanogrpo.rollout.packing import pack_tree
from nanogrpo.rollout.random_weights import random_policy
from numerics import assert_no_worse_than
from tiny import KeptSteps, perturb_adapters, tiny_policy, tiny_weights

VOCAB = 96


def stepped(policy):
    """``policy`` with steps as a GPU runs them, in plain calls."""
    policy.model.checkpoint_layers = True
    policy.steps = LayerSteps(policy, graphs=False)
    policy.steps.graphs = KeptSteps()
    return policy


def small_policy(architecture="llama", dtype=None, **lora):
    config = small_config(architecture)
    weights = {name: w.to(dtype or w.dtype) for name, w in tiny_weights(config).items()}
    return tiny_policy(config, weights, lora=LoraConfig(**{"r": 4, "alpha": 8, **lora}))


def random_batch(rows, length, seed=0):
    """(rows, length) ids with a common first third, and the mask of the rest."""
    ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, : length // 3] = ids[0, : length // 3]
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, length // 3 :] = True
    return ids, mask


def backward(logprobs):
    signs = torch.linspace(-1, 1, logprobs.numel(), dtype=logprobs.dtype, device=logprobs.device)
    (signs.view_as(logprobs) * logprobs).sum().backward()


def gradients(policy):
    found = [p.grad for p in policy.adapters().values()]
    for parameter in policy.adapters().values():
        parameter.grad = None
    return found


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(0, 20)
)
def test_padding_is_seen_by_nothing(sequences, extra):
    tree = pack_tree(sequences)
    T = len(tree.input_ids)
    padded = tree.padded(T + extra)
    for name in ("input_ids", "positions", "key_end", "parent"):
        assert (
            torch.equal(getattr(padded, name)[:T], getattr(tree, name))
            and len(getattr(padded, name)) == T + extra
        )
    assert torch.equal(padded.node, tree.node)
    query, key = torch.arange(T + extra)[:, None], torch.arange(T + extra)
    seen = (key <= query) & (query < padded.key_end)
    assert not seen[:T, T:].any() and torch.equal(seen[T:], (query == key)[T:])
    assert TOKENS >= padded_tokens(T) - T >= 0 == padded_tokens(T) % TOKENS


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
def test_log_probs_and_gradients_are_as_exact_as_without(architecture):
    results = []
    for dtype, prepare in ((torch.float64, lambda p: p), (None, lambda p: p), (None, stepped)):
        policy = prepare(small_policy(architecture, dtype))
        total = []
        for seed, rows in enumerate((3, 2)):  # two micro-batches of one step
            logprobs = policy.score(*random_batch(rows, 45, seed))
            backward(logprobs)
            total.append(logprobs.detach())
        results.append([*total, *gradients(policy)])
    for truth, plain, ours in zip(*results, strict=True):
        # floor: other numbers of rows, which padding makes, may sum in another order
        assert_no_worse_than(ours, plain, truth.double(), floor=1e-5)


def test_replays_have_the_bits_of_launches():
    found = []
    for make in (stepped, lambda p: setattr(p, "steps", LayerSteps(p, graphs=False)) or p):
        policy = make(small_policy("qwen2"))
        policy.model.checkpoint_layers = True
        optimizer = torch.optim.AdamW(policy.adapters().values(), lr=0.01)
        for seed in range(3):  # what was captured reads the adapters live
            for rows, length in ((3, 45), (2, 30), (6, 60)):
                logprobs = policy.score(*random_batch(rows, length, seed))
                backward(logprobs)
                found.append(logprobs.detach())
            optimizer.step()
            found += gradients(policy)
    half = len(found) // 2
    assert equal(found[:half], found[half:])
    assert not torch.equal(found[0], found[3 + len(policy.adapters())])


def test_passes_that_wait_for_each_other():
    """Backward of an earlier pass after a later one, twice, with others in between."""
    policy = stepped(small_policy())
    batches = [random_batch(2, 40, seed) for seed in range(3)]
    alone = []
    for batch in batches:
        logprobs = policy.score(*batch)
        backward(logprobs)
        alone.append((logprobs.detach(), gradients(policy)))
    first, second = policy.score(*batches[0]), policy.score(*batches[1])
    with torch.no_grad(), policy.disable_adapters():
        reference = policy.score(*batches[2])
    assert not torch.equal(reference, alone[2][0])
    signs = torch.linspace(-1, 1, first.numel()).view_as(first)
    for logprobs, (expected, grads) in zip(
        (second, first, second), (alone[1], alone[0], alone[1]), strict=True
    ):
        assert torch.equal(logprobs.detach(), expected)
        (signs * logprobs).sum().backward(retain_graph=True)
        assert equal(gradients(policy), grads)
    with torch.no_grad():
        assert torch.equal(policy.score(*batches[2]), alone[2][0])


def test_the_last_product_of_a_layer_is_not_computed_again(monkeypatch):
    policy, skipped = stepped(small_policy()), []
    original = layer_steps.lora_linear_stacked
    monkeypatch.setattr(
        layer_steps,
        "lora_linear_stacked",
        lambda *a, value, **k: skipped.append(value) or original(*a, value=value, **k),
    )
    backward(policy.score(*random_batch(2, 30)))
    assert skipped == [False] * policy.config.num_hidden_layers
    assert not any("forward" in vars(layer.down_proj) for layer in policy.model.layers)


def test_what_is_captured_is_used_again():
    policy = stepped(small_policy())
    for rows, length in ((2, 30), (3, 36), (2, 40), (6, 60)):
        backward(policy.score(*random_batch(rows, length)))
    captured = policy.steps.graphs.captured
    assert len(captured) == 4 and {key[1] for key in captured} == {TOKENS, 3 * TOKENS}
    with torch.inference_mode():
        policy.score(*random_batch(2, 30))
    assert len(captured) == 4
    tokens = padded_tokens(20 + 30 * 40)
    assert tokens > WORKSPACE_TOKENS
    policy.score(*random_batch(30, 60))  # more than there is room for: all is made anew
    assert {key[1] for key in captured} == {tokens}


def test_adapters_that_are_frozen_or_few():
    for change in (
        lambda policy: None,
        lambda policy: [p.requires_grad_(False) for n, p in policy.adapters().items() if "q_proj" in n],
        lambda policy: [p.requires_grad_(False) for n, p in policy.adapters().items() if "layers.0" in n],
    ):
        found = []
        for prepare in (lambda p: p, stepped):
            policy = prepare(small_policy(targets=("q_proj", "v_proj", "up_proj")))
            change(policy)
            backward(policy.score(*random_batch(3, 45)))
            found.append(gradients(policy))
        for plain, ours in zip(*found, strict=True):
            assert (plain is None) == (ours is None)
            if plain is not None:
                # float32 sums over padded rows, in another order
                torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_gradients_are_not_overwritten_by_the_next_pass():
    policy = stepped(small_policy())
    parameters = list(policy.adapters().values())
    grads = [
        torch.autograd.grad(policy.score(*random_batch(2, 40, seed)).sum(), parameters) for seed in (0, 1)
    ]
    again = torch.autograd.grad(policy.score(*random_batch(2, 40, 0)).sum(), parameters)
    assert equal(grads[0], again) and not equal(grads[1], again)


def test_a_parameter_that_changed_before_backward_is_refused():
    policy = stepped(small_policy())
    logprobs = policy.score(*random_batch(2, 40))
    with torch.no_grad():
        next(iter(policy.adapters().values())).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("quantize, dtype", [("nf4", "float32"), ("nf4", "bfloat16"), (None, "float32")])
def test_graphs_have_the_bits_of_launches(quantize, dtype):
    policy = random_policy("tiny-qwen2", quantize, LoraConfig(r=8, alpha=16, dtype=dtype), "cuda")
    perturb_adapters(policy)
    policy.model.checkpoint_layers = True
    found = []
    for graphs in (True, False):
        policy.steps = LayerSteps(policy, graphs=graphs)
        for _ in range(2):
            for seed, (rows, length) in enumerate(((3, 45), (2, 130), (6, 60), (3, 46))):
                logprobs = policy.score(*random_batch(rows, length, seed))
                with torch.no_grad(), policy.disable_adapters():
                    found.append(policy.score(*random_batch(2, 50, seed)))
                backward(logprobs)
                found.append(logprobs.detach())
            found += gradients(policy)
    half = len(found) // 2
    assert equal(found[:half], found[half:]) and all(t.isfinite().all() for t in found)
    assert equal(found[: half // 2], found[half // 2 : half])


@pytest.mark.gpu
def test_a_capture_while_another_pass_waits():
    """The adapters' own leaves belong to a graph of the default stream then."""
    policy = random_policy("tiny-llama", "nf4", LoraConfig(r=8, alpha=16), "cuda")
    perturb_adapters(policy)
    policy.model.checkpoint_layers = True
    batches = random_batch(2, 40), random_batch(4, 200, 1)
    policy.steps = LayerSteps(policy, graphs=False)
    expected = []
    for batch in batches:
        backward(policy.score(*batch))
        expected.append(gradients(policy))
    waiting = policy.score(*batches[0])
    policy.steps = LayerSteps(policy)
    first, second = policy.score(*batches[0]), policy.score(*batches[1])
    for logprobs, grads in ((second, expected[1]), (first, expected[0]), (waiting, expected[0])):
        backward(logprobs)
        assert equal(gradients(policy), grads)


def test_room_is_made_for_the_passes_that_are_expected(monkeypatch):
    policy, sizes = tiny_policy(lora=LoraConfig(r=4)), []
    steps = LayerSteps(policy, graphs=False)
    steps.reserve(300, 10**6)
    assert steps.expected == WORKSPACE_TOKENS, "without graphs there is nothing to make room for"
    steps.graphs = StepGraphs(policy)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(policy.graph_pool, "reserve", sizes.append)
    steps.reserve(300, 10**6)
    assert sizes == [10**6]
    for tokens, rows in ((128, 384), (384, 384), (512, 512), (640, 1024)):
        steps._state(tokens)
        assert steps.capacity[0] == len(steps.workspace[0]) == rows
