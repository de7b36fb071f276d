"""Log-probabilities and entropy of a language-model head without the logits: linear + log-softmax + gather.

    z = hidden @ weight.T + bias,   x = softcap * tanh(z / softcap) / temperature    (x = z / temperature uncapped)
    m = max_v x_v,   s = sum_v exp(x_v - m)
    logprob = (x_target - m) - log s              entropy = log s - sum_v (x_v - m) exp(x_v - m) / s

Shapes: hidden (N, D), weight (V, D), bias (V,), target_ids (N,); logprobs and entropy (N,) float32.

With a frozen head the gradient to hidden is g * u, and u depends on no upstream gradient, so forward leaves it:

    u = ((1 - p_target) * slope_target * W_target - sum over v != target of p_v * slope_v * W_v) / temperature
    slope_v = 1 - tanh^2(z_v / softcap),   p = exp((x - m) - log s),   1 - p_target = -expm1(logprob)

Elsewhere (a trained weight or bias, a gradient h to entropy, float16 hidden) p is recomputed in the backward pass:

    dL/dx_v = g * ([v = target] - p_v) - h * p_v * (log p_v + entropy),   dL/dz_v = dL/dx_v * slope_v / temperature
    grad hidden = dz @ weight,   grad weight = dz.T @ hidden,   grad bias = sum_n dz

Cost: 2NVD FLOP for values, 4NVD for values and u, with a backward pass of N * D; recomputation 4NVD more, 6NVD for a
trained weight. Nothing of size N * V is ever written.

Extra bytes on CUDA, with b = bytes an element of hidden and T = ceil(V / 256) tiles (64 in place of 256 for float32),
over chunks of R rows and C words that ``logit_plan.plan`` fits into ``workspace_bytes`` or, without,
max(96 MiB, 152 MiB - what is kept):
    values              (8 or, with entropy, 12) * R * T + 24 * R, within 24 MiB
    values and u        + R * C * b + 4 * R * D; and 2 * N * D + 16 * N kept for backward (float32: 4 * N * D, no 4RD)
    4-bit weight, or of another dtype: + C * D * b, and for u + 3 * R * D * b
    recomputation       R * C * b + (4 + b) * N * D + 32 * N, R = min(N, 8192), C = min(V, 16384, 2^25 / R);
                        trained weight: + 8 * C * D and the gradient itself
    masked rows         b * R * D + 8 * N; for recomputation b * N' * D for the N' rows kept
On the CPU the tile is 512 x 1024 in float32, at most four are alive at once (8 MiB), and half-precision weights are
widened 1024 rows at a time; u is float32.

Precision: tiles multiply in hidden's dtype and accumulate in float32; logits and statistics stay float32 (float64 for
float64 hidden, CPU only). Tiles do not depend on N and are merged in a fixed order: log-probabilities have the same
bits with and without gradients and entropy, alone and in a batch. p (or dz) is rounded to hidden's dtype before its
matmul, the target's part of u not at all.

The online softmax is Milakov & Gimelshein, arXiv:1805.02867; recomputed logits are those of Wijmans et al.,
"Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import _runtime, logit_passes, logit_passes_cpu, output_head
from .dispatch import route
from .logit_passes import addmm_, blocks
from .quantization import QuantizedWeight, dequantize_4bit

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CUDA_TILE = (8192, 16384, 2**25)  # rows, words and elements of the backward's coefficient tile, at most
# Coefficients leave the kernel scaled up: |dz * temperature| <= 14 |upstream|, so 2^11 keeps them finite in float16
# and its tail probabilities out of the subnormals.
HEADROOM = 2.0**11


class LogprobOutput(NamedTuple):
    """Log-probabilities of the targets and, where asked for, the entropy of each row's distribution."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


def fused_linear_logprob_ref(
    hidden, weight, target_ids, *, bias=None, temperature=1.0, softcap=None, mask=None, return_entropy=False
):
    """``fused_linear_logprob`` in plain torch with the whole logits: the specification."""
    wide = _wide(hidden.dtype)
    if isinstance(weight, QuantizedWeight):
        weight = dequantize_4bit(weight, hidden.dtype)
    if mask is not None:
        hidden, target_ids = hidden.masked_fill(~mask[..., None], 0), target_ids.masked_fill(~mask, 0)
    logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    logprobs = log_p.gather(-1, target_ids[..., None]).squeeze(-1)
    # The clamp keeps 0 * log 0 at 0 for tokens that a bias of -inf forbids.
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(wide).min)).sum(-1) if return_entropy else None
    if mask is not None:
        logprobs = logprobs.masked_fill(~mask, 0)
        entropy = None if entropy is None else entropy.masked_fill(~mask, 0)
    return LogprobOutput(logprobs, entropy)


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _backward(
    coefficients, tile, hidden, head, bias, target_ids, stats, upstream, temperature, softcap, needs
):
    """Unscaled gradients, tile after tile of coefficients; those that ``needs`` leaves out come back empty."""
    hidden, target_ids, (N, D), wide = hidden.contiguous(), target_ids.contiguous(), hidden.shape, stats.dtype
    (needs_hidden, needs_weight, needs_bias), V = needs, head.shape[0]
    grad_hidden = hidden.new_zeros((N, D) if needs_hidden else 0, dtype=wide)
    grad_weight = torch.empty_like(head) if needs_weight else hidden.new_empty(0)
    grad_bias = hidden.new_zeros(V if needs_bias else 0, dtype=wide)
    # A power of two from the largest upstream gradient: scaling by it is exact.
    peak = upstream.abs().nan_to_num(0.0, 0.0).amax() if N else upstream.new_zeros(())
    unit = torch.where(peak > 0, peak / torch.frexp(peak).mantissa, 1.0)
    upstream, unit = upstream * (HEADROOM / unit), unit / (HEADROOM * temperature)

    row_step = max(1, min(N, tile[0]))
    col_step = min(tile[1], max(256, tile[2] // row_step // 256 * 256))
    for cols in blocks(V, col_step):
        w, b = output_head.rows(head, cols, hidden.dtype), None if bias is None else bias[cols].contiguous()
        grad_w = hidden.new_zeros((len(w), D), dtype=wide) if needs_weight else None
        for rows in blocks(N, row_step):
            h = hidden[rows]
            dz = coefficients(
                h, w, b, target_ids[rows], cols.start, stats[:, rows], upstream[:, rows], temperature, softcap
            )
            if needs_hidden:
                addmm_(grad_hidden[rows], dz, w)
            if needs_weight:
                addmm_(grad_w, dz.T, h)
            if needs_bias:
                grad_bias[cols] += dz.sum(0, dtype=wide)
            del dz  # before the next tile is allocated
        if needs_weight:
            grad_weight[cols] = grad_w.mul_(unit)
    return grad_hidden.mul_(unit), grad_weight, grad_bias.mul_(unit)


def _backward_triton(
    hidden: torch.Tensor, weight: torch.Tensor, scales: list[torch.Tensor], quant_block: int, first_block: int,
    bias: torch.Tensor | None, target_ids: torch.Tensor, stats: torch.Tensor, upstream: torch.Tensor,
    temperature: float, softcap: float | None, needs: list[bool], workspace: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    head = output_head.from_operands(weight, scales, quant_block, first_block)
    elements = CUDA_TILE[2] if workspace is None else min(CUDA_TILE[2], workspace // (2 * hidden.itemsize))
    args = hidden, head, bias, target_ids, stats, upstream, temperature, softcap, needs
    with torch.autocast(hidden.device.type, enabled=False):
        return _backward(logit_passes.coefficients, (*CUDA_TILE[:2], elements), *args)


def _backward_torch(hidden, weight, scales, quant_block, first_block, *args):
    head = output_head.from_operands(weight, scales, quant_block, first_block)
    with torch.autocast("cpu", enabled=False):
        return _backward(logit_passes_cpu.coefficients, logit_passes_cpu.TILE, hidden, head, *args[:-1])


def _forward_fake(
    hidden, weight, scales, quant_block, first_block, bias, target_ids, temperature, softcap, entropy, gradient,
    workspace,
):  # fmt: skip
    return logit_passes.allocate(hidden, len(hidden), entropy, gradient)


def _backward_fake(
    hidden, weight, scales, quant_block, first_block, bias, target_ids, stats, upstream, temperature, softcap, needs,
    workspace,
):  # fmt: skip
    V = len(weight)
    grad_hidden = hidden.new_empty(hidden.shape if needs[0] else 0, dtype=stats.dtype)
    grad_weight = torch.empty_like(weight) if needs[1] else hidden.new_empty(0)
    return grad_hidden, grad_weight, hidden.new_empty(V if needs[2] else 0, dtype=stats.dtype)


def _scale_rows_torch(direction, scale, upstream, rows, dtype):
    kept = upstream if rows is None else upstream[rows]
    kept = kept * scale if len(scale) else kept
    out = torch.mul(direction, kept[:, None], out=direction.new_empty(direction.shape, dtype=dtype))
    return out if rows is None else out.new_zeros(len(upstream), out.shape[1]).index_copy_(0, rows, out)


_fwd = _runtime.register(
    "linear_logprob_fwd",
    triton_impl=logit_passes.forward,
    torch_impl=logit_passes_cpu.forward,
    fake=_forward_fake,
)
_bwd = _runtime.register(
    "linear_logprob_bwd", triton_impl=_backward_triton, torch_impl=_backward_torch, fake=_backward_fake
)
_scale = _runtime.register(
    "linear_logprob_scale", triton_impl=logit_passes.scale_rows, torch_impl=_scale_rows_torch,
    fake=lambda direction, scale, upstream, rows, dtype: direction.new_empty(
        (len(upstream), direction.shape[1]), dtype=dtype
    ),
)  # fmt: skip


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, mask, scales, return_entropy, gradient, workspace):
        """mask (N,): rows to compute, None: all. The others' values and gradients are 0."""
        total, rows = len(hidden), None
        operands = hidden, *output_head.operands(weight), bias, target_ids
        how = *scales, return_entropy, gradient, workspace
        if mask is None:
            forward = route(_fwd, logit_passes.forward, logit_passes_cpu.forward, hidden.device)
            outputs = forward(*operands, *how)
        else:  # never traced: how many rows there are depends on data
            on_cpu = logit_passes_cpu.forward_kept
            forward = route(on_cpu, logit_passes.forward_kept, on_cpu, hidden.device)
            outputs, rows = forward(*operands, mask, *how)
        logprobs, entropy, stats, direction, direction_scale = outputs
        ctx.scales, ctx.return_entropy, ctx.gradient, ctx.workspace, ctx.total = (
            scales,
            return_entropy,
            gradient,
            workspace,
            total,
        )
        ctx.dtype, ctx.quantized = hidden.dtype, None if isinstance(weight, torch.Tensor) else weight
        ctx.set_materialize_grads(False)
        saved = rows, direction, direction_scale
        if not gradient or return_entropy:  # what recomputation needs
            if rows is not None and any(ctx.needs_input_grad):
                hidden, target_ids = hidden.index_select(0, rows), target_ids.index_select(0, rows)
            saved += hidden, None if ctx.quantized else weight, bias, target_ids, stats, entropy
        ctx.save_for_backward(*saved)
        # torch.compile takes no None among the outputs: an entropy that nobody asked for is dropped by the caller.
        if not return_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        rows, direction, direction_scale, *inputs = ctx.saved_tensors
        with_entropy = ctx.return_entropy and grad_entropy is not None
        nothing = (None,) * 9
        if grad_logprobs is None and not with_entropy:
            return nothing
        if ctx.gradient and not with_entropy:
            scale = route(_scale, logit_passes.scale_rows, _scale_rows_torch, direction.device)
            return scale(direction, direction_scale, grad_logprobs, rows, ctx.dtype), *nothing[1:]
        hidden, weight, bias, target_ids, stats, entropy = inputs
        upstream = [grad for grad in (grad_logprobs, grad_entropy) if grad is not None]
        if rows is not None:
            upstream = [grad.index_select(0, rows) for grad in upstream]
            entropy = entropy.index_select(0, rows) if with_entropy else entropy
        if grad_logprobs is None:
            upstream.insert(0, torch.zeros_like(stats[0]))
        stats = torch.cat((stats, entropy[None])) if with_entropy else stats
        needs = list(ctx.needs_input_grad[:3])
        head = output_head.operands(ctx.quantized if weight is None else weight)
        grad_hidden, grad_weight, grad_bias = _bwd(
            hidden, *head, bias, target_ids, stats, torch.stack(upstream), *ctx.scales, needs, ctx.workspace
        )
        grad_hidden = grad_hidden.to(hidden.dtype)
        if rows is not None and needs[0]:
            grad_hidden = grad_hidden.new_zeros(ctx.total, hidden.shape[1]).index_copy_(0, rows, grad_hidden)
        return (
            grad_hidden if needs[0] else None,
            grad_weight if needs[1] else None,
            grad_bias.to(bias.dtype) if needs[2] else None,
            *nothing[3:],
        )


def _check(hidden, weight, target_ids, bias, temperature, softcap, mask):
    check, (V, D), leading = _runtime.check, weight.shape, tuple(hidden.shape[:-1])
    check(hidden.dtype in DTYPES, f"hidden is {hidden.dtype}, expected one of {DTYPES}")
    check(hidden.shape[-1] == D, f"hidden is {tuple(hidden.shape)}, expected (..., {D})")
    check(V > 0 and D > 0, f"weight is {(V, D)}, expected at least (1, 1)")
    for name, tensor, shape, dtypes in (
        ("weight", weight, (V, D), DTYPES),
        ("target_ids", target_ids, leading, (torch.int64,)),
        ("bias", bias, (V,), DTYPES),
        ("mask", mask, leading, (torch.bool,)),
    ):
        if tensor is not None:
            got = tuple(tensor.shape)
            check(got == shape, f"{name} is {got}, expected {shape}")
            check(tensor.dtype in dtypes, f"{name} is {tensor.dtype}, expected one of {dtypes}")
            check(tensor.device == hidden.device, f"{name} is on {tensor.device}, hidden on {hidden.device}")
    # torch.compile may trace these two as symbols, which no string can be built from unless it is raised.
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a finite number > 0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}, expected None or a finite number > 0")


def fused_linear_logprob(
    hidden, weight, target_ids, *, bias=None, temperature=1.0, softcap=None, mask=None, return_entropy=False,
    workspace_bytes=None,
):  # fmt: skip
    """Log-probability of each target (and the entropy of each row) under a linear head, without its logits.

    Args:
        hidden: (..., D) float32, float16 or bfloat16; float64 too on the CPU.
        weight: (V, D), dense in any of these dtypes, or a ``QuantizedWeight`` (frozen).
        target_ids: (...) int64 in [0, V).
        bias: (V,) or None.
        temperature: divides the logits, after softcap; > 0.
        softcap: c in c * tanh(logits / c), or None.
        mask: (...) bool or None; rows with False give 0, get zero gradient and are dropped before the head, while
            the device waits for nothing (under ``torch.compile`` they are zeroed instead, so that shapes do not
            depend on data).
        return_entropy: also return the entropy, in nats, with its gradient.
        workspace_bytes: bound on the extra memory of forward and backward on CUDA with a frozen head, what is kept
            between them included, the results and a chunk's kept rows, where there is a mask, not; None: 152 MiB, or
            96 MiB and what is kept, where that is more. Less memory takes more time.

    Returns:
        ``LogprobOutput(logprobs, entropy or None)``, each (...) float32 (float64 for float64 hidden), bitwise
        the same with and without gradients. Under autocast hidden is cast to the autocast dtype, as ``F.linear``
        would, and weight tile by tile.

    Raises:
        ValueError: wrong shape, dtype, device or range, or a bound too small to work in. A target outside [0, V)
            raises in eager mode on the CPU and, where NANOGRPO_CHECK=1, on CUDA; elsewhere, where looking would wait
            for the device, its log-probability is NaN.
    """
    _check(hidden, weight, target_ids, bias, temperature, softcap, mask)
    device, shape, (V, D) = hidden.device.type, target_ids.shape, weight.shape
    compiling = torch.compiler.is_compiling()
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    hidden, target_ids = hidden.reshape(-1, D), target_ids.reshape(-1)
    if (device == "cpu" or _runtime.CHECK) and not compiling:
        bad = (target_ids < 0) | (target_ids >= V)
        row = (bad if mask is None else bad & mask.reshape(-1)).nonzero()[:1, 0]
        _runtime.check(
            len(row) == 0,
            f"target_ids is {target_ids[row].tolist()} at row {row.tolist()}, expected [0, {V})",
        )
    kept = None if mask is None or compiling else mask.reshape(-1)
    if mask is not None and compiling:
        hidden = hidden.masked_fill(~mask.reshape(-1, 1), 0)
    softcap = None if softcap is None else float(softcap)
    trained = [isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in (hidden, weight, bias)]
    # A frozen head's gradient is left by the forward pass. float16 cannot hold what is summed on the way.
    gradient = torch.is_grad_enabled() and trained == [True, False, False] and hidden.dtype != torch.float16
    logprobs, entropy = _LinearLogprob.apply(
        hidden, weight, bias, target_ids, kept, (float(temperature), softcap), return_entropy, gradient,
        workspace_bytes,
    )  # fmt: skip

    def restored(values):
        values = values.reshape(shape)
        return values.masked_fill(~mask, 0) if mask is not None and compiling else values

    return LogprobOutput(restored(logprobs), restored(entropy) if return_entropy else None)
