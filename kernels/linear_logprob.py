"""Log-probabilities and entropy of a language-model head without the logits: linear + log-softmax + gather.

    z = hidden @ weight.T + bias,   x = softcap * tanh(z / softcap) / temperature    (x = z / temperature uncapped)
    m = max_v x_v,   s = sum_v exp(x_v - m)
    logprob = (x_target - m) - log s              entropy = log s - sum_v (x_v - m) exp(x_v - m) / s

Shapes: hidden (N, D), weight (V, D), bias (V,), target_ids (N,); logprobs and entropy (N,) float32.

Gradients, with g and h those of logprobs and entropy and p = exp((x - m) - log s), recomputed:

    dL/dx_v = g * ([v = target] - p_v) - h * p_v * (log p_v + entropy)
    dL/dz_v = dL/dx_v * (1 - tanh^2(z_v / softcap)) / temperature
    grad hidden = dz @ weight,   grad weight = dz.T @ hidden,   grad bias = sum_n dz

Cost: forward 2NVD FLOP; backward 4NVD, and 2NVD more for a trainable weight. Weight and hidden are read once for
each row block and vocabulary tile; nothing of size N * V is ever written.

Extra bytes on CUDA, with b = bytes an element of hidden, R = min(N, 8192) rows and C = min(V, 16384, 2^25 / R)
vocabulary rows (C a multiple of 256):
    forward             16 * N + 12 * N * S, S <= 128 splits of the vocabulary
    backward            R * C * b + (4 + b) * N * D + 32 * N; trainable weight: + 8 * C * D and the gradient itself
    masked rows         b * N' * D for the N' rows kept;   quantised weight: + one dequantised slice, <= 64 MiB
On the CPU the tile is 512 x 1024 in float32, at most four are alive at once (8 MiB), and half-precision weights are
widened 1024 rows at a time.

Precision: tiles multiply in hidden's dtype (weight is cast tile by tile) and accumulate in float32; logits and
statistics stay float32 (float64 for float64 hidden, CPU only). Vocabulary splits depend on V and the card alone and
are merged in a fixed order, so a row's values do not depend on the other rows. dz is rounded to hidden's dtype once.

The online softmax is Milakov & Gimelshein, arXiv:1805.02867; recomputed logits are those of Wijmans et al.,
"Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import _runtime
from .quantization import QuantizedWeight, dequantize_4bit

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_SPLITS = 128
CUDA_TILE = (
    8192,
    16384,
    2**25,
)  # rows, vocabulary rows and elements of the backward's coefficient tile, at most
CPU_TILE = (512, 1024, 2**19)
SLICE_BYTES = 2**26  # dequantised rows of a quantised weight alive at once
# Coefficients leave the kernel scaled up: |dz * temperature| <= 14 |upstream|, so 2^11 keeps them finite in float16
# and its tail probabilities out of the subnormals.
HEADROOM = 2.0**11
LOWEST = tl.constexpr(-3.0e38)  # in place of -inf, where -inf minus -inf or -inf times 0 would give NaN


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


def _blocks(size, step):
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


# float32 tiles are small because their products run on the CUDA cores; 99 KB of shared memory bounds sm_86/89/120.
FLOAT32_CONFIG = {"BLOCK_M": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
LARGE_CONFIG = {"BLOCK_M": 128, "BLOCK_V": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
SMALL_CONFIG = {"BLOCK_M": 128, "BLOCK_V": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
HALF_CONFIG = {
    80: LARGE_CONFIG, 86: SMALL_CONFIG, 89: SMALL_CONFIG, 90: LARGE_CONFIG, 100: LARGE_CONFIG, 120: SMALL_CONFIG
}  # fmt: skip


def _config(hidden):
    _runtime.check(hidden.dtype != torch.float64, "hidden is float64, which only the CPU path takes")
    if hidden.dtype == torch.float32:
        return FLOAT32_CONFIG
    arch = _runtime.arch(hidden.device)
    _runtime.check(arch >= 80, f"compute capability is {arch}, expected at least 80")
    return HALF_CONFIG[max(known for known in HALF_CONFIG if known <= arch)]


@triton.jit
def _tanh(u):
    # Near 0 the quotient below cancels; the series is exact to float32 there.
    square = u * u
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    decay = tl.exp(-2 * tl.abs(u))
    return tl.where(square < 0.0625, u * series, tl.where(u < 0, decay - 1, 1 - decay) / (1 + decay))


@triton.jit
def _logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, rows, cols, N, V, D, stride_wv, stride_wd, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x of the tile (rows, cols) in float32; columns past V are 0 / temperature, the caller masks them."""
    dims = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * D + dims[None, :]
    weight_ptrs = weight_ptr + cols.to(tl.int64)[None, :] * stride_wv + dims[:, None] * stride_wd
    row_mask, col_mask = (rows < N)[:, None], (cols < V)[None, :]
    x = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(hidden_ptrs, mask=row_mask, other=0.0)
            b = tl.load(weight_ptrs, mask=col_mask, other=0.0)
        else:
            inside = dims < D - start
            a = tl.load(hidden_ptrs, mask=row_mask & inside[None, :], other=0.0)
            b = tl.load(weight_ptrs, mask=col_mask & inside[:, None], other=0.0)
        x = tl.dot(a, b.to(a.dtype), x, input_precision="ieee")
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D * stride_wd
    if HAS_BIAS:
        x += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        x = softcap * _tanh(x / softcap)
    return x * inv_temperature


@triton.jit(do_not_specialize=["N"])  # one binary for any N: a row's bits must not depend on it
def _stats_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, partial_ptr, x_target_ptr,
    N, V, D, stride_wv, stride_wd, tiles_per_split, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row block against one split of the vocabulary: m, s and sum (x - m) exp(x - m) to partial (3, S, N)."""
    # Row blocks run fastest, so programs that run together read the same weight tiles from L2.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)

    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    t = tl.zeros((BLOCK_M,), tl.float32)
    x_target = tl.zeros((BLOCK_M,), tl.float32)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(V, BLOCK_V))
    for tile in range(first_tile, last_tile):
        cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        x = _logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, rows, cols, N, V, D, stride_wv, stride_wd, inv_temperature, softcap,
            HAS_BIAS, HAS_SOFTCAP, EVEN_D, BLOCK_M, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        x_target += tl.sum(tl.where(cols[None, :] == target[:, None], x, 0.0), 1)
        x = tl.where((cols < V)[None, :], x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        x -= m_new[:, None]
        e = tl.exp(x)
        decay = tl.exp(m - m_new)
        if ENTROPY:
            t = (t + (m - m_new) * s) * decay + tl.sum(tl.maximum(x, LOWEST) * e, 1)
        s = s * decay + tl.sum(e, 1)
        m = m_new

    plane = tl.num_programs(1).to(tl.int64) * N
    partial_ptrs = partial_ptr + split.to(tl.int64) * N + rows
    tl.store(partial_ptrs, m, mask=rows < N)
    tl.store(partial_ptrs + plane, s, mask=rows < N)
    tl.store(partial_ptrs + 2 * plane, t, mask=rows < N)
    owned = (target >= first_tile * BLOCK_V) & (target < last_tile * BLOCK_V)
    tl.store(x_target_ptr + rows, x_target, mask=(rows < N) & owned)


@triton.jit(do_not_specialize=["N"])  # one binary for any N: a row's bits must not depend on it
def _merge_kernel(partial_ptr, stats_ptr, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Merge the splits of BLOCK_N rows in one fixed tree: partial (3, S, N) to the first rows of stats (4, N)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    splits = tl.arange(0, BLOCK_S)
    inside = (splits < S)[:, None] & (rows < N)[None, :]
    ptrs = partial_ptr + splits.to(tl.int64)[:, None] * N + rows[None, :]
    plane = tl.cast(S, tl.int64) * N
    m = tl.load(ptrs, mask=inside, other=LOWEST)
    s = tl.load(ptrs + plane, mask=inside, other=0.0)
    t = tl.load(ptrs + 2 * plane, mask=inside, other=0.0)
    top = tl.max(m, 0)
    shift = m - top[None, :]
    decay = tl.exp(shift)
    stats_ptrs = stats_ptr + rows
    tl.store(stats_ptrs, top, mask=rows < N)
    tl.store(stats_ptrs + N, tl.sum(s * decay, 0), mask=rows < N)
    tl.store(stats_ptrs + 2 * tl.cast(N, tl.int64), tl.sum((t + shift * s) * decay, 0), mask=rows < N)


@triton.jit
def _coefficients_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, stats_ptr, upstream_ptr, out_ptr,
    N, V, D, first_col, stride_wv, stride_wd, stride_stats, stride_upstream, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of dz * temperature, from recomputed logits, to out (N, V); V and cols count from first_col."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, rows, cols, N, V, D, stride_wv, stride_wd, inv_temperature, softcap,
        HAS_BIAS, HAS_SOFTCAP, EVEN_D, BLOCK_M, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1) - first_col
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    m = tl.load(stats_ptr + rows, mask=rows < N, other=float("inf"))
    log_s = tl.load(stats_ptr + stride_stats + rows, mask=rows < N, other=0.0)
    g = tl.load(upstream_ptr + rows, mask=rows < N, other=0.0)
    log_p = (x - m[:, None]) - log_s[:, None]
    p = tl.exp(log_p)
    dz = g[:, None] * (tl.where(cols[None, :] == target[:, None], 1.0, 0.0) - p)
    if ENTROPY:
        entropy = tl.load(stats_ptr + 2 * stride_stats + rows, mask=rows < N, other=0.0)
        h = tl.load(upstream_ptr + stride_upstream + rows, mask=rows < N, other=0.0)
        dz -= h[:, None] * p * (tl.maximum(log_p, LOWEST) + entropy[:, None])
    if HAS_SOFTCAP:
        tanh = x / (inv_temperature * softcap)
        dz *= 1 - tanh * tanh
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * V + cols[None, :]
    tl.store(out_ptrs, dz.to(out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols < V)[None, :])


def _stats_triton(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target_ids: torch.Tensor,
    temperature: float, softcap: float | None, entropy: bool,
) -> torch.Tensor:  # fmt: skip
    """(4, N): m, s, sum (x - m) exp(x - m), and x_target, NaN where the target is not in the vocabulary."""
    config, hidden, target_ids = _config(hidden), hidden.contiguous(), target_ids.contiguous()
    (N, D), V = hidden.shape, weight.shape[0]
    stats = hidden.new_full((4, N), float("nan"), dtype=torch.float32)
    if N == 0:
        return stats
    tiles = triton.cdiv(V, config["BLOCK_V"])
    tiles_per_split = triton.cdiv(tiles, MAX_SPLITS)
    splits = triton.cdiv(tiles, tiles_per_split)
    partial = stats.new_empty((3, splits, N))
    with _runtime.launch_on(hidden):
        _stats_kernel[(triton.cdiv(N, config["BLOCK_M"]), splits)](
            hidden, weight, bias, target_ids, partial, stats[3],
            N, V, D, weight.stride(0), weight.stride(1), tiles_per_split, 1 / temperature, softcap or 0.0,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, ENTROPY=entropy,
            EVEN_D=D % config["BLOCK_D"] == 0, **config,
            enable_fp_fusion=False,  # asking for the entropy must not change how the log-prob is rounded
        )  # fmt: skip
        _merge_kernel[(triton.cdiv(N, 32),)](
            partial,
            stats,
            N,
            splits,
            BLOCK_N=32,
            BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return stats


def _coefficients_triton(hidden, weight, bias, target_ids, first_col, stats, upstream, temperature, softcap):
    config, (N, D), V = _config(hidden), hidden.shape, weight.shape[0]
    out = hidden.new_empty((N, V))
    with _runtime.launch_on(hidden):
        _coefficients_kernel[(triton.cdiv(N, config["BLOCK_M"]), triton.cdiv(V, config["BLOCK_V"]))](
            hidden, weight, bias, target_ids, stats, upstream, out,
            N, V, D, first_col, weight.stride(0), weight.stride(1), stats.stride(0), upstream.stride(0),
            1 / temperature, softcap or 0.0,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, ENTROPY=len(upstream) == 2,
            EVEN_D=D % config["BLOCK_D"] == 0, **config,
        )  # fmt: skip
    return out


def _logits_torch(hidden, weight, bias, temperature, softcap):
    with torch.autocast("cpu", enabled=False):
        x = hidden @ weight.to(hidden.dtype).T
    if bias is not None:
        x += bias
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    return x if temperature == 1 else x.div_(temperature)


def _locate(target_ids, first_col, size):
    """Columns (N, 1) of the targets in the tile that starts at ``first_col``, and which of them lie in it."""
    col = target_ids[:, None] - first_col
    return col.clamp(0, size - 1), (col >= 0) & (col < size)


def _stats_torch(hidden, weight, bias, target_ids, temperature, softcap, entropy):
    wide, (row_step, col_step, _) = _wide(hidden.dtype), CPU_TILE
    stats = hidden.new_empty((4, len(hidden)), dtype=wide)
    for rows in _blocks(len(hidden), row_step):
        h, total = hidden[rows].to(wide), None
        for cols in _blocks(len(weight), col_step):
            x = _logits_torch(h, weight[cols], None if bias is None else bias[cols], temperature, softcap)
            col, inside = _locate(target_ids[rows], cols.start, x.shape[1])
            x_target = x.gather(1, col).masked_fill_(~inside, math.nan).squeeze(1)
            m = x.amax(1).clamp_(min=LOWEST.value)
            x -= m[:, None]
            e = x.exp() if entropy else x.exp_()
            s = e.sum(1)
            t = e.mul_(x.clamp_(min=LOWEST.value)).sum(1) if entropy else torch.zeros_like(s)
            part = torch.stack((m, s, t, x_target))
            total = part if total is None else _merge(total, part)
        stats[:, rows] = total
    return stats


def _merge(a, b):
    """Statistics (4, N) of two disjoint parts of the vocabulary to those of both."""
    m, s, t = torch.stack((a[:3], b[:3]), 1)
    top = m.amax(0)
    shift = m - top
    decay = shift.exp()
    x_target = torch.where(b[3].isnan(), a[3], b[3])
    return torch.stack((top, (s * decay).sum(0), ((t + shift * s) * decay).sum(0), x_target))


def _coefficients_torch(hidden, weight, bias, target_ids, first_col, stats, upstream, temperature, softcap):
    x = _logits_torch(hidden.to(stats.dtype), weight, bias, temperature, softcap)
    slope = None if softcap is None else 1 - (x * (temperature / softcap)).square_()
    log_p = x.sub_(stats[0, :, None]).sub_(stats[1, :, None])
    p, g = log_p.exp(), upstream[0, :, None]
    dz = p * -g
    col, inside = _locate(target_ids, first_col, dz.shape[1])
    dz.scatter_add_(1, col, torch.where(inside, g, 0))
    if len(upstream) == 2:
        dz -= log_p.clamp_(min=LOWEST.value).add_(stats[2, :, None]).mul_(p).mul_(upstream[1, :, None])
    return dz if slope is None else dz.mul_(slope)


def _addmm_(total, a, b):
    """total += a @ b, accumulated in the dtype of total."""
    with torch.autocast(total.device.type, enabled=False):
        if total.is_cuda and a.dtype != total.dtype:
            torch.addmm(total, a, b.to(a.dtype), out_dtype=total.dtype, out=total)
        else:
            total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _backward(
    coefficients, tile, hidden, weight, bias, target_ids, stats, upstream, temperature, softcap, needs
):
    """Unscaled gradients, tile after tile of coefficients; those that ``needs`` leaves out come back empty."""
    hidden, target_ids, (N, D), wide = hidden.contiguous(), target_ids.contiguous(), hidden.shape, stats.dtype
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = hidden.new_zeros((N, D) if needs_hidden else 0, dtype=wide)
    grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    grad_bias = hidden.new_zeros(len(weight) if needs_bias else 0, dtype=wide)
    # A power of two from the largest upstream gradient: scaling by it is exact.
    peak = upstream.abs().nan_to_num(0.0, 0.0).amax() if N else upstream.new_zeros(())
    unit = torch.where(peak > 0, peak / torch.frexp(peak).mantissa, 1.0)
    upstream, unit = upstream * (HEADROOM / unit), unit / (HEADROOM * temperature)

    row_step = max(1, min(N, tile[0]))
    col_step = min(tile[1], max(256, tile[2] // row_step // 256 * 256))
    for cols in _blocks(len(weight), col_step):
        w, b = weight[cols], None if bias is None else bias[cols]
        grad_w = hidden.new_zeros((len(w), D), dtype=wide) if needs_weight else None
        for rows in _blocks(N, row_step):
            h = hidden[rows]
            dz = coefficients(
                h, w, b, target_ids[rows], cols.start, stats[:, rows], upstream[:, rows], temperature, softcap
            )
            if needs_hidden:
                _addmm_(grad_hidden[rows], dz, w)
            if needs_weight:
                _addmm_(grad_w, dz.T, h)
            if needs_bias:
                grad_bias[cols] += dz.sum(0, dtype=wide)
            del dz  # before the next tile is allocated
        if needs_weight:
            grad_weight[cols] = grad_w.mul_(unit)
    return grad_hidden.mul_(unit), grad_weight, grad_bias.mul_(unit)


def _backward_triton(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target_ids: torch.Tensor,
    stats: torch.Tensor, upstream: torch.Tensor, temperature: float, softcap: float | None, needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    args = (hidden, weight, bias, target_ids, stats, upstream, temperature, softcap, needs)
    return _backward(_coefficients_triton, CUDA_TILE, *args)


def _backward_torch(*args):
    return _backward(_coefficients_torch, CPU_TILE, *args)


def _stats_fake(hidden, weight, bias, target_ids, temperature, softcap, entropy):
    return hidden.new_empty((4, len(hidden)), dtype=_wide(hidden.dtype))


def _backward_fake(hidden, weight, bias, target_ids, stats, upstream, temperature, softcap, needs):
    grad_hidden = hidden.new_empty(hidden.shape if needs[0] else 0, dtype=stats.dtype)
    grad_weight = torch.empty_like(weight) if needs[1] else weight.new_empty(0)
    return grad_hidden, grad_weight, hidden.new_empty(len(weight) if needs[2] else 0, dtype=stats.dtype)


_fwd = _runtime.register(
    "linear_logprob_fwd", triton_impl=_stats_triton, torch_impl=_stats_torch, fake=_stats_fake
)
_bwd = _runtime.register(
    "linear_logprob_bwd", triton_impl=_backward_triton, torch_impl=_backward_torch, fake=_backward_fake
)


def _slices(weight, dtype):
    """Vocabulary rows to take at once: all of a dense weight, bounded multiples of 256 of a quantised one."""
    V, D = weight.shape
    dense = isinstance(weight, torch.Tensor)
    return _blocks(V, V if dense else max(256, SLICE_BYTES // (D * dtype.itemsize) // 256 * 256))


def _operands(hidden, weight, bias, target_ids, rows):
    """The operators' first arguments for these vocabulary rows."""
    if not isinstance(weight, torch.Tensor):
        weight = dequantize_4bit(weight.rows(rows.start, rows.stop), hidden.dtype)
    return hidden, weight, None if bias is None else bias[rows].contiguous(), target_ids - rows.start


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, temperature, softcap, return_entropy):
        stats = None
        for rows in _slices(weight, hidden.dtype):
            operands = _operands(hidden, weight, bias, target_ids, rows)
            part = _fwd(*operands, temperature, softcap, return_entropy)
            stats = part if stats is None else _merge(stats, part)
        m, s, t, x_target = stats
        log_s = s.log()
        logprobs, entropy = (x_target - m) - log_s, log_s - t / s
        dense = isinstance(weight, torch.Tensor)
        stats = torch.stack((m, log_s, entropy))
        ctx.save_for_backward(hidden, weight if dense else None, bias, target_ids, stats)
        ctx.quantized = None if dense else weight
        ctx.scales = temperature, softcap
        ctx.set_materialize_grads(False)
        # torch.compile takes no None among the outputs: an entropy that nobody asked for is dropped by the caller.
        ctx.return_entropy = return_entropy
        if not return_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, bias, target_ids, stats = ctx.saved_tensors
        weight = ctx.quantized if weight is None else weight
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(stats[0])
        with_entropy = ctx.return_entropy and grad_entropy is not None
        upstream = torch.stack([grad_logprobs, grad_entropy] if with_entropy else [grad_logprobs])
        needs, grad_hidden, grad_bias = list(ctx.needs_input_grad[:3]), None, []
        for rows in _slices(weight, hidden.dtype):
            operands = _operands(hidden, weight, bias, target_ids, rows)
            grad_h, grad_weight, grad_b = _bwd(*operands, stats, upstream, *ctx.scales, needs)
            grad_hidden = grad_h if grad_hidden is None else grad_hidden + grad_h
            grad_bias.append(grad_b)
        return (
            grad_hidden.to(hidden.dtype) if needs[0] else None,
            grad_weight if needs[1] else None,
            torch.cat(grad_bias).to(bias.dtype) if needs[2] else None,
            *(None,) * 4,
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
    hidden, weight, target_ids, *, bias=None, temperature=1.0, softcap=None, mask=None, return_entropy=False
):
    """Log-probability of each target (and the entropy of each row) under a linear head, without its logits.

    Args:
        hidden: (..., D) float32, float16 or bfloat16; float64 too on the CPU.
        weight: (V, D), dense in any of these dtypes, or a ``QuantizedWeight`` (frozen).
        target_ids: (...) int64 in [0, V).
        bias: (V,) or None.
        temperature: divides the logits, after softcap; > 0.
        softcap: c in c * tanh(logits / c), or None.
        mask: (...) bool or None; rows with False give 0, get zero gradient and are dropped before the head
            (under ``torch.compile`` they are zeroed instead, so that shapes do not depend on data).
        return_entropy: also return the entropy, in nats, with its gradient.

    Returns:
        ``LogprobOutput(logprobs, entropy or None)``, each (...) float32 (float64 for float64 hidden), bitwise
        the same with and without gradients. Under autocast hidden is cast to the autocast dtype, as ``F.linear``
        would, and weight tile by tile.

    Raises:
        ValueError: wrong shape, dtype, device or range. A target outside [0, V) raises on the CPU in eager mode;
            elsewhere, where looking would wait for the device, its log-probability is NaN.
    """
    _check(hidden, weight, target_ids, bias, temperature, softcap, mask)
    device, shape, (V, D) = hidden.device.type, target_ids.shape, weight.shape
    compiling = torch.compiler.is_compiling()
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    hidden, target_ids = hidden.reshape(-1, D), target_ids.reshape(-1)
    if device == "cpu" and not compiling:
        bad = (target_ids < 0) | (target_ids >= V)
        row = (bad if mask is None else bad & mask.reshape(-1)).nonzero()[:1, 0]
        _runtime.check(
            len(row) == 0,
            f"target_ids is {target_ids[row].tolist()} at row {row.tolist()}, expected [0, {V})",
        )
    rows = None if mask is None or compiling else mask.reshape(-1).nonzero()[:, 0]
    if rows is not None:
        hidden, target_ids = hidden.index_select(0, rows), target_ids[rows]
    elif mask is not None:
        hidden = hidden.masked_fill(~mask.reshape(-1, 1), 0)
    softcap = None if softcap is None else float(softcap)
    logprobs, entropy = _LinearLogprob.apply(
        hidden, weight, bias, target_ids, float(temperature), softcap, return_entropy
    )

    def restored(values):
        if rows is not None:
            values = values.new_zeros(shape.numel()).index_copy(0, rows, values)
        values = values.reshape(shape)
        return values if mask is None else values.masked_fill(~mask, 0)

    return LogprobOutput(restored(logprobs), restored(entropy) if return_entropy else None)
