"""Draws from an output head in slices against those from all of its logits, and the float64 inverse."""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from cross_compile import assert_compiles, every_card
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import sample_from_head, sample_tokens
from numerics import EPS

module = importlib.import_module("nanogrpo.kernels.head_sampling")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def problem(R, V, D, *, device="cpu", dtype=torch.float32, seed=0, scale=3.0):
    """hidden_states, a head whose logits are of size ``scale``, and uniforms."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(R, D, generator=generator)
    head = scale * D**-0.5 * torch.randn(V, D, generator=generator)
    uniforms = torch.rand(R, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return *(x.to(device, dtype) for x in (hidden_states, head)), uniforms.to(device)


def assert_inverts_the_cdf(hidden_states, head, uniforms, temperature, **options):
    """Every token holds u to within the logits' rounding and bears its float64 log-probability."""
    tokens, logprobs = sample_from_head(hidden_states, head, temperature, uniforms=uniforms, **options)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert ((tokens >= 0) & (tokens < len(head))).all()
    scaled = hidden_states.double() @ head.double().T / (temperature or 1)
    exact = scaled.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    sizes = hidden_states.double().abs() @ head.double().abs().T / (temperature or 1)
    rounding = 8 * EPS[torch.float32] * (1 + sizes.max().item())
    assert (logprobs - exact).abs().max() <= rounding
    if temperature == 0:
        assert (scaled.amax(-1) - scaled.gather(1, tokens[:, None])[:, 0] <= rounding).all()
        return
    after = scaled.softmax(-1).cumsum(-1).gather(1, tokens[:, None])[:, 0]
    assert (uniforms <= after + rounding).all() and (uniforms >= after - exact.exp() - rounding).all()


@given(
    st.integers(1, 5),
    st.sampled_from([1, 2, 63, 65, 1000, 2048, 2049, 9001]),
    st.sampled_from([1, 16, 70]),
    st.sampled_from([0, 0.3, 1.0, 1.7]),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.sampled_from([1, 5 * 2**15, 2**30]),
    st.integers(0, 2**31),
)
def test_draws_invert_the_cumulative_distribution(R, V, D, temperature, scale, slice_bytes, seed):
    hidden_states, head, uniforms = problem(R, V, D, scale=scale, seed=seed)
    assert_inverts_the_cdf(hidden_states, head, uniforms, temperature, slice_bytes=slice_bytes)


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_draws_among_many_likely_tokens(scale, device):
    """Probabilities near 1e-4: an error of that size in any of the three searches shows."""
    hidden_states, head, uniforms = problem(1, 9001, 32, device=device, scale=scale)
    uniforms = torch.linspace(1e-9, 1 - 1e-9, 40, dtype=torch.float64, device=device)
    assert_inverts_the_cdf(hidden_states.expand(40, -1), head, uniforms, 1.0, slice_bytes=2**20)


def test_slices_cover_the_vocabulary_once():
    for V in (1, 2048, 2049, 49152, 151936):
        for rows in (1, 64, 256, 5000):
            slices = module._slices(V, rows, 40 * 2**20)
            assert [start for start, _ in slices[1:]] == [stop for _, stop in slices[:-1]]
            assert slices[0][0] == 0 and slices[-1][1] == V and all(a % module.CHUNK == 0 for a, _ in slices)
            most = max(40 * 2**20, 4 * rows * module.CHUNK)
            assert all(4 * rows * (stop - start) <= most for start, stop in slices)


def test_keys_draw_what_their_uniforms_draw_from_all_logits(device):
    hidden_states, head, _ = problem(6, 5000, 64, device=device)
    keys = [torch.arange(6, device=device) + n for n in range(4)]
    ours = sample_from_head(hidden_states, head, 0.9, keys=keys, slice_bytes=2**16)
    rows = torch.arange(6, device=device)
    tokens, logprobs = sample_tokens(F.linear(hidden_states, head), rows, 0.9, keys=keys)
    assert torch.equal(ours[0], tokens)
    torch.testing.assert_close(ours[1], logprobs, atol=1e-5, rtol=0)
    one = sample_from_head(hidden_states, head, 0.9, keys=(3, *keys[1:]))
    seeds = torch.full((6,), 3, device=device)
    assert torch.equal(one[0], sample_from_head(hidden_states, head, 0.9, keys=(seeds, *keys[1:]))[0])


def test_a_row_of_nan_draws_a_token_and_nan(device):
    for temperature in (0, 1.0):
        hidden_states, head, uniforms = problem(2, 5000, 16, device=device)
        expected = sample_from_head(hidden_states, head, temperature, uniforms=uniforms)
        hidden_states[1] = torch.nan
        tokens, logprobs = sample_from_head(hidden_states, head, temperature, uniforms=uniforms)
        assert 0 <= tokens[1] < 5000 and logprobs[1].isnan()
        assert tokens[0] == expected[0][0] and torch.equal(logprobs[:1], expected[1][:1])


def test_no_rows(device):
    hidden_states, head, uniforms = problem(0, 100, 16, device=device)
    tokens, logprobs = sample_from_head(hidden_states, head, 1.0, uniforms=uniforms)
    assert tokens.shape == logprobs.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0, 0.6, 1.0])
@pytest.mark.parametrize("V", [49152, 151936, 262145])
def test_gpu_vocabularies(V, temperature):
    hidden_states, head, uniforms = problem(70, V, 1536, device="cuda", dtype=torch.bfloat16)
    assert_inverts_the_cdf(hidden_states, head, uniforms, temperature, slice_bytes=2**23)


@pytest.mark.gpu
def test_gpu_memory_is_as_stated():
    R, V, limit = 256, 151936, 2**24
    hidden_states, head, uniforms = problem(R, V, 256, device="cuda", dtype=torch.bfloat16)
    sample_from_head(hidden_states, head, 1.0, uniforms=uniforms, slice_bytes=limit)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sample_from_head(hidden_states, head, 1.0, uniforms=uniforms, slice_bytes=limit)
    stated = limit + 8 * R * -(-V // module.PART)
    assert torch.cuda.max_memory_allocated() - before <= stated + 2**20


@pytest.mark.gpu
def test_gpu_a_graph_reads_keys_live():
    hidden_states, head, _ = problem(4, 5000, 64, device="cuda", dtype=torch.bfloat16)
    keys = [torch.arange(n, device="cuda") for n in (1, 4, 4, 4)]
    sample_from_head(hidden_states, head, 0.8, keys=keys)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = sample_from_head(hidden_states, head, 0.8, keys=keys)
    for _ in range(3):
        keys[0] += 1
        keys[3] += 1
        graph.replay()
        expected = sample_from_head(hidden_states, head, 0.8, keys=keys)
        assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("V, D, dtype", [(500, 40, torch.float32), (262144, 4096, torch.bfloat16)])
def test_kernels_compile_for_every_card(cc, V, D, dtype):
    hidden_states, head, uniforms = (
        torch.zeros(3, D, dtype=dtype),
        torch.zeros(V, D, dtype=dtype),
        torch.rand(3),
    )
    keys = [torch.arange(n) for n in (1, 3, 3, 3)]

    def launch():
        module._sample_from_head_triton(hidden_states, head, uniforms.double(), [], 1.0, 2**30)
        module._sample_from_head_triton(hidden_states, head, None, keys, 1.0, 2**30)
        module._sample_from_head_triton(hidden_states, head, None, [], 0.0, 2**30)

    assert_compiles(launch, cc, ["_slice_kernel", "_draw_part_kernel"])


def test_operator_passes_opcheck(device):
    hidden_states, head, uniforms = problem(3, 300, 16, device=device)
    op = torch.ops.nanogrpo.sample_from_head
    torch.library.opcheck(op, (hidden_states, head, uniforms, [], 0.7, 2**20))


H, W, U = torch.zeros(3, 8), torch.zeros(9, 8), torch.full((3,), 0.5).double()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden_states": torch.zeros(3, 7)}, r"expected \(R, D\), \(V, D\)"),
        ({"head": torch.zeros(0, 8)}, r"expected \(R, D\), \(V, D\)"),
        ({"head": W.double()}, "expected one dtype"),
        ({"head": W.int()}, "the head is torch.int32"),
        ({"temperature": -1.0}, "the temperature is -1.0"),
        ({"uniforms": None}, "either uniforms or keys"),
        ({"uniforms": U[:2]}, r"uniforms is .* expected torch.float64 \(3,\)"),
        ({"uniforms": None, "keys": (1, *[torch.arange(2)] * 3)}, r"prompt_index is .* \(2,\)"),
        ({"uniforms": None, "keys": (torch.arange(2), *[torch.arange(3)] * 3)}, r"the seed has shape \(2,\)"),
    ],
)
def test_wrong_input_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_from_head(**({"hidden_states": H, "head": W, "temperature": 1.0, "uniforms": U} | arguments))
