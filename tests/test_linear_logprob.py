import math
import os
import re
from unittest import mock

import pytest
import torch
from cross_compile import assert_compiles, every_card, recorded_launches
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import _runtime, linear_logprob, logit_passes, logit_passes_cpu, logit_plan
from nanogrpo.kernels.linear_logprob import fused_linear_logprob, fused_linear_logprob_ref
from nanogrpo.kernels.quantization import dequantize_4bit, quantize_4bit
from numerics import EPS, assert_no_worse_than
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
MiB = 2**20


def problem(N, D, V, dtype, *, device="cpu", scale=1.0, seed=0, bias=True):
    """hidden, weight, bias, target_ids and the upstream gradients; logits have a standard deviation of ``scale``."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    hidden, weight = draw(N, D) * scale, draw(V, D) / D**0.5
    target_ids = torch.randint(0, V, (N,), generator=g)
    target_ids[: min(N, 2)] = torch.tensor([0, V - 1])[: min(N, 2)]  # both borders of the vocabulary
    leaves = [tensor.to(device, dtype) for tensor in (hidden, weight, draw(V))]
    return (
        *leaves[: 2 + bias],
        *[None] * (not bias),
        target_ids.to(device),
        draw(2, N).to(device, torch.float32),
    )


def outputs_and_gradients(
    function, hidden, weight, bias, target_ids, upstream, *, frozen=False, used=(0, 1), **kwargs
):
    """logprobs and entropy, then the gradients of their sums weighted by ``upstream``: to hidden, weight and bias, or
    to hidden alone where the head is ``frozen``; of the outputs ``used``."""
    given = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    leaves = [tensor.detach().requires_grad_() for tensor in (given[:1] if frozen else given)]
    weight, bias = (weight, bias) if frozen else (leaves[1], leaves[2] if bias is not None else None)
    output = function(leaves[0], weight, target_ids, bias=bias, **kwargs)
    terms = [output[i] for i in used if output[i] is not None]
    weights = [row.reshape(term.shape).to(term.dtype) for row, term in zip(upstream, terms, strict=False)]
    return terms, torch.autograd.grad(terms, leaves, weights)


def assert_agrees(hidden, weight, bias, target_ids, upstream, **kwargs):
    """Values and every gradient against float64, no worse than the float32 reference on the same inputs.

    Values only round in float32; CUDA's are counted in bits, which rounds once more.
    Gradients round dz to hidden's dtype once and the result once: one relative error
    of EPS each for the largest term, and dz is at most |upstream| log V / temperature in size.
    1 - p cancels where p is near 1, which leaves dz an absolute error of EPS |upstream| / temperature, and the
    product with hidden (or weight) as much of that.
    """
    wide = lambda dtype: [None if tensor is None else tensor.to(dtype) for tensor in (hidden, weight, bias)]
    ours = outputs_and_gradients(fused_linear_logprob, hidden, weight, bias, target_ids, upstream, **kwargs)
    plain = outputs_and_gradients(
        fused_linear_logprob_ref, *wide(torch.float32), target_ids, upstream, **kwargs
    )
    truth = outputs_and_gradients(
        fused_linear_logprob_ref, *wide(torch.float64), target_ids, upstream, **kwargs
    )
    # The longest sum has max(D, V) terms of which float32 rounds each; random signs make it a square root.
    terms = max(hidden.shape[-1], len(weight), hidden.numel() // hidden.shape[-1]) ** 0.5
    for name, *values in zip(("logprobs", "entropy"), ours[0], plain[0], truth[0], strict=False):
        assert values[0].dtype == torch.float32
        assert_no_worse_than(*values, floor=EPS[torch.float32] * terms, name=name)
    largest = lambda tensor: tensor.detach().abs().max().item() if tensor.numel() else 0.0
    unit = largest(upstream) / kwargs.get("temperature", 1.0)
    factors = (largest(weight), largest(hidden), 1.0)
    for name, factor, *values in zip(
        ("hidden", "weight", "bias"), factors, ours[1], plain[1], truth[1], strict=False
    ):
        assert values[0].dtype == hidden.dtype
        floor = EPS[torch.float32] * terms * max(1.0, unit * factor)
        floor += 0 if hidden.dtype == torch.float32 else 2 * EPS[hidden.dtype]
        assert_no_worse_than(*values, floor=floor, name=f"grad {name}")


@given(
    N=st.sampled_from([1, 2, 31, 70, 129]),
    D=st.sampled_from([1, 7, 32, 64, 100]),
    V=st.sampled_from([1, 2, 3, 97, 256, 300, 1031]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    bias=st.booleans(),
    entropy=st.booleans(),
    masked=st.booleans(),
    frozen=st.sampled_from([True, False]),
    used=st.sampled_from([(0,), (0, 1)]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_float64(
    N, D, V, dtype, scale, temperature, softcap, bias, entropy, masked, frozen, used, seed
):
    inputs = problem(N, D, V, dtype, scale=scale, seed=seed, bias=bias)
    mask = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    assert_agrees(
        *inputs, temperature=temperature, softcap=softcap, mask=mask, return_entropy=entropy, frozen=frozen, used=used
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "N, D, V", [(1, 64, 49152), (777, 576, 49152), (1000, 1536, 50257), (300, 1001, 32003)]
)
def test_agrees_with_float64_on_the_gpu(N, D, V, dtype):
    inputs = problem(N, D, V, dtype, device="cuda", scale=3.0)
    assert_agrees(*inputs, temperature=0.8, return_entropy=True)
    assert_agrees(*inputs, temperature=0.8, softcap=4.0, return_entropy=True)
    assert_agrees(*inputs, temperature=0.8, frozen=True, return_entropy=True, used=(0,))
    assert_agrees(*inputs, temperature=0.8, softcap=4.0, frozen=True)


@pytest.mark.gpu
@pytest.mark.parametrize("N, D, V", [(1024, 1536, 151936), (1024, 4096, 128256), (1024, 5120, 100352)])
def test_goals_of_precision_at_real_shapes(N, D, V):
    """Log-probs within 1e-5 (1 + |logp|); the gradient at most 1.2 times as far off as the exact one rounded."""
    hidden, weight, _, target_ids, upstream = problem(N, D, V, torch.bfloat16, device="cuda", bias=False)
    (ours,), (gradient,) = outputs_and_gradients(
        fused_linear_logprob, hidden, weight, None, target_ids, upstream, frozen=True
    )
    some = slice(0, N, 16)
    (truth,), (exact,) = outputs_and_gradients(
        fused_linear_logprob_ref, hidden[some].double(), weight.double(), None, target_ids[some], upstream[:, some],
        frozen=True,
    )  # fmt: skip
    assert ((ours[some] - truth).abs() <= 1e-5 * (1 + truth.abs())).all()
    error = lambda values: (values.double() - exact).abs().max()
    assert error(gradient[some]) <= 1.2 * error(exact.bfloat16())


@pytest.mark.skipif(INTERPRET, reason="float64 is the torch path's")
def test_float64_gradcheck():
    hidden, weight, bias, target_ids, _ = problem(5, 6, 9, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    call = lambda h, w, b: fused_linear_logprob(
        h, w, target_ids, bias=b, temperature=0.7, softcap=2.0, return_entropy=True
    )
    assert torch.autograd.gradcheck(call, leaves)


def test_only_one_output_used():
    hidden, weight, bias, target_ids, upstream = problem(9, 16, 70, torch.float32)
    for used in (0, 1):  # the frozen head's direction serves logprobs alone
        got, expected = [], []
        for function, results in ((fused_linear_logprob, got), (fused_linear_logprob_ref, expected)):
            leaf = hidden.clone().requires_grad_()
            output = function(leaf, weight, target_ids, bias=bias, return_entropy=True)[used]
            results.extend(torch.autograd.grad(output, leaf, upstream[used]))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_many_tiles_and_chunks(monkeypatch):
    # More row blocks and vocabulary tiles than one of each, on both paths.
    monkeypatch.setattr(logit_passes_cpu, "TILE", (8, 64, 512))
    monkeypatch.setattr(linear_logprob, "CUDA_TILE", (16, 256, 4096))
    inputs = problem(37, 24, 1500, torch.float32, scale=3.0)
    assert_agrees(*inputs, temperature=0.9, return_entropy=True)
    assert_agrees(*inputs, temperature=0.9, frozen=True)
    assert_agrees(*inputs, temperature=0.9, softcap=5.0, frozen=True)


def smallest_workspace(*args, **kwargs):
    """The least ``workspace_bytes`` of a call, read from the error that names it."""
    with pytest.raises(ValueError, match=r"workspace_bytes is 1, expected at least \d+") as error:
        fused_linear_logprob(*args, **kwargs, workspace_bytes=1)
    return int(re.search(r"at least (\d+)", str(error.value))[1])


def test_least_workspace_changes_no_bit_of_the_values(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("the CPU path's memory is fixed")
    N, D, V = (300, 40, 1100) if device.type == "cpu" else (1000, 1536, 50257)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    hidden, weight, bias, target_ids, upstream = problem(N, D, V, dtype, device=device, scale=3.0)
    hidden.requires_grad_()
    least = smallest_workspace(hidden, weight, target_ids, bias=bias)
    hidden = hidden.detach()
    inputs = (hidden, weight, bias, target_ids, upstream)
    free = outputs_and_gradients(fused_linear_logprob, *inputs, frozen=True)
    tight = outputs_and_gradients(fused_linear_logprob, *inputs, frozen=True, workspace_bytes=least)
    assert torch.equal(free[0][0], tight[0][0])
    # The accumulator adds the same float32 terms in other groups: 1e-6 of the largest; bfloat16 then rounds once.
    rtol = 1e-5 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(free[1], tight[1], rtol=rtol, atol=1e-5)


@given(
    N=st.integers(1, 40_000), D=st.sampled_from([64, 1536, 4096, 5120]), V=st.integers(1, 300_000),
    MiBs=st.integers(1, 200), processors=st.sampled_from([16, 84, 132]), entropy=st.booleans(),
    gradient=st.booleans(), copied=st.booleans(),
)  # fmt: skip
def test_plan_fits_its_budget(N, D, V, MiBs, processors, entropy, gradient, copied):
    how = {"entropy": entropy, "gradient": gradient, "packed": gradient, "copied": copied, "block_v": 256}
    size = lambda R, C: logit_passes.forward_bytes(R, C, V, D, 2, **how)
    budget = max(MiBs * MiB, size(128, 256))
    R, C = logit_passes.plan(N, V, D, 2, budget, processors, **how)
    assert size(R, C) <= budget
    assert R % 128 == 0 and 0 < R < N + 128
    assert C == V or (C % 256 == 0 and 0 < C < V)


@pytest.mark.parametrize(
    "N, D, V", [(8192, 1536, 151936), (4096, 4096, 128256), (4096, 5120, 100352), (2048, 1536, 151936)]
)
@pytest.mark.parametrize("copied", [False, True])
def test_memory_goals(N, D, V, copied):
    """160 MiB by default and 64 MiB by argument, with what is kept for the backward pass."""
    how = {"entropy": False, "gradient": True, "packed": True, "copied": copied, "block_v": 256}
    saved = 16 * N + 2 * N * D
    usual = max(logit_passes.WORKSPACE, logit_passes.WITH_SAVED - saved)
    for budget, goal in ((usual, 160 * MiB), (64 * MiB - saved, 64 * MiB)):
        R, C = logit_passes.plan(N, V, D, 2, budget, 132, **how)
        assert saved + logit_passes.forward_bytes(R, C, V, D, 2, **how) <= goal


@pytest.mark.parametrize(
    "N, D, V, fast",
    [
        (8192, 1536, 151936, (2816, 16896)),
        (4096, 4096, 128256, (1024, 46336)),
        (4096, 5120, 100352, (1024, 33792)),
        (2048, 1536, 151936, (2048, 31488)),
    ],
)
def test_plans_of_measured_shapes(N, D, V, fast):
    """What an H200 was as fast with as with any other; in 64 MiB, chunks that a slow host can launch in time."""
    how = {"entropy": False, "gradient": True, "packed": True, "copied": False, "block_v": 256}
    saved = 16 * N + 2 * N * D
    usual = max(logit_passes.WORKSPACE, logit_passes.WITH_SAVED - saved)
    assert logit_passes.plan(N, V, D, 2, usual, 132, **how) == fast
    R, C = logit_passes.plan(N, V, D, 2, 64 * MiB - saved, 132, **how)
    assert -(-N // R) * -(-V // C) <= 80


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("softcap", [None, 600.0])
def test_targets_far_below_the_top(dtype, softcap):
    """Rows whose other words outweigh target and sample by more than e^60: a spike, a plateau, and -inf."""
    device = "cpu" if dtype == torch.float32 else "cuda"
    hidden, weight, bias, target_ids, upstream = problem(9, 32, 900, dtype, device=device)
    target_ids[:] = 5
    spike, plateau, forbidden = bias.clone(), bias.clone(), bias.clone()
    spike[701] = 500.0
    plateau[300:] += 200.0
    plateau[torch.arange(64) * 900 // 64] = -100.0  # the sampled words
    forbidden[5] = -math.inf
    for shifted in (spike, plateau, forbidden):
        if shifted is forbidden:
            call = lambda f, d: outputs_and_gradients(
                f, hidden.to(d), weight.to(d), forbidden.to(d), target_ids, upstream, frozen=True
            )
            (values,), (gradient,) = call(fused_linear_logprob, dtype)
            (_,), (truth,) = call(fused_linear_logprob_ref, torch.float64)
            assert (values == -math.inf).all()
            torch.testing.assert_close(
                gradient.double(), truth, rtol=2 * EPS[dtype], atol=100 * EPS[torch.float32] + EPS[dtype] / 8
            )
        else:
            assert_agrees(hidden, weight, shifted, target_ids, upstream, softcap=softcap, frozen=True)


def test_cold_and_large_logits():
    hidden, weight, _, target_ids, upstream = problem(40, 32, 700, torch.float32, bias=False)
    assert_agrees(hidden, weight, None, target_ids, upstream, temperature=0.01, frozen=True)
    assert_agrees(100 * hidden, weight, None, target_ids, upstream, frozen=True)


def test_a_sure_target_is_never_positive():
    # s = 1 + something small, summed in up to 64 steps of half an EPS each: nothing else may cancel.
    hidden, weight, bias, target_ids, upstream = problem(6, 32, 900, torch.float32)
    target_ids[:] = 5
    bias[5] += 16.0
    inputs = (weight, bias, target_ids, upstream)
    (values,), (gradient,) = outputs_and_gradients(fused_linear_logprob, hidden, *inputs, frozen=True)
    (_,), (truth,) = outputs_and_gradients(
        fused_linear_logprob_ref, hidden.double(), weight.double(), bias.double(), target_ids, upstream, frozen=True
    )  # fmt: skip
    assert (values <= 0).all()
    assert (gradient - truth).abs().max() <= 32 * EPS[torch.float32] * weight[5].abs().max()


@pytest.mark.skipif(not INTERPRET, reason="launches Triton on CPU tensors")
@pytest.mark.parametrize("copied", [False, True])
def test_descriptors_and_packed_directions(monkeypatch, copied):
    """What Hopper runs in bfloat16, in float16: tensor descriptors, and u as float16 with a scale a row."""
    tiny = {"BLOCK_M": 32, "BLOCK_V": 64, "BLOCK_D": 32}
    monkeypatch.setitem(logit_passes.HALF_CONFIG, 90, logit_passes.TMA_CONFIG | tiny)
    monkeypatch.setattr(_runtime, "arch", lambda device: 90)
    monkeypatch.setattr(logit_passes, "COL_UNIT", 64)
    monkeypatch.setattr(logit_plan, "COL_UNIT", 64)
    hidden, weight, bias, target_ids, _ = problem(75, 40, 333, torch.float16)
    assert logit_passes._config(hidden, weight)["TMA"]
    monkeypatch.setattr(logit_passes, "_packs", lambda hidden, gradient: gradient)
    given = weight.float() if copied else weight
    how = logit_passes.forward_bytes
    least = how(128, 64, 333, 40, 2, entropy=True, gradient=True, packed=True, copied=copied, block_v=64)
    logprobs, entropies, _, direction, scale = logit_passes.forward(
        hidden, given, [], 0, 0, bias, target_ids, 0.7, 5.0, True, True, least + 20_000
    )
    leaf = hidden.double().requires_grad_()
    truth = fused_linear_logprob_ref(
        leaf,
        weight.double(),
        target_ids,
        bias=bias.double(),
        temperature=0.7,
        softcap=5.0,
        return_entropy=True,
    )
    torch.testing.assert_close(logprobs.double(), truth.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), truth.entropy, rtol=1e-5, atol=1e-5)
    (exact,) = torch.autograd.grad(truth.logprobs.sum(), leaf)
    peak = direction.abs().amax(1)
    assert ((peak >= 2**14) & (peak <= 2**15)).all() and (scale.frexp().mantissa == 0.5).all()
    # Rounding of p to float16 in the sum and of u itself.
    size = exact.abs().amax(1, keepdim=True)
    assert ((direction.double() * scale[:, None] - exact).abs() <= 2 * EPS[torch.float16] * size).all()


def test_masked_rows_are_zero_cost_nothing_and_stop_nan():
    hidden, weight, bias, target_ids, upstream = problem(21, 16, 70, torch.float32)
    mask = torch.arange(21) % 3 != 0
    hidden[~mask], target_ids[~mask] = float("nan"), -100
    call = lambda keep, **kwargs: outputs_and_gradients(
        fused_linear_logprob, hidden[keep], weight, bias, target_ids[keep], upstream[:, keep], **kwargs,
        return_entropy=True,
    )  # fmt: skip
    values, gradients = call(slice(None), mask=mask)
    kept_values, kept_gradients = call(mask)
    for full, kept in zip((*values, gradients[0]), (*kept_values, kept_gradients[0]), strict=True):
        assert torch.equal(full[mask], kept)
        assert (full[~mask] == 0).all()
    assert torch.equal(gradients[1], kept_gradients[1]) and torch.equal(gradients[2], kept_gradients[2])


@pytest.mark.parametrize("count", [0, 1, 128, 129, 257, 300])
def test_masked_rows_in_chunks(device, count):
    """However many rows are left for a chunk begun before that is known: the bits of a call with these rows alone."""
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("the CPU path knows how many")
    (D, V), dtype = ((40, 700), torch.float32) if device.type == "cpu" else ((576, 49152), torch.bfloat16)
    hidden, weight, bias, target_ids, upstream = problem(300, D, V, dtype, device=device, scale=3.0)
    mask = torch.randperm(300, generator=torch.Generator().manual_seed(count)).to(device) < count
    mask = torch.stack((mask, ~mask), 1)[:, 0]  # strides of two
    least = smallest_workspace(hidden.clone().requires_grad_(), weight, target_ids, bias=bias)
    hidden[~mask], target_ids[~mask] = float("nan"), -100
    call = lambda keep, **kwargs: outputs_and_gradients(
        fused_linear_logprob, hidden[keep], weight, bias, target_ids[keep], upstream[:, keep], frozen=True, **kwargs
    )  # fmt: skip
    values, gradient = call(slice(None), mask=mask, workspace_bytes=least)
    with torch.no_grad():
        again = fused_linear_logprob(hidden, weight, target_ids, bias=bias, mask=mask).logprobs
    kept_values, kept_gradient = call(mask)
    assert torch.equal(values[0], again)
    assert torch.equal(values[0][mask], kept_values[0])
    assert (values[0][~mask] == 0).all() and (gradient[0][~mask] == 0).all()
    rtol = 1e-5 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(gradient[0][mask], kept_gradient[0], rtol=rtol, atol=1e-5)


@pytest.mark.skipif(INTERPRET, reason="launches are recorded, not run")
def test_the_device_has_work_before_the_host_counts():
    hidden, weight, _, target_ids, _ = problem(300, 64, 600, torch.bfloat16)
    before = []
    with recorded_launches(90) as launches:

        def wait(kept):
            before.extend(name for name, _ in launches)
            return 200, 256

        with mock.patch.object(logit_passes.KeptRows, "wait", wait):
            how = 1.0, None, False, True, None
            outputs, rows = logit_passes.forward_kept(
                hidden, weight, [], 0, 0, None, target_ids, target_ids > 9, *how
            )
    assert before == [f"_{name}_kernel" for name in ("compact", "gather", "reference", "stats")]
    assert len(rows) == 200 and all(tensor.shape[-2:-1] in ((), (2,), (200,)) for tensor in outputs)


@pytest.mark.skipif(INTERPRET, reason="launches are recorded, not run")
def test_values_of_kept_rows_are_made_once():
    hidden, weight, _, target_ids, _ = problem(300, 64, 600, torch.bfloat16)
    with (
        recorded_launches(90) as launches,
        mock.patch.object(logit_passes.KeptRows, "wait", lambda kept: (200, 256)),
    ):
        operands = hidden, weight, [], 0, 0, None, target_ids, target_ids > 9
        logit_passes.forward_kept(*operands, 1.0, None, False, False, None)
    assert [name for name, _ in launches] == [
        f"_{name}_kernel" for name in ("compact", "gather", "stats", "merge")
    ]


@pytest.mark.skipif(not INTERPRET, reason="launches Triton on CPU tensors")
def test_a_target_outside_the_vocabulary_is_nan_whatever_was_there(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_ones)
    hidden, weight, bias, target_ids, _ = problem(12, 16, 300, torch.float32)
    target_ids[3], target_ids[4] = 300, -100
    for gradient in (False, True):
        how = 1.0, 5.0, False, gradient, None
        logprobs, _, _, direction, _ = logit_passes.forward(hidden, weight, [], 0, 0, bias, target_ids, *how)
        bad = (target_ids < 0) | (target_ids >= 300)
        assert torch.equal(logprobs.isnan(), bad)
        assert not gradient or torch.equal(direction.isnan().all(1), bad)


@pytest.mark.gpu
def test_masked_rows_wait_for_no_kernel(monkeypatch):
    monkeypatch.setattr(_runtime, "CHECK", False)  # whose look at the targets waits
    hidden, weight, _, target_ids, _ = problem(300, 64, 600, torch.bfloat16, device="cuda")
    leaf, mask = hidden.requires_grad_(), target_ids > 300
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_linear_logprob(leaf, weight, target_ids, mask=mask).logprobs.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [0, 4])
def test_no_rows(rows):
    hidden, weight, bias, target_ids, upstream = problem(rows, 8, 33, torch.float32)
    values, gradients = outputs_and_gradients(
        fused_linear_logprob, hidden, weight, bias, target_ids, upstream,
        mask=torch.zeros(rows, dtype=torch.bool), return_entropy=True,
    )  # fmt: skip
    assert all(tensor.shape == (rows,) for tensor in values)
    assert all((tensor == 0).all() for tensor in (*values, *gradients))
    assert [tensor.shape for tensor in gradients] == [(rows, 8), (33, 8), (33,)]


def test_leading_shapes_and_strides():
    hidden, weight, bias, target_ids, upstream = problem(24, 16, 65, torch.float32)
    expected = outputs_and_gradients(fused_linear_logprob, hidden, weight, bias, target_ids, upstream)
    strided = hidden.view(4, 6, 16).mT.contiguous().mT
    wide_weight = torch.empty_strided((65, 16), (1, 65)).copy_(weight)
    got = outputs_and_gradients(
        fused_linear_logprob, strided, wide_weight, bias.repeat_interleave(2)[::2], target_ids.view(4, 6), upstream
    )  # fmt: skip
    assert got[0][0].shape == (4, 6)
    for ours, theirs in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-6)


def test_forbidden_tokens():
    # A bias of -inf forbids a token: whole tiles of them, and the entropy stays finite.
    hidden, weight, bias, target_ids, upstream = problem(5, 16, 600, torch.float32)
    bias[:300], target_ids[:] = float("-inf"), 300 + torch.arange(5)
    assert_agrees(hidden, weight, None, target_ids, upstream)
    output = fused_linear_logprob(hidden, weight, target_ids, bias=bias, return_entropy=True)
    short = fused_linear_logprob(hidden, weight[300:], target_ids - 300, bias=bias[300:], return_entropy=True)
    torch.testing.assert_close(output, short, rtol=1e-5, atol=1e-5)
    leaf = hidden.requires_grad_()
    output = fused_linear_logprob(leaf, weight, target_ids, bias=bias, return_entropy=True)
    assert torch.autograd.grad(sum(output).sum(), leaf)[0].isfinite().all()


def test_tiny_upstream_survives_float16():
    # 1e-6 / V underflows in float16, the format of the coefficients: they leave the kernel rescaled.
    hidden, weight, bias, target_ids, upstream = problem(6, 32, 1000, torch.float16, scale=0.1)
    inputs = (hidden, weight, bias, target_ids)
    _, plain = outputs_and_gradients(fused_linear_logprob, *inputs, upstream)
    _, scaled = outputs_and_gradients(fused_linear_logprob, *inputs, upstream * 2.0**-8)
    torch.testing.assert_close(scaled[0] * 2.0**8, plain[0], rtol=2.0**-9, atol=2.0**-16)


def test_grad_mode_and_company_leave_the_bits(device):
    if device.type == "cpu":
        pytest.skip("the products of torch, and of numpy under the interpreter, round a row by its place")
    shape = 300, 576, 49152
    hidden, weight, bias, target_ids, _ = problem(*shape, torch.bfloat16, device=device, scale=3.0)
    call = lambda rows: fused_linear_logprob(
        hidden[rows], weight, target_ids[rows], bias=bias, temperature=0.7, return_entropy=True
    )
    with torch.no_grad():
        reference, again = call(slice(None)), call(slice(None))
    hidden.requires_grad_(), weight.requires_grad_()
    trained = call(slice(None))
    weight.requires_grad_(False)
    frozen = call(slice(None))
    assert frozen.logprobs.grad_fn is not None
    for rows in (slice(0, 1), slice(17, 18), slice(5, 40)):
        for alone, together in zip(call(rows), reference, strict=True):
            assert torch.equal(alone, together[rows])
    for values in (again, trained, frozen):
        assert all(torch.equal(left, right) for left, right in zip(values, reference, strict=True))
    for leaf in (hidden, hidden.detach()):
        values = fused_linear_logprob(leaf, weight, target_ids, bias=bias, temperature=0.7).logprobs
        assert torch.equal(values, reference.logprobs)


@pytest.mark.gpu
def test_two_runs_are_equal():
    hidden, weight, _, target_ids, upstream = problem(
        1000, 1536, 151936, torch.bfloat16, device="cuda", bias=False
    )
    call = lambda: outputs_and_gradients(
        fused_linear_logprob, hidden, weight, None, target_ids, upstream, frozen=True
    )
    (first, gradient), (second, again) = call(), call()
    assert torch.equal(first[0], second[0]) and torch.equal(gradient[0], again[0])


@pytest.mark.skipif(INTERPRET, reason="the torch path's promise")
def test_a_row_alone_on_the_cpu_is_within_rounding():
    hidden, weight, bias, target_ids, _ = problem(30, 64, 5000, torch.float32)
    together = fused_linear_logprob(hidden, weight, target_ids, bias=bias).logprobs
    alone = torch.cat(
        [
            fused_linear_logprob(hidden[i : i + 1], weight, target_ids[i : i + 1], bias=bias).logprobs
            for i in range(30)
        ]
    )
    torch.testing.assert_close(
        alone, together, rtol=0, atol=8 * EPS[torch.float32] * together.abs().max().item()
    )


@pytest.mark.parametrize("format, double_quant", [("nf4", False), ("nf4", True), ("int4", False)])
def test_quantized_head(format, double_quant):
    hidden, weight, bias, target_ids, upstream = problem(19, 64, 900, torch.float32, scale=3.0)
    quantized = quantize_4bit(weight, format, 64 if format == "nf4" else 32, double_quant)
    workspace = None
    if INTERPRET:  # several chunks of the quantised head
        leaf = hidden.clone().requires_grad_()
        workspace = smallest_workspace(leaf, quantized, target_ids, bias=bias, return_entropy=True)
    for trained, used in ((False, (0,)), (False, (0, 1)), (True, (0, 1))):
        results = []
        for head in (quantized, dequantize_4bit(quantized, torch.float32)):
            leaves = [hidden.detach().requires_grad_(), bias.clone().requires_grad_(trained)]
            output = fused_linear_logprob(
                leaves[0], head, target_ids, bias=leaves[1], temperature=0.7, return_entropy=True,
                workspace_bytes=workspace,
            )  # fmt: skip
            terms, weights = [output[i] for i in used], [upstream[i] for i in used]
            results.append((*output, *torch.autograd.grad(terms, leaves[: 1 + trained], weights)))
        torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_packed_head(format):
    hidden, weight, _, target_ids, upstream = problem(9, 128, 300, torch.float32, scale=3.0)
    quantized, results = quantize_4bit(weight, format), []
    for head in (quantized.packed(), quantized):
        leaf = hidden.detach().requires_grad_()
        output = fused_linear_logprob(leaf, head, target_ids, return_entropy=True)
        results.append((*output, *torch.autograd.grad(list(output), leaf, list(upstream[:2]))))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.skipif(INTERPRET, reason="once is enough")
def test_quantized_head_compiles_without_graph_breaks():
    hidden, weight, _, target_ids, _ = problem(7, 64, 600, torch.float32)
    quantized = quantize_4bit(weight)
    call = lambda h: fused_linear_logprob(h, quantized, target_ids).logprobs
    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = hidden.clone().requires_grad_()
        values = function(leaf)
        results.append((values, *torch.autograd.grad(values.sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_bad_input():
    hidden, weight, bias, target_ids, _ = problem(6, 8, 20, torch.float32)
    call = fused_linear_logprob
    with pytest.raises(ValueError, match=r"hidden is torch.int32, expected one of"):
        call(hidden.int(), weight, target_ids)
    with pytest.raises(ValueError, match=r"hidden is \(6, 7\), expected \(..., 8\)"):
        call(hidden[:, :7], weight, target_ids)
    with pytest.raises(ValueError, match=r"target_ids is \(5,\), expected \(6,\)"):
        call(hidden, weight, target_ids[:5])
    with pytest.raises(ValueError, match=r"target_ids is torch.int32"):
        call(hidden, weight, target_ids.int())
    with pytest.raises(ValueError, match=r"bias is \(19,\), expected \(20,\)"):
        call(hidden, weight, target_ids, bias=bias[:19])
    with pytest.raises(ValueError, match=r"mask is torch.float32"):
        call(hidden, weight, target_ids, mask=torch.ones(6))
    with pytest.raises(ValueError, match=r"weight is on meta, hidden on cpu"):
        call(hidden, weight.to("meta"), target_ids)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"temperature is .*, expected a finite number > 0"):
            call(hidden, weight, target_ids, temperature=temperature)
    with pytest.raises(ValueError, match=r"softcap is 0"):
        call(hidden, weight, target_ids, softcap=0)
    for outside in (-1, 20):
        target_ids[4] = outside
        with pytest.raises(
            ValueError, match=rf"target_ids is \[{outside}\] at row \[4\], expected \[0, 20\)"
        ):
            call(hidden, weight, target_ids)


@pytest.mark.gpu
def test_a_target_outside_the_vocabulary_is_nan_on_the_gpu(monkeypatch):
    hidden, weight, bias, target_ids, _ = problem(6, 64, 500, torch.bfloat16, device="cuda")
    target_ids[3], target_ids[4] = 500, -100
    monkeypatch.setattr(_runtime, "CHECK", True)
    with pytest.raises(ValueError, match=r"target_ids is \[500\] at row \[3\], expected \[0, 500\)"):
        fused_linear_logprob(hidden, weight, target_ids)
    monkeypatch.setattr(_runtime, "CHECK", False)
    logprobs = fused_linear_logprob(hidden, weight, target_ids).logprobs
    assert logprobs.isnan().tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("softcap, entropy", [(None, False), (5.0, True)])
def test_registered_operators(softcap, entropy):
    hidden, weight, bias, target_ids, upstream = problem(7, 16, 70, torch.float32)
    operands, ops = (hidden, weight, [], 0, 0, bias, target_ids), torch.ops.nanogrpo
    for gradient in (False, True):
        args = (*operands, 0.7, softcap, entropy, gradient, None)
        torch.library.opcheck(ops.linear_logprob_fwd, args)
    stats = torch.rand(3, 7)
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        args = (*operands, stats, upstream[: 1 + entropy], 0.7, softcap, needs, None)
        torch.library.opcheck(ops.linear_logprob_bwd, args)
    for scale in (torch.rand(7), torch.empty(0)):
        torch.library.opcheck(ops.linear_logprob_scale, (hidden, scale, upstream[0], None, torch.bfloat16))


def test_compiles_without_graph_breaks():
    hidden, weight, bias, target_ids, upstream = problem(12, 16, 70, torch.float32)
    mask = torch.arange(12) % 4 != 1
    compiled = torch.compile(fused_linear_logprob, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (12, 9):
        inputs = (hidden[:rows], weight, bias, target_ids[:rows], upstream[:, :rows])
        kwargs = {"temperature": 0.7, "softcap": 5.0, "return_entropy": True, "mask": mask[:rows]}
        for how in ({}, {"frozen": True}, {"frozen": True, "used": (0,)}):
            got = outputs_and_gradients(compiled, *inputs, **kwargs, **how)
            expected = outputs_and_gradients(fused_linear_logprob, *inputs, **kwargs, **how)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_checkpoint_and_twice_in_one_graph(frozen):
    hidden, weight, bias, target_ids, upstream = problem(8, 16, 70, torch.float32)
    leaf = hidden.clone().requires_grad_()
    weight.requires_grad_(not frozen)
    call = lambda h: fused_linear_logprob(h, weight, target_ids, bias=bias).logprobs
    (once,) = torch.autograd.grad(call(leaf), leaf, upstream[0])
    for reentrant in (False, True):
        values = call(leaf) + checkpoint(call, leaf, use_reentrant=reentrant)
        leaf.grad = None
        values.backward(upstream[0])
        assert torch.equal(leaf.grad, 2 * once)


def test_autocast_rounds_hidden_like_linear(device):
    if device.type == "cpu" and INTERPRET:
        pytest.skip("bfloat16 is wrong in the interpreter")
    hidden, weight, bias, target_ids, upstream = problem(8, 64, 300, torch.float32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        values, gradients = outputs_and_gradients(
            fused_linear_logprob, hidden, weight, bias, target_ids, upstream
        )
    expected = fused_linear_logprob_ref(
        hidden.bfloat16(), weight.bfloat16() if device.type == "cuda" else weight, target_ids, bias=bias
    )
    torch.testing.assert_close(values[0], expected.logprobs, rtol=1e-5, atol=1e-5)
    assert [tensor.dtype for tensor in gradients] == [torch.float32] * 3


def launch_all(N, D, V, dtype, softcap=None, entropy=False):
    hidden, weight, bias, target_ids, upstream = problem(N, D, V, dtype, bias=entropy)
    scales = 0.7, softcap
    packs = lambda hidden, gradient: gradient and hidden.dtype == torch.bfloat16
    counted = lambda kept: (N, 128)  # nothing runs that could count
    with (
        mock.patch.object(logit_passes, "_packs", packs),
        mock.patch.object(logit_passes.KeptRows, "wait", counted),
    ):
        for gradient in (False, True):
            operands, how = (hidden, weight, [], 0, 0, bias, target_ids), (*scales, entropy, gradient, None)
            logit_passes.forward(*operands, *how)
            logit_passes.forward_kept(*operands, target_ids > 0, *how)
    logit_passes.coefficients(
        hidden, weight, bias, target_ids, 0, torch.rand(3, N), upstream[: 1 + entropy], *scales
    )
    for rows in (None, torch.arange(N)):
        logit_passes.scale_rows(hidden, torch.rand(N), upstream[0], rows, dtype)


KERNELS = {
    f"_{name}_kernel"
    for name in (
        "compact",
        "gather",
        "stats",
        "merge",
        "reference",
        "direction",
        "coefficients",
        "scale_rows",
    )
}


@pytest.mark.skipif(INTERPRET, reason="compiles for real cards")
@every_card
@pytest.mark.parametrize("args", [(4, 128, 600, torch.bfloat16, 5.0, True), (4, 100, 600, torch.float32)])
def test_every_configuration_compiles(cc, args):
    assert_compiles(lambda: launch_all(*args), cc, KERNELS)


@pytest.mark.skipif(INTERPRET, reason="compiles for real cards")
def test_pointers_on_hopper():
    # Rows of 2 * 100 bytes fit no descriptor.
    assert not logit_passes._describable(torch.empty(4, 100, dtype=torch.bfloat16))
    assert_compiles(lambda: launch_all(4, 100, 600, torch.bfloat16), 90, KERNELS)


@pytest.mark.skipif(INTERPRET, reason="compiles for real cards")
@pytest.mark.parametrize("N, D, V", [(1, 1, 1), (1, 7, 200), (16, 1, 600)])
def test_sizes_that_the_compiler_folds(N, D, V):
    # An argument equal to 1 reaches the kernel as a constant, which has no tensor methods.
    assert_compiles(lambda: launch_all(N, D, V, torch.float32, 5.0, True), 80, KERNELS)


def extra_bytes(N, D, V, trained, workspace):
    """The formula of the module's docstring for one forward and backward in bfloat16 with nothing but logprobs."""
    if not trained:
        return workspace or max(152 * MiB, 96 * MiB + 2 * N * D + 16 * N)
    rows = min(N, 8192)
    chunk = min(16384, max(256, 2**25 // rows // 256 * 256), V)
    forward = 24 * MiB + 16 * N
    backward = rows * chunk * 2 + 6 * N * D + 32 * N + 8 * chunk * D + 2 * V * D
    return max(forward, backward) + 16 * N


@pytest.mark.gpu
@pytest.mark.parametrize("trained, workspace", [(False, None), (False, 64 * MiB), (True, None)])
@pytest.mark.parametrize(
    "N, D, V", [(8192, 1536, 151936), (500, 1536, 151936), (4096, 4096, 128256), (4096, 5120, 100352)]
)
def test_memory_stays_within_the_formula(N, D, V, trained, workspace):
    hidden = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16, requires_grad=trained)
    target_ids = torch.randint(0, V, (N,), device="cuda")
    call = lambda h, w, t: fused_linear_logprob(h, w, t, workspace_bytes=workspace).logprobs
    # The matmul library's workspace, one for each thread, is not the operation's.
    call(hidden[:64], weight[:512], target_ids[:64] % 512).sum().backward()
    hidden.grad = weight.grad = None

    def peak_of(step):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    slack = 4 * MiB  # allocator granularity, targets and upstream
    logprobs, forward = peak_of(lambda: call(hidden, weight, target_ids))
    kept = 2 * N * D + 20 * N
    limit = extra_bytes(N, D, V, trained, workspace)
    assert forward <= limit + slack, f"forward {forward / MiB:.1f} MiB"
    _, backward = peak_of(lambda: logprobs.sum().backward())
    if trained:
        assert backward <= limit + slack, f"backward {backward / MiB:.1f} MiB"
    else:
        # What forward kept, the gradient returned and nothing of their size besides.
        assert backward <= 2 * N * D + slack, f"backward {backward / MiB:.1f} MiB"
        assert max(forward, kept + backward) <= 160 * MiB


@pytest.mark.gpu
def test_more_logits_than_int32_counts():
    N, D, V = 17_000, 64, 151_936
    hidden, weight, bias, target_ids, upstream = problem(N, D, V, torch.bfloat16, device="cuda", scale=3.0)
    assert N * V > 2**31
    last = slice(N - 50, N)
    inputs = (fused_linear_logprob, hidden, weight, bias, target_ids, upstream[:1])
    whole, frozen = outputs_and_gradients(*inputs), outputs_and_gradients(*inputs, frozen=True)
    part = outputs_and_gradients(
        fused_linear_logprob, hidden[last], weight, bias, target_ids[last], upstream[:1, last]
    )
    assert torch.equal(whole[0][0], frozen[0][0])
    torch.testing.assert_close(frozen[1][0][last].float(), part[1][0].float(), rtol=2.0**-6, atol=1e-3)
    assert torch.equal(whole[0][0][last], part[0][0])
    truth = fused_linear_logprob_ref(
        hidden[last].double(), weight.double(), target_ids[last], bias=bias.double()
    )
    torch.testing.assert_close(part[0][0].double(), truth.logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole[1][0][last].float(), part[1][0].float(), rtol=2.0**-6, atol=1e-3)


@pytest.mark.skipif(INTERPRET, reason="the torch path's promise")
def test_cpu_memory_is_bounded():
    hidden, weight, bias, target_ids, upstream = problem(2000, 32, 49152, torch.float32)
    given_storages = {tensor.untyped_storage().data_ptr() for tensor in (hidden, weight, bias, target_ids)}
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **kwargs or {})
            if isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() not in given_storages:
                largest = max(largest, output.untyped_storage().nbytes())
            return output

    how, scales = (hidden, weight, [], 0, 0, bias, target_ids), (1.0, 9.0)
    with Largest():
        outputs = logit_passes_cpu.forward(*how, *scales, True, False, None)
    assert largest == 4 * 512 * 1024, f"{largest / MiB:.1f} MiB"
    with Largest():
        logit_passes_cpu.forward(*how, *scales, True, True, None)
        stats = torch.cat((outputs[2], outputs[1][None]))
        linear_logprob._backward_torch(*how, stats, upstream, *scales, [True, False, True], None)
    assert largest == 4 * 512 * 1024, f"{largest / MiB:.1f} MiB"
