"""Sampling against the distribution it names, the filters against their definitions, the noise for uniformity."""

import math

import numpy as np
import numpy_noise
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.rollout import SamplingParams
from nanogrpo.rollout.sampling import adjust_logits, filter_logits, sample
from numpy_noise import numpy_uniform

VOCAB, DRAWS = 12, 20_000


def expected_distribution(logits, params, history=()):
    """The distribution of one row in plain float64 Python, and the set that the filters keep."""
    z = [float(x) for x in logits]
    for t in set(history):
        z[t] = z[t] / params.repetition_penalty if z[t] > 0 else z[t] * params.repetition_penalty
    z = [(x + params.logit_bias.get(t, 0.0)) / params.temperature for t, x in enumerate(z)]
    kept = set(range(len(z)))

    def probs():
        total = math.fsum(math.exp(z[t]) for t in kept)
        return [math.exp(z[t]) / total if t in kept else 0.0 for t in range(len(z))]

    if params.top_k:
        kept = set(sorted(kept, key=lambda t: -z[t])[: params.top_k])
    if params.top_p < 1:
        p, mass, nucleus = probs(), 0.0, set()
        for t in sorted(kept, key=lambda t: -z[t]):
            if mass >= params.top_p:
                break
            nucleus.add(t)
            mass += p[t]
        kept = nucleus
    if params.min_p:
        p = probs()
        kept = {t for t in kept if p[t] >= params.min_p * max(p)}
    return probs(), kept


def seen_in(histories):
    if histories is None:
        return None
    return torch.tensor([[token in history for token in range(VOCAB)] for history in histories])


def bias_of(params):
    return torch.tensor([params.logit_bias.get(t, 0.0) for t in range(VOCAB)]) if params.logit_bias else None


def random_logits(seed, rows=1):
    return 1.5 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3},
        {"repetition_penalty": 1.8},
        {"logit_bias": {3: 2.0, 5: -1.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_sample_follows_the_distribution(options, seed):
    params = SamplingParams(seed=seed, **options)
    logits, history = random_logits(seed), [1, 3, 3, 8]
    uniforms = torch.from_numpy(numpy_uniform(seed, 0, np.arange(DRAWS), 0))
    histories = [history] if params.repetition_penalty != 1 else None
    tensors = {"bias": bias_of(params), "seen": seen_in(histories)}
    rows = torch.zeros(DRAWS, dtype=torch.int64)
    tokens, logprobs, kept = sample(logits, rows, uniforms, params, **tensors)
    probs, inside = expected_distribution(logits[0], params, history if histories else ())
    assert set(tokens.tolist()) <= inside
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    cells = [t for t in range(VOCAB) if probs[t] * DRAWS >= 5]
    chi2 = sum((counts[t].item() - probs[t] * DRAWS) ** 2 / (probs[t] * DRAWS) for t in cells)
    degrees = max(1, len(cells) - 1)
    # Wilson-Hilferty: the cube root is near normal; 4.5 sigma is a false alarm in 300000.
    limit = degrees * (1 - 2 / (9 * degrees) + 4.5 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi2 < limit
    full = (logits[0].double() / params.temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), full[tokens], atol=2e-6, rtol=1e-6)
    if not params.filters:
        assert kept is None
        return
    mass = full.exp()[sorted(inside)].sum().item()
    assert kept.tolist() == pytest.approx([mass] * DRAWS, abs=1e-6)


@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_filters_keep_what_they_define(seed, top_k, top_p, min_p):
    params, logits = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p), random_logits(seed, rows=3)
    filtered = filter_logits(logits, params)
    for row, out in zip(logits, filtered, strict=True):
        _, inside = expected_distribution(row, params)
        assert set(out.isfinite().nonzero().flatten().tolist()) == inside
        assert torch.equal(out[sorted(inside)], row[sorted(inside)])


def test_greedy_takes_the_best_token_that_is_not_banned():
    logits = random_logits(0, rows=5)
    rows, u = torch.arange(5), torch.rand(5).double()
    tokens, logprobs, kept = sample(logits, rows, u, SamplingParams(temperature=0, top_k=2))
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))
    assert kept is None
    banned = torch.zeros(5, VOCAB, dtype=torch.bool).scatter_(1, tokens[:, None], True)
    second, logprobs, _ = sample(logits, rows, u, SamplingParams(temperature=0), banned=banned)
    assert torch.equal(second, logits.topk(2).indices[:, 1])
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, second[:, None])[:, 0])


@pytest.mark.parametrize("uniform", [2.0**-53, 0.5, 1 - 2.0**-53])
def test_banned_and_filtered_tokens_are_never_drawn_at_the_ends(uniform):
    logits = random_logits(3, rows=64)
    banned = torch.zeros(64, VOCAB, dtype=torch.bool)
    banned[:, [0, 1, VOCAB - 2, VOCAB - 1]] = True
    uniforms = torch.full((64,), uniform, dtype=torch.float64)
    tokens, _, _ = sample(logits, torch.arange(64), uniforms, SamplingParams(), banned=banned)
    assert not banned.gather(1, tokens[:, None]).any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"top_p": 0.6},
        {"top_k": 3, "temperature": 0.5},
        {"repetition_penalty": 1.5},
        {"logit_bias": {2: 3.0}},
    ],
    ids=str,
)
def test_several_draws_from_a_row(options):
    """Draws by ``rows`` equal those from the rows written out."""
    params, logits = SamplingParams(**options), random_logits(5, rows=3)
    rows = torch.tensor([2, 0, 0, 1, 2, 2])
    u = torch.from_numpy(numpy_uniform(1, 0, np.arange(6), 0))
    banned = torch.zeros(3, VOCAB, dtype=torch.bool).scatter_(1, logits.argmax(-1)[:, None], True)
    banned[1] = False
    seen, bias = seen_in([[0, 1], [2], [3, 3]]), bias_of(params)
    ours = sample(logits, rows, u, params, seen=seen, bias=bias, banned=banned)
    written = sample(
        logits[rows], torch.arange(6), u, params, seen=seen[rows], bias=bias, banned=banned[rows]
    )
    for value, expected in zip(ours, written, strict=True):
        torch.testing.assert_close(value, expected)
    assert not banned[rows, ours[0]].any()


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.8}, {"logit_bias": {2: 1.0}}, {"temperature": 0}], ids=str
)
def test_keys_are_the_uniforms_made_of_them(options):
    params, logits = SamplingParams(seed=-5, **options), random_logits(4, rows=2)
    rows, prompt, member, position = torch.randint(0, 2, (4, 30))
    uniforms = torch.from_numpy(numpy_uniform(-5, prompt.numpy(), member.numpy(), position.numpy()))
    keys = torch.tensor([-5]), prompt, member, position
    for a, b in zip(
        *(sample(logits, rows, x, params, bias=bias_of(params)) for x in (keys, uniforms)), strict=True
    ):
        assert a is b is None or torch.equal(a, b)


def test_large_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 9.9e3, 0.0]])
    row, u = torch.tensor([0]), torch.tensor([0.5]).double()
    tokens, logprobs, _ = sample(logits, row, u, SamplingParams(temperature=0.01))
    assert tokens.item() == 0 and logprobs.item() == 0


def test_adjusting_leaves_the_input_alone():
    logits = random_logits(0, rows=2)
    before = logits.clone()
    params = SamplingParams(repetition_penalty=2.0, logit_bias={1: 5.0, 2: -torch.inf})
    out = adjust_logits(logits, params, seen=seen_in([[0, 0], [4]]), bias=bias_of(params))
    assert torch.equal(logits, before)
    assert out[:, 2].isneginf().all() and torch.equal(out[:, 1], before[:, 1] + 5)
    assert out[0, 0] == (before[0, 0] / 2 if before[0, 0] > 0 else before[0, 0] * 2)
    assert out[1, 0] == before[1, 0]


def test_uniforms_are_distinct_in_every_key_and_uniform():
    prompts, members, positions = np.meshgrid(np.arange(20), np.arange(16), np.arange(128), indexing="ij")
    u = np.stack([numpy_uniform(seed, prompts, members, positions) for seed in (0, 1, 2**63, -1)])
    assert u.dtype == np.float64 and 0 < u.min() and u.max() < 1
    assert np.unique(u).size == u.size
    ordered = np.sort(u.ravel())
    # Kolmogorov-Smirnov: sqrt(n) D exceeds 2.2 once in 8000 uniform samples.
    distance = np.abs(ordered - (np.arange(u.size) + 0.5) / u.size).max()
    assert math.sqrt(u.size) * distance < 2.2
    for axis in range(4):  # neighbours along each key are uncorrelated: 5 sigma
        a, b = np.split(np.moveaxis(u, axis, 0), [1])[1][:-1], np.moveaxis(u, axis, 0)[2:]
        a, b = a.ravel() - 0.5, b.ravel() - 0.5
        assert abs((a * b).mean() * 12) < 5 / math.sqrt(a.size)


@pytest.mark.parametrize("bits, expected", [(0, 2.0**-53), (2**64 - 1, 1 - 2.0**-53)])
def test_uniforms_stay_inside_the_unit_interval(bits, expected, monkeypatch):
    monkeypatch.setattr(numpy_noise, "_mix", lambda state: np.full_like(state, bits))
    assert numpy_uniform(0, 0, 0, 0) == expected and 0 < expected < 1


def test_a_uniform_depends_on_its_key_alone():
    alone = numpy_uniform(7, 3, 2, 11)
    assert numpy_uniform(7, [1, 3], [0, 2], [4, 11])[1] == alone
    assert len({float(alone), *(float(numpy_uniform(*k)) for k in [(7, 2, 3, 11), (7, 11, 2, 3)])}) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"min_tokens": -1}, "min_tokens must be between 0 and max_tokens, got -1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"temperature": -0.1}, "temperature must be >= 0 and finite, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.1}, "top_p must be in"),
        ({"min_p": -0.1}, "min_p must be in"),
        ({"min_p": 1.1}, "min_p must be in"),
        ({"repetition_penalty": 0}, "repetition_penalty must be > 0"),
        ({"stop": "end"}, "stop must be strings, none empty, got 'end'"),
        ({"stop": ("",)}, "stop must be strings"),
    ],
)
def test_bad_params(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)
