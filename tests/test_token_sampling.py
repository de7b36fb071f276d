"""Sampling against the float64 inverse of the distribution and the exact softmax; the noise against numpy."""

import importlib
import math
import os

import numpy as np
import pytest
import torch
from cross_compile import assert_compiles, every_card
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import counter_uniform, sample_tokens
from numerics import EPS
from numpy_noise import numpy_uniform

module = importlib.import_module("nanogrpo.kernels.token_sampling")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
LARGEST, SMALLEST = 1 - 2.0**-53, 2.0**-53  # a uniform may be anything that float64 holds inside (0, 1)


def problem(R, V, B, *, device="cpu", seed=0, scale=3.0, excluded=0.0):
    """logits with a share of -inf (never a whole row), rows and uniforms."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(R, V, generator=generator)
    out = torch.rand(R, V, generator=generator) < excluded
    out[torch.arange(R), torch.randint(V, (R,), generator=generator)] = False
    rows = torch.randint(R, (B,), generator=generator) if R else torch.zeros(0, dtype=torch.int64)
    uniforms = torch.rand(B, generator=generator, dtype=torch.float64).clamp(SMALLEST, LARGEST)
    return logits.masked_fill_(out, -torch.inf).to(device), rows.to(device), uniforms.to(device)


def assert_inverts_the_cdf(logits, rows, uniforms, temperature):
    """Every token holds u to within rounding, has positive probability, and bears its float64 log-probability."""
    tokens, logprobs = sample_tokens(logits, rows, temperature, uniforms=uniforms)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert ((tokens >= 0) & (tokens < logits.shape[1])).all()
    scaled = logits.double() / (temperature or 1)
    exact = scaled.log_softmax(-1)[rows].gather(1, tokens[:, None])[:, 0]
    rounding = 8 * EPS[torch.float32] * (1 + scaled[scaled.isfinite()].abs().max().item())
    assert exact.isfinite().all() and (logprobs - exact).abs().max() <= rounding
    if temperature == 0:
        assert torch.equal(tokens, logits.argmax(-1)[rows])
        return
    after = scaled.softmax(-1).cumsum(-1)[rows].gather(1, tokens[:, None])[:, 0]
    assert (uniforms <= after + rounding).all()
    assert (uniforms >= after - exact.exp() - rounding).all()
    # Away from borders the token is the reference's own.
    expected, _ = module.sample_tokens_ref(logits.double(), rows, uniforms, temperature)
    inside = (uniforms < after - rounding) & (uniforms > after - exact.exp() + rounding)
    assert torch.equal(tokens[inside], expected[inside])


@given(
    st.sampled_from([1, 2, 7]),
    st.sampled_from([1, 2, 63, 65, 1000, 2048, 2049, 9001]),
    st.sampled_from([1, 5, 9]),
    st.sampled_from([0, 0.3, 1.0, 1.7]),
    st.sampled_from([0.0, 0.5, 0.999]),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.integers(0, 2**31),
)
def test_draws_invert_the_cumulative_distribution(R, V, B, temperature, excluded, scale, seed):
    assert_inverts_the_cdf(*problem(R, V, B, excluded=excluded, scale=scale, seed=seed), temperature)


@pytest.mark.parametrize("excluded", [0.0, 0.5])
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_draws_among_many_likely_tokens(scale, excluded, device):
    """Probabilities near 1e-4: an error of that size in any of the three searches shows."""
    assert_inverts_the_cdf(*problem(2, 9001, 40, device=device, scale=scale, excluded=excluded), 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0, 0.6, 1.0])
@pytest.mark.parametrize("V", [49152, 128256, 151936, 256000, 262145])
def test_gpu_vocabularies(V, temperature):
    assert_inverts_the_cdf(*problem(9, V, 70, device="cuda", excluded=0.1), temperature)


def assert_follows(tokens, probs):
    """Chi-square of the counts at 4.5 sigma by Wilson and Hilferty: a false alarm in 300,000."""
    expected = probs * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probs)).double().cpu()
    cells = expected >= 5
    observed = torch.cat([counts[cells], counts[~cells].sum()[None]])
    expected = torch.cat([expected[cells], expected[~cells].sum()[None]])
    keep = expected > 0
    assert observed[~keep].sum() == 0
    chi2 = ((observed - expected)[keep] ** 2 / expected[keep]).sum().item()
    degrees = max(1, int(keep.sum()) - 1)
    assert chi2 < degrees * (1 - 2 / (9 * degrees) + 4.5 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("V", [12, 4200])
def test_draws_follow_the_softmax(V, temperature, device):
    draws = 250 if INTERPRET else 4000 if device.type == "cpu" else 200_000
    logits = 1.5 * torch.randn(1, V, generator=torch.Generator().manual_seed(V))
    group = torch.arange(draws, device=device)
    zero = torch.zeros_like(group)
    tokens, _ = sample_tokens(logits.to(device), zero, temperature, keys=(7, zero, group, zero))
    probs = (logits[0].double() / temperature).softmax(-1)
    assert_follows(tokens, probs)
    if V > 12:  # and by stretches of the vocabulary, which meet the chunks' borders
        assert_follows(tokens // 60, probs.view(-1, 60).sum(-1))


@pytest.mark.parametrize("u", [SMALLEST, 2.0**-30, 0.5, 1 - 2.0**-30, LARGEST])
def test_excluded_tokens_are_never_drawn(u, device):
    V = 2048 + 130
    logits = torch.full((4, V), -torch.inf)
    logits[0, 70] = -1e4  # alone
    logits[1, [64, 2047, 2050]] = torch.tensor([1.0, 0.0, 1.0])
    logits[2, [0, V - 1]] = torch.tensor([-80.0, 80.0])
    logits[3, :5] = -3e38
    uniforms = torch.full((4,), u, dtype=torch.float64, device=device)
    tokens, logprobs = sample_tokens(
        logits.to(device), torch.arange(4, device=device), 1.0, uniforms=uniforms
    )
    assert logits.gather(1, tokens.cpu()[:, None]).isfinite().all() and logprobs.isfinite().all()
    assert tokens[0] == 70 and logprobs[0] == 0


def test_greedy_takes_the_first_of_equal_logits(device):
    V = 9000
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(0)).clamp_(max=3.0)
    first = torch.tensor([0, 63, 64, 2047, 2048, V - 1])
    for row, t in enumerate(first.tolist()):
        logits[row, :t].clamp_(max=2.5)
        logits[row, t::97] = 4.0
    logits, rows = logits.to(device), torch.arange(6, device=device)
    tokens, logprobs = sample_tokens(logits, rows, 0)
    assert torch.equal(tokens.cpu(), first)
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_undefined_rows_give_a_token_and_nan(temperature, device):
    V = 5000
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    logits[0, 4500], logits[1, 7], logits[2], logits[3] = math.nan, math.inf, -math.inf, math.nan
    uniforms = torch.full((5,), 0.7, dtype=torch.float64, device=device)
    rows = torch.arange(5, device=device)
    tokens, logprobs = sample_tokens(logits.to(device), rows, temperature, uniforms=uniforms)
    assert ((tokens >= 0) & (tokens < V)).all()
    assert logprobs[:4].isnan().all() and logprobs[4].isfinite()


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_draw_depends_on_no_other(temperature, device):
    logits, rows, uniforms = problem(5, 5008, 12, device=device)
    tokens, logprobs = sample_tokens(logits, rows, temperature, uniforms=uniforms)
    for i in (0, 4, 11):
        alone = logits[rows[i]][None], torch.zeros_like(rows[:1])
        token, logprob = sample_tokens(*alone, temperature, uniforms=uniforms[i : i + 1])
        assert torch.equal(token, tokens[i : i + 1]) and torch.equal(logprob, logprobs[i : i + 1])
    wide = torch.cat([logits, logits[:, :16]], 1)[:, :5008]  # rows further apart
    assert not wide.is_contiguous()
    again = sample_tokens(wide, rows, temperature, uniforms=uniforms)
    turned = sample_tokens(logits.T.contiguous().T, rows, temperature, uniforms=uniforms)
    for ours in (again, turned):
        assert torch.equal(ours[0], tokens) and torch.equal(ours[1], logprobs)


@given(
    st.integers(-(2**63), 2**64 - 1),
    st.lists(st.tuples(*[st.integers(0, 2**63 - 2)] * 3), min_size=1, max_size=5),
)
def test_uniforms_are_numpys_bit_for_bit(seed, keys):
    ours = counter_uniform(seed, *torch.tensor(keys).unbind(1))
    assert ours.dtype == torch.float64
    assert np.array_equal(ours.numpy(), numpy_uniform(seed, *np.array(keys).T))


def test_uniforms_broadcast_and_stay_inside(device):
    group, position = torch.arange(3, device=device)[:, None], torch.arange(700, device=device)
    ours = counter_uniform(5, torch.tensor(2, device=device), group, position)
    expected = numpy_uniform(5, 2, np.arange(3)[:, None], np.arange(700))
    assert np.array_equal(ours.cpu().numpy(), expected) and len(ours.unique()) == 2100
    assert counter_uniform(5, *[position[:0]] * 3).shape == (0,)
    assert ((ours > 0) & (ours < 1)).all()


@pytest.mark.parametrize("seed", ["int", "one", "each"])
def test_keys_are_the_same_noise(seed, device):
    logits, rows, _ = problem(3, 4500, 8, device=device)
    generator = torch.Generator().manual_seed(1)
    prompt, group, position = (torch.randint(2**40, (8,), generator=generator).to(device) for _ in range(3))
    seeds = {"int": 2**64 - 3, "one": torch.tensor([-3]), "each": torch.arange(-5, 3)}[seed]
    keys = (seeds if isinstance(seeds, int) else seeds.to(device), prompt, group, position)
    fused = sample_tokens(logits, rows, 0.9, keys=keys)
    apart = sample_tokens(logits, rows, 0.9, uniforms=counter_uniform(*keys))
    assert torch.equal(fused[0], apart[0]) and torch.equal(fused[1], apart[1])


@pytest.mark.parametrize("R", [0, 3])
def test_no_draws(R, device):
    tokens, logprobs = sample_tokens(*problem(R, 20, 0, device=device)[:2], 0)
    assert tokens.shape == logprobs.shape == (0,)


def test_operators_pass_opcheck(device):
    logits, rows, uniforms = problem(3, 70, 5, device=device)
    keys = [torch.arange(n, device=device) for n in (1, 5, 5, 5)]
    for noise in ((uniforms, [], 1.0), (None, keys, 1.0), (None, [], 0.0)):
        torch.library.opcheck(torch.ops.nanogrpo.sample_tokens, (logits, rows, *noise))
    torch.library.opcheck(torch.ops.nanogrpo.counter_uniform, (keys[1], *keys[1:]))


@pytest.mark.skipif(INTERPRET, reason="torch.compile does not trace the interpreter")
def test_compiles_to_one_graph(device):
    logits, rows, _ = problem(3, 70, 5, device=device)
    keys = torch.zeros_like(rows[:1]), *[torch.arange(5, device=device)] * 3
    compiled = torch.compile(sample_tokens, fullgraph=True, backend="aot_eager")
    ours, expected = (function(logits, rows, 0.7, keys=keys) for function in (compiled, sample_tokens))
    assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_gpu_graph_reads_logits_and_keys_live(temperature):
    logits, rows, _ = problem(4, 5000, 6, device="cuda")
    keys = [torch.arange(n, device="cuda") for n in (1, 6, 6, 6)]
    sample_tokens(logits, rows, temperature, keys=keys)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = sample_tokens(logits, rows, temperature, keys=keys)
    for step in range(3):
        logits.copy_(problem(4, 5000, 6, seed=step + 1)[0])
        keys[0] += 1
        keys[3] += 1
        graph.replay()
        expected = sample_tokens(logits, rows, temperature, keys=keys)
        assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("V", [500, 262144])
def test_kernels_compile_for_every_card(cc, V):
    logits, rows, uniforms = problem(2, V, 3)
    keys = [torch.arange(n) for n in (1, 3, 3, 3)]

    def launch():
        module._sample_tokens_triton(logits, rows, uniforms, [], 1.0)
        module._sample_tokens_triton(logits, rows, None, keys, 1.0)
        module._sample_tokens_triton(logits, rows, None, [], 0.0)
        module._counter_uniform_triton(keys[1], *keys[1:])

    assert_compiles(launch, cc, ["_chunk_kernel", "_draw_kernel", "_counter_uniform_kernel"])


GOOD = {"logits": torch.zeros(2, 9), "rows": torch.tensor([0, 1, 1]), "temperature": 1.0}
GOOD["uniforms"] = torch.full((3,), 0.5).double()
KEYS = (1, *[torch.arange(3)] * 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logits": torch.zeros(9)}, r"logits is torch.float32 \(9,\)"),
        ({"logits": torch.zeros(2, 0)}, "logits is"),
        ({"logits": torch.zeros(2, 9).half()}, "logits is torch.float16"),
        ({"rows": torch.tensor([0, 1, 2])}, r"rows is 0 to 2, expected \[0, 2\)"),
        ({"rows": torch.tensor([0, -1, 1])}, "rows is -1 to 1"),
        ({"rows": torch.tensor([0, 1, 1]).int()}, "rows is torch.int32"),
        ({"temperature": -0.1}, "the temperature is -0.1"),
        ({"temperature": math.nan}, "the temperature is nan"),
        ({"uniforms": None}, "either uniforms or keys"),
        ({"keys": KEYS}, "either uniforms or keys"),
        ({"uniforms": torch.full((3,), 0.5)}, "uniforms is torch.float32"),
        ({"uniforms": torch.full((2,), 0.5).double()}, r"uniforms is .* expected torch.float64 \(3,\)"),
        (
            {"uniforms": None, "keys": (*KEYS[:3], torch.arange(2))},
            r"position is .* expected torch.int64 \(3,\)",
        ),
        ({"uniforms": None, "keys": (*KEYS[:3], torch.arange(3.0))}, "position is torch.float32"),
        ({"uniforms": None, "keys": (torch.arange(2), *KEYS[1:])}, r"the seed has shape \(2,\)"),
        ({"uniforms": None, "keys": (torch.zeros(1), *KEYS[1:])}, "the seed is torch.float32"),
    ],
)
def test_wrong_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(**(GOOD | changes))


def test_keys_that_do_not_broadcast_raise():
    with pytest.raises(ValueError, match="expected ones that broadcast"):
        counter_uniform(0, torch.arange(2), torch.arange(3), torch.arange(2))
