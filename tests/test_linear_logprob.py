import os

import pytest
import torch
from cross_compile import assert_compiles, every_card
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import linear_logprob
from nanogrpo.kernels.linear_logprob import fused_linear_logprob, fused_linear_logprob_ref
from nanogrpo.kernels.quantization import dequantize_4bit, quantize_4bit
from numerics import EPS, assert_no_worse_than
from torch.utils._python_dispatch import TorchDispatchMode

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


def outputs_and_gradients(function, hidden, weight, bias, target_ids, upstream, **kwargs):
    """logprobs and entropy, then the gradients to hidden, weight and bias of their sums weighted by ``upstream``."""
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    output = function(
        leaves[0], leaves[1], target_ids, bias=leaves[2] if bias is not None else None, **kwargs
    )
    terms = [term for term in output if term is not None]
    weights = [row.reshape(term.shape).to(term.dtype) for row, term in zip(upstream, terms, strict=False)]
    return terms, torch.autograd.grad(terms, leaves, weights)


def assert_agrees(hidden, weight, bias, target_ids, upstream, **kwargs):
    """Values and every gradient against float64, no worse than the float32 reference on the same inputs.

    Values only round in float32. Gradients round dz to hidden's dtype once and the result once: one relative error
    of EPS each for the largest term, and dz is at most |upstream| log V / temperature in size.
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
    for name, *values in zip(("hidden", "weight", "bias"), ours[1], plain[1], truth[1], strict=False):
        assert values[0].dtype == hidden.dtype
        floor = EPS[torch.float32] * terms + (0 if hidden.dtype == torch.float32 else 2 * EPS[hidden.dtype])
        assert_no_worse_than(*values, floor=floor, name=f"grad {name}")


@given(
    N=st.integers(1, 70),
    D=st.sampled_from([1, 7, 32, 64, 100]),
    V=st.sampled_from([1, 2, 3, 97, 256, 300, 1031]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    bias=st.booleans(),
    entropy=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_float64(N, D, V, dtype, scale, temperature, softcap, bias, entropy, masked, seed):
    inputs = problem(N, D, V, dtype, scale=scale, seed=seed, bias=bias)
    mask = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    assert_agrees(*inputs, temperature=temperature, softcap=softcap, mask=mask, return_entropy=entropy)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "N, D, V", [(1, 64, 49152), (777, 576, 49152), (1000, 1536, 50257), (300, 1001, 32003)]
)
def test_agrees_with_float64_on_the_gpu(N, D, V, dtype):
    inputs = problem(N, D, V, dtype, device="cuda", scale=3.0)
    assert_agrees(*inputs, temperature=0.8, return_entropy=True)
    assert_agrees(*inputs, temperature=0.8, softcap=4.0, return_entropy=True)


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
    for used in (0, 1):
        got, expected = [], []
        for function, results in ((fused_linear_logprob, got), (fused_linear_logprob_ref, expected)):
            leaf = hidden.clone().requires_grad_()
            output = function(leaf, weight, target_ids, bias=bias, return_entropy=True)[used]
            results.extend(torch.autograd.grad(output, leaf, upstream[used]))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_many_tiles_and_chunks(monkeypatch):
    # More row blocks, vocabulary tiles and splits than one of each, on both paths.
    monkeypatch.setattr(linear_logprob, "CPU_TILE", (8, 64, 512))
    monkeypatch.setattr(linear_logprob, "CUDA_TILE", (16, 256, 4096))
    monkeypatch.setattr(linear_logprob, "MAX_SPLITS", 3)
    assert_agrees(*problem(37, 24, 1500, torch.float32, scale=3.0), temperature=0.9, return_entropy=True)


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
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("matmul on the CPU rounds by shape")
    dtype, shape = (
        (torch.bfloat16, (300, 576, 49152)) if device.type == "cuda" else (torch.float32, (40, 64, 700))
    )
    hidden, weight, bias, target_ids, _ = problem(*shape, dtype, device=device, scale=3.0)
    call = lambda rows: fused_linear_logprob(
        hidden[rows], weight, target_ids[rows], bias=bias, temperature=0.7, return_entropy=True
    )
    with torch.no_grad():
        reference, again = call(slice(None)), call(slice(None))
    hidden.requires_grad_(), weight.requires_grad_()
    trained = call(slice(None))
    for rows in (slice(0, 1), slice(17, 18), slice(5, 40)):
        for alone, together in zip(call(rows), reference, strict=True):
            assert torch.equal(alone, together[rows])
    for values in (again, trained):
        assert all(torch.equal(left, right) for left, right in zip(values, reference, strict=True))
    assert torch.equal(
        fused_linear_logprob(hidden, weight, target_ids, bias=bias, temperature=0.7).logprobs,
        reference.logprobs,
    )


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


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_quantized_head(monkeypatch, format):
    monkeypatch.setattr(linear_logprob, "SLICE_BYTES", 256 * 64 * 4)  # several slices of 256 rows
    hidden, weight, bias, target_ids, upstream = problem(19, 64, 900, torch.float32, scale=3.0)
    quantized = quantize_4bit(weight, format, block_size=64 if format == "nf4" else 32)
    results = []
    for head in (quantized, dequantize_4bit(quantized, torch.float32)):
        leaves = [hidden.clone().requires_grad_(), bias.clone().requires_grad_()]
        output = fused_linear_logprob(
            leaves[0], head, target_ids, bias=leaves[1], temperature=0.7, return_entropy=True
        )
        results.append((*output, *torch.autograd.grad(tuple(output), leaves, tuple(upstream))))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(INTERPRET, reason="once is enough")
def test_quantized_head_compiles_without_graph_breaks(monkeypatch):
    monkeypatch.setattr(linear_logprob, "SLICE_BYTES", 256 * 64 * 4)
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
def test_a_target_outside_the_vocabulary_is_nan_on_the_gpu():
    hidden, weight, bias, target_ids, _ = problem(6, 64, 500, torch.bfloat16, device="cuda")
    target_ids[3], target_ids[4] = 500, -100
    logprobs = fused_linear_logprob(hidden, weight, target_ids).logprobs
    assert logprobs.isnan().tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("softcap, entropy", [(None, False), (5.0, True)])
def test_registered_operators(softcap, entropy):
    hidden, weight, bias, target_ids, upstream = problem(7, 16, 70, torch.float32)
    operands = (hidden, weight, bias, target_ids)
    torch.library.opcheck(torch.ops.nanogrpo.linear_logprob_fwd, (*operands, 0.7, softcap, entropy))
    stats = torch.rand(3, 7)
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        args = (*operands, stats, upstream[: 1 + entropy], 0.7, softcap, needs)
        torch.library.opcheck(torch.ops.nanogrpo.linear_logprob_bwd, args)


def test_compiles_without_graph_breaks():
    hidden, weight, bias, target_ids, upstream = problem(12, 16, 70, torch.float32)
    mask = torch.arange(12) % 4 != 1
    compiled = torch.compile(fused_linear_logprob, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (12, 9):
        inputs = (hidden[:rows], weight, bias, target_ids[:rows], upstream[:, :rows])
        kwargs = {"temperature": 0.7, "softcap": 5.0, "return_entropy": True, "mask": mask[:rows]}
        got = outputs_and_gradients(compiled, *inputs, **kwargs)
        expected = outputs_and_gradients(fused_linear_logprob, *inputs, **kwargs)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_checkpoint_and_twice_in_one_graph():
    hidden, weight, bias, target_ids, upstream = problem(8, 16, 70, torch.float32)
    leaf = hidden.clone().requires_grad_()
    call = lambda h: fused_linear_logprob(h, weight, target_ids, bias=bias).logprobs
    (once,) = torch.autograd.grad(call(leaf), leaf, upstream[0])
    checkpointed = torch.utils.checkpoint.checkpoint(call, leaf, use_reentrant=False)
    (twice,) = torch.autograd.grad(call(leaf) + checkpointed, leaf, upstream[0])
    assert torch.equal(twice, 2 * once)


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
    linear_logprob._stats_triton(hidden, weight, bias, target_ids, 0.7, softcap, entropy)
    linear_logprob._coefficients_triton(
        hidden, weight, bias, target_ids, 0, torch.rand(3, N), upstream[: 1 + entropy], 0.7, softcap
    )


KERNELS = {"_stats_kernel", "_merge_kernel", "_coefficients_kernel"}


@pytest.mark.skipif(INTERPRET, reason="compiles for real cards")
@every_card
@pytest.mark.parametrize("args", [(4, 128, 600, torch.bfloat16, 5.0, True), (4, 100, 600, torch.float32)])
def test_every_configuration_compiles(cc, args):
    assert_compiles(lambda: launch_all(*args), cc, KERNELS)


@pytest.mark.skipif(INTERPRET, reason="compiles for real cards")
@pytest.mark.parametrize("N, D, V", [(1, 1, 1), (1, 7, 200), (16, 1, 600)])
def test_sizes_that_the_compiler_folds(N, D, V):
    # An argument equal to 1 reaches the kernel as a constant, which has no tensor methods.
    assert_compiles(lambda: launch_all(N, D, V, torch.float32, 5.0, True), 80, KERNELS)


def extra_bytes(N, D, V, itemsize, trained):
    """The formula of the module's docstring for one forward and backward."""
    rows = min(N, 8192)
    chunk = min(16384, max(256, 2**25 // rows // 256 * 256), V)
    forward = 16 * N + 12 * N * 128
    backward = rows * chunk * itemsize + (4 + itemsize) * N * D + 32 * N
    if trained:
        backward += 8 * chunk * D + V * D * itemsize
    return max(forward, backward) + 16 * N


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("N, D, V", [(8192, 1536, 151936), (500, 1536, 151936), (2048, 4096, 128256)])
def test_memory_stays_within_the_formula(N, D, V, trained):
    hidden = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16, requires_grad=trained)
    target_ids = torch.randint(0, V, (N,), device="cuda")
    # The matmul library's workspace, one for each thread, is not the operation's.
    fused_linear_logprob(hidden[:64], weight[:512], target_ids[:64] % 512).logprobs.sum().backward()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_linear_logprob(hidden, weight, target_ids).logprobs.sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= extra_bytes(N, D, V, 2, trained) + 4 * MiB, (
        f"{extra / MiB:.1f} MiB"
    )  # allocator granularity


@pytest.mark.gpu
def test_more_logits_than_int32_counts():
    N, D, V = 17_000, 64, 151_936
    hidden, weight, bias, target_ids, upstream = problem(N, D, V, torch.bfloat16, device="cuda", scale=3.0)
    assert N * V > 2**31
    last = slice(N - 50, N)
    whole = outputs_and_gradients(fused_linear_logprob, hidden, weight, bias, target_ids, upstream[:1])
    part = outputs_and_gradients(
        fused_linear_logprob, hidden[last], weight, bias, target_ids[last], upstream[:1, last]
    )
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

    with Largest():
        stats = linear_logprob._stats_torch(hidden, weight, bias, target_ids, 1.0, 9.0, True)
        stats[1].log_()
        linear_logprob._backward_torch(
            hidden, weight, bias, target_ids, stats[:3], upstream, 1.0, 9.0, [True, False, True]
        )
    assert largest == 4 * 512 * 1024, f"{largest / MiB:.1f} MiB"
