"""A frozen linear layer with a low-rank adapter, forward and backward in few passes over the activations.

    y = x W^T + bias + scaling * (x A^T) B^T         x (M, K), W (N, K), A (r, K), B (N, r), y (M, N)

W is dense or 4-bit, and has no gradient. With dy the gradient of y:

    h = x A^T                       g = dy B
    dx = dy W + scaling * g A       dA = scaling * g^T x        dB = scaling * dy^T h        dbias = sum_m dy

The base products are library calls (``matmul_4bit`` for a 4-bit W). The adapter adds, forward, a read of x and one
pass over y; backward, two reads each of dy and x and one pass over dx. FLOPs of the adapter: 2 M r (N + K) forward,
2 M r (2 N + 3 K) backward, where h is made again: only x and the parameters are kept for it, nothing of (M, N) and
no dense copy of a 4-bit W. Memory beside the outputs, in float32 values: P M r for each of h and g, with P = 1 in
float32 and from ``ONE_PART`` tiles of rows on, else ceil(K / SPLIT_K) or ceil(N / SPLIT_K); (ceil(M / SPLIT_M) + 1) r
max(N, K) for dA and dB; and, while dy W is formed from a 4-bit W, its N K values in x's dtype.

Precision: A and B are rounded to x's dtype, sums are float32, h and g are rounded to x's dtype once, where they
enter the next product; scaling * h B^T is added in float32 to the rounded base. dA and dB come in the dtype of A
and B. Sums run in fixed order over fixed splits: results repeat bit for bit, and the adapter's part of a row does
not depend on the other rows.

Papers: LoRA, Hu et al. 2021, arXiv 2106.09685; QLoRA, Dettmers et al. 2023, arXiv 2305.14314.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import _runtime
from .matmul_4bit import matmul_op
from .quantization import DTYPES, QuantizedWeight, dequantize_4bit_ref, dequantize_op

SPLIT_K = 1024  # columns of x (or dy) that one accumulator of h (or g) takes
SPLIT_K_FLOAT32 = 128  # the same for float32, where a long chain of additions would show; always one part
SPLIT_M = 1024  # rows that one accumulator of dA or dB takes
ONE_PART = 128  # tiles of rows from which a program sums all splits of its h, which fills the card either way

# By padded rank: down (BLOCK_M, BLOCK_K, warps, stages), up (BLOCK_M, BLOCK_N, warps) and outer (BLOCK_M, BLOCK_N,
# warps, stages). One table for all cards, never keyed on M: it fits the 99 KiB of sm_86, sm_89 and sm_120.
CONFIGS = {
    16: ((32, 128, 4, 3), (64, 128, 4), (64, 128, 4, 2)),
    32: ((32, 128, 4, 3), (64, 128, 4), (64, 128, 4, 2)),
    64: ((32, 64, 4, 3), (64, 128, 4), (64, 64, 4, 2)),
    128: ((32, 64, 4, 2), (64, 64, 4), (32, 64, 4, 2)),
}


def lora_linear_ref(x, weight, lora_a, lora_b, scaling, bias=None):
    """Specification of :func:`lora_linear`, in x's dtype, with autograd's own gradients."""
    if isinstance(weight, QuantizedWeight):
        weight = dequantize_4bit_ref(weight, x.dtype)
    h = F.linear(x, lora_a.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * F.linear(h, lora_b.to(x.dtype))


@triton.jit
def _down_kernel(
    x, w, parts, M, K, r, splits_per_part, x_row, w_rank, w_column,
    R: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts (P, M, r) float32: x (M, K) @ w (r, K)^T, part p over its own splits of K, each summed apart."""
    part = tl.program_id(1)
    row, rank = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, R)
    total = tl.zeros((BLOCK_M, R), tl.float32)
    first = part * splits_per_part
    for split in range(first, tl.minimum(first + splits_per_part, tl.cdiv(K, SPLIT))):
        acc = tl.zeros((BLOCK_M, R), tl.float32)
        for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, K), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x_mask = (row < M)[:, None] & (k < K)[None, :]
            a = tl.load(x + row[:, None] * x_row + k[None, :], mask=x_mask, other=0.0)
            w_mask = (rank < r)[:, None] & (k < K)[None, :]
            w_offset = rank[:, None] * w_rank + k.to(tl.int64)[None, :] * w_column
            b = tl.load(w + w_offset, mask=w_mask, other=0.0).to(a.dtype)
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
        total += acc
    out = parts + (part.to(tl.int64) * M + row[:, None]) * r + rank[None, :]
    tl.store(out, total, mask=(row < M)[:, None] & (rank < r)[None, :])


@triton.jit
def _sum_parts(parts, count, row, M, r, R: tl.constexpr):
    """Rows of h (M, r) float32: its parts added in order."""
    rank = tl.arange(0, R)
    mask = (row < M)[:, None] & (rank < r)[None, :]
    h = tl.zeros((row.shape[0], R), tl.float32)
    for part in range(count):
        part_row = tl.cast(part, tl.int64) * M + row
        h += tl.load(parts + part_row[:, None] * r + rank[None, :], mask=mask, other=0.0)
    return h


@triton.jit
def _up_kernel(
    parts, w, y, scaling, M, N, r, count, w_rank, w_column,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (M, N) += scaling * h (M, r) @ w (r, N), in place."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column, rank = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, R)
    dtype = y.dtype.element_ty
    w_mask = (rank < r)[:, None] & (column < N)[None, :]
    b = tl.load(w + rank[:, None] * w_rank + column[None, :] * w_column, mask=w_mask, other=0.0).to(dtype)
    h = _sum_parts(parts, count, row, M, r, R).to(dtype)
    delta = tl.dot(h, b, input_precision="ieee")
    mask = (row < M)[:, None] & (column < N)[None, :]
    tile = y + row[:, None] * N + column[None, :]
    base = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(tile, (base + scaling * delta).to(dtype), mask=mask)


@triton.jit
def _outer_kernel(
    parts, x, partial, scaling, M, N, r, count, x_row,
    R: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial (splits, r, N) float32: scaling * h^T (r, M) @ x (M, N), each split over its own rows."""
    split = tl.program_id(1)
    column, rank = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, R)
    acc = tl.zeros((R, BLOCK_N), tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, M), BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (row < M)[:, None] & (column < N)[None, :]
        b = tl.load(x + row[:, None] * x_row + column[None, :], mask=mask, other=0.0)
        h = _sum_parts(parts, count, row, M, r, R).to(b.dtype)
        acc = tl.dot(tl.trans(h), b, acc, input_precision="ieee")
    out = partial + (split.to(tl.int64) * r + rank[:, None]) * N + column[None, :]
    tl.store(out, acc * scaling, mask=(rank < r)[:, None] & (column < N)[None, :])


def _down(x, w):
    """Parts (P, M, r) float32 of x (M, K) @ w (r, K)^T."""
    (M, K), r = x.shape, len(w)
    R = max(16, triton.next_power_of_2(r))
    block_m, block_k, warps, stages = CONFIGS[R][0]
    wide = x.dtype == torch.float32
    split = SPLIT_K_FLOAT32 if wide else SPLIT_K
    tiles, splits = triton.cdiv(M, block_m), triton.cdiv(K, split)
    parts = torch.empty(
        1 if wide or tiles >= ONE_PART else splits, M, r, dtype=torch.float32, device=x.device
    )
    _down_kernel[(tiles, len(parts))](
        x, w, parts, M, K, r, splits // len(parts), x.stride(0), *w.stride(),
        R=R, SPLIT=split, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return parts


def _up(parts, w, y, scaling):
    """y (M, N) += scaling * sum(parts) @ w (r, N), in place; y contiguous."""
    (M, N), r = y.shape, len(w)
    R = max(16, triton.next_power_of_2(r))
    block_m, block_n, warps = CONFIGS[R][1]
    _up_kernel[(triton.cdiv(M, block_m), triton.cdiv(N, block_n))](
        parts, w, y, scaling, M, N, r, len(parts), *w.stride(),
        R=R, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
    )  # fmt: skip
    return y


def _outer(parts, x, scaling):
    """(r, N) float32: scaling * sum(parts)^T @ x (M, N)."""
    (M, N), r = x.shape, parts.shape[2]
    R = max(16, triton.next_power_of_2(r))
    block_m, block_n, warps, stages = CONFIGS[R][2]
    partial = torch.empty(triton.cdiv(M, SPLIT_M), r, N, dtype=torch.float32, device=x.device)
    _outer_kernel[(triton.cdiv(N, block_n), len(partial))](
        parts, x, partial, scaling, M, N, r, len(parts), x.stride(0),
        R=R, SPLIT=SPLIT_M, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return partial[0] if len(partial) == 1 else partial.sum(0)


def _base(x, weight, bias, quant_block, first_block):
    """x W^T + bias; ``weight`` is [W], or [codes, *scales] where ``quant_block`` is not 0."""
    if quant_block:
        return matmul_op(x, weight[0], weight[1:], bias, quant_block, first_block)
    return F.linear(x, weight[0], bias)


def _base_bwd(dy, weight, quant_block, first_block):
    """dy W; a 4-bit W is dense for this call only."""
    if quant_block:
        return dy @ dequantize_op(weight[0], weight[1:], quant_block, first_block, dy.dtype)
    return dy @ weight[0]


def _lora_linear_triton(
    x: torch.Tensor, weight: list[torch.Tensor], lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float,
    bias: torch.Tensor | None, quant_block: int, first_block: int,
) -> torch.Tensor:  # fmt: skip
    y = _base(x, weight, bias, quant_block, first_block)
    if y.numel():
        with _runtime.launch_on(x):
            _up(_down(x, lora_a), lora_b.t(), y, scaling)
    return y


def _lora_linear_torch(x, weight, lora_a, lora_b, scaling, bias, quant_block, first_block):
    y = _base(x, weight, bias, quant_block, first_block)
    return y.addmm_(x @ lora_a.to(x.dtype).t(), lora_b.to(x.dtype).t(), alpha=scaling)


def _lora_linear_bwd_triton(
    dy: torch.Tensor, x: torch.Tensor, weight: list[torch.Tensor], lora_a: torch.Tensor, lora_b: torch.Tensor,
    scaling: float, quant_block: int, first_block: int, needs_x: bool, needs_lora: bool,
) -> list[torch.Tensor]:  # fmt: skip
    dy = dy.contiguous()
    options = (dy, x, weight, lora_a, lora_b, scaling, quant_block, first_block)
    if not dy.numel():
        return [t.zero_() for t in _bwd_fake(*options, needs_x, needs_lora)]
    dx, da, db = _bwd_fake(*options, False, needs_lora)  # the base product allocates dx
    with _runtime.launch_on(x):
        g = _down(dy, lora_b.t())
        if needs_x:
            dx = _up(g, lora_a, _base_bwd(dy, weight, quant_block, first_block), scaling)
        if needs_lora:
            da.copy_(_outer(g, x, scaling))
            db.copy_(_outer(_down(x, lora_a), dy, scaling).t())
    return [dx, da, db]


def _lora_linear_bwd_torch(
    dy, x, weight, lora_a, lora_b, scaling, quant_block, first_block, needs_x, needs_lora
):
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    g = dy @ b
    dx, da, db = (dy.new_empty(0) for _ in range(3))
    if needs_x:
        dx = _base_bwd(dy, weight, quant_block, first_block).addmm_(g, a, alpha=scaling)
    if needs_lora:
        h = x @ a.t()
        # The products run in the parameter's dtype, so that half-precision sums are not rounded on their way.
        da = (g.to(lora_a.dtype).t() @ x.to(lora_a.dtype)).mul_(scaling)
        db = (dy.to(lora_b.dtype).t() @ h.to(lora_b.dtype)).mul_(scaling)
    return [dx, da, db]


def _fake(x, weight, *others):
    return x.new_empty(len(x), len(weight[0]))


def _bwd_fake(dy, x, weight, lora_a, lora_b, scaling, quant_block, first_block, needs_x, needs_lora):
    needed = (x, needs_x), (lora_a, needs_lora), (lora_b, needs_lora)
    return [tensor.new_empty(tensor.shape if need else 0) for tensor, need in needed]


_op = _runtime.register(
    "lora_linear", triton_impl=_lora_linear_triton, torch_impl=_lora_linear_torch, fake=_fake
)
_bwd_op = _runtime.register(
    "lora_linear_bwd", triton_impl=_lora_linear_bwd_triton, torch_impl=_lora_linear_bwd_torch, fake=_bwd_fake
)


def _route(op, triton_impl, torch_impl, device):
    """The launcher itself where nothing traces: the dispatcher costs more than the kernels of a decode step."""
    if torch.compiler.is_compiling() or device.type not in ("cpu", "cuda"):
        return op
    return triton_impl if device.type == "cuda" or _runtime.INTERPRET else torch_impl


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_a, lora_b, bias, weight, scaling, quant_block, first_block):
        ctx.save_for_backward(x, lora_a, lora_b, *weight)
        ctx.scaling, ctx.quant_block, ctx.first_block = scaling, quant_block, first_block
        forward = _route(_op, _lora_linear_triton, _lora_linear_torch, x.device)
        return forward(x, weight, lora_a, lora_b, scaling, bias, quant_block, first_block)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, lora_a, lora_b, *weight = ctx.saved_tensors
        needs_x, needs_a, needs_b, needs_bias = ctx.needs_input_grad[:4]
        dx = da = db = None
        if needs_x or needs_a or needs_b:
            backward = _route(_bwd_op, _lora_linear_bwd_triton, _lora_linear_bwd_torch, x.device)
            layout = ctx.scaling, ctx.quant_block, ctx.first_block
            dx, da, db = backward(dy, x, weight, lora_a, lora_b, *layout, needs_x, needs_a or needs_b)
        grads = ((dx, needs_x), (da, needs_a), (db, needs_b))
        dbias = dy.sum(0) if needs_bias else None
        return *(grad if needed else None for grad, needed in grads), dbias, None, None, None, None


def _check_operand(name, tensor, shape, dtypes, device):
    # Messages are made on failure only: a decode step comes here once a layer and projection.
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
            f"expected {shape} of {' or '.join(map(str, dtypes))} on {device}"
        )


def lora_linear(x, weight, lora_a, lora_b, scaling, bias=None):
    """``x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T``, with gradients to x, the adapter and the bias.

    Args:
        x: (..., K) float32, float16 or bfloat16 (float64 on the CPU, with a dense weight).
        weight: frozen; dense (N, K) of x's dtype, or a QuantizedWeight of that shape.
        lora_a: (r, K) float32 or x's dtype; r from 1 to 128.
        lora_b: (N, r) float32 or x's dtype.
        scaling: factor of the adapter, alpha / r.
        bias: (N,) of x's dtype, or None.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError: a shape, dtype, device or rank is not as above, or the weight requires a gradient.
    """
    quantized = isinstance(weight, QuantizedWeight)
    (N, K), r, dtype, device = weight.shape, len(lora_a), x.dtype, x.device
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {K})")
    double = dtype == torch.float64 and device.type == "cpu" and not quantized
    if dtype not in DTYPES and not double:
        raise ValueError(f"x is {dtype} on {device}, expected one of {DTYPES}, or float64 on the CPU")
    if not 1 <= r <= 128:
        raise ValueError(f"the rank is {r}, expected 1 to 128")
    adapter = (dtype, torch.float32)
    _check_operand("lora_a", lora_a, (r, K), adapter, device)
    _check_operand("lora_b", lora_b, (N, r), adapter, device)
    if bias is not None:
        _check_operand("bias", bias, (N,), (dtype,), device)
    if weight.device != device or not (quantized or weight.dtype == dtype):
        raise ValueError(f"the weight is {weight.dtype} on {weight.device}, expected x's {dtype} on {device}")
    if not quantized and weight.requires_grad:
        raise ValueError("the weight requires a gradient, expected a frozen one")
    if quantized:
        codes, scales, quant_block, first_block = weight.operands()
        tensors = [codes, *scales]
    else:
        tensors, quant_block, first_block = [weight], 0, 0
    rows = x.reshape(-1, K).contiguous()
    y = _LoraLinear.apply(rows, lora_a, lora_b, bias, tensors, float(scaling), quant_block, first_block)
    return y.view(*x.shape[:-1], N)
