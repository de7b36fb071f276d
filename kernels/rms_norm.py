"""Root-mean-square normalisation of rows, alone or fused with the addition of a residual before it.

    s = x + residual            (rounded to x's dtype; s = x without a residual)
    y = s * rstd * weight       rstd = 1 / sqrt(mean(s^2) + eps)            x, residual, s, y (..., D), weight (D,)

With dy and ds the gradients of y and s, and n = s * rstd:

    dx = dresidual = ds + rstd * (dy * weight - n * mean(dy * weight * n))

One launch forward, one backward; each row is read once and held in registers. Bytes a call, for N rows of b-byte
values: forward 2 N D b, with a residual 4 N D b; backward 3 N D b, with a residual 4 N D b. Kept for backward: s and
the weight, nothing else (rstd is made again). No memory beside the outputs.

Precision: float32 inside, one rounding of s, one of y and one of dx. A row's sums run in an order that D alone
fixes, so its result does not depend on the other rows. The weight is frozen and has no gradient.

Paper: Zhang and Sennrich 2019, arXiv 1910.07467.
"""

import torch
import triton
import triton.language as tl

from . import _runtime
from .dependent_launch import dependent_launch, prefetch_values, wait_for_inputs
from .dispatch import check_floating, route, wide

MAX_D = 65536  # a row stays in the registers of one program
# By D's next power of two: rows of a program forward and backward, and its warps. One table for all cards, never
# keyed on the number of rows.
CONFIGS = {
    2**i: (max(1, 2048 >> i), max(1 + (i < 14), 2048 >> i), min(16, max(4, 2**i // 512)))
    for i in range(4, 17)
}


def rms_norm_ref(x, weight, eps, residual=None):
    """Specification of :func:`rms_norm`, with autograd's own gradients."""
    total = x if residual is None else x + residual
    values = wide(total)
    y = (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)
    return y if residual is None else (y, total)


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, y, total, rows, H, D, x_token, x_head, eps,
    ADD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (rows, D) = norm of x, whose row i lies at (i // H) * x_token + (i % H) * x_head; total where ADD."""
    if tl.program_id(0) == 0:  # requests for the same lines would wait for each other
        prefetch_values(weight, D, BLOCK_D, PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    source = (row // H * x_token + row % H * x_head)[:, None] + column[None, :]
    target = row[:, None] * D + column[None, :]
    values = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + target, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(y.dtype.element_ty)
        tl.store(total + target, rounded, mask=mask)
        values = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(values * values, axis=1) / D + eps)
    tl.store(y + target, (values * rstd[:, None] * scale[None, :]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy, dtotal, x, weight, dx, rows, H, D, x_token, x_head, eps,
    ADD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx (rows, D) from dy (rows, D) and the normalised values x, laid out as forward's; plus dtotal where ADD."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    source = (row // H * x_token + row % H * x_head)[:, None] + column[None, :]
    target = row[:, None] * D + column[None, :]
    values = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    g = tl.load(dy + target, mask=mask, other=0.0).to(tl.float32) * scale[None, :]
    rstd = tl.rsqrt(tl.sum(values * values, axis=1) / D + eps)[:, None]
    normed = values * rstd
    grad = rstd * (g - normed * (tl.sum(g * normed, axis=1) / D)[:, None])
    if ADD:
        grad += tl.load(dtotal + target, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + target, grad.to(dx.dtype.element_ty), mask=mask)


def _layout(x, backward):
    """x as (T, H, D) with unit last stride, a copy only where there is no such view, and the launch over its rows."""
    D = x.shape[-1]
    if x.stride(-1) != 1 or x.ndim > 3:
        x = x.contiguous().view(-1, D)
    x = x.view(1, 1, D) if x.ndim == 1 else x.unsqueeze(1) if x.ndim == 2 else x
    block_d = max(16, triton.next_power_of_2(D))
    *block_rows, warps = CONFIGS[block_d]
    block_rows = block_rows[backward]
    rows, H = x.shape[0] * x.shape[1], x.shape[1]
    launch = {"BLOCK_ROWS": block_rows, "BLOCK_D": block_d, "num_warps": warps}
    return x, (rows, H, D, x.stride(0), x.stride(1)), (triton.cdiv(rows, block_rows),), launch


def _rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> list[torch.Tensor]:
    y, total = _fake(x, residual, weight, eps)
    if x.numel():
        add = residual is not None
        values, sizes, grid, launch = _layout(x, False)
        residual = residual.contiguous() if add else values
        with _runtime.launch_on(x):
            _rms_norm_kernel[grid](
                values, residual, weight, y, total, *sizes, eps, ADD=add, **launch, **dependent_launch(x)
            )
    return [y, total]


def _rms_norm_torch(x, residual, weight, eps):
    if residual is None:
        return [rms_norm_ref(x, weight, eps).contiguous(), x.new_empty(0)]
    return [t.contiguous() for t in rms_norm_ref(x, weight, eps, residual)]


def _rms_norm_bwd_triton(
    dy: torch.Tensor, dtotal: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    dx = _bwd_fake(dy, dtotal, x, weight, eps)
    if x.numel():
        add = dtotal is not None
        values, sizes, grid, launch = _layout(x, True)
        dy = dy.contiguous()
        dtotal = dtotal.contiguous() if add else dy
        with _runtime.launch_on(x):
            _rms_norm_bwd_kernel[grid](dy, dtotal, values, weight, dx, *sizes, eps, ADD=add, **launch)
    return dx


def _rms_norm_bwd_torch(dy, dtotal, x, weight, eps):
    values, g = wide(x), wide(dy) * wide(weight)
    rstd = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    normed = values * rstd
    grad = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    return (grad if dtotal is None else grad + wide(dtotal)).to(x.dtype).contiguous()


def _fake(x, residual, weight, eps):
    return [x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)]


def _bwd_fake(dy, dtotal, x, weight, eps):
    return x.new_empty(x.shape)


_op = _runtime.register("rms_norm", triton_impl=_rms_norm_triton, torch_impl=_rms_norm_torch, fake=_fake)
_bwd_op = _runtime.register(
    "rms_norm_bwd", triton_impl=_rms_norm_bwd_triton, torch_impl=_rms_norm_bwd_torch, fake=_bwd_fake
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        y, total = route(_op, _rms_norm_triton, _rms_norm_torch, x.device)(x, residual, weight, eps)
        ctx.save_for_backward(x if residual is None else total, weight)
        ctx.eps = eps
        return y if residual is None else (y, total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dtotal=None):
        x, weight = ctx.saved_tensors
        backward = route(_bwd_op, _rms_norm_bwd_triton, _rms_norm_bwd_torch, x.device)
        dx = backward(dy, dtotal, x, weight, ctx.eps)
        needs_x, needs_residual = ctx.needs_input_grad[:2]
        return dx if needs_x else None, dx if needs_residual else None, None, None


def rms_norm(x, weight, eps, residual=None):
    """Normalise the last dimension of ``x``, or of ``x + residual``; gradients to x and the residual.

    Args:
        x: (..., D) float32, float16 or bfloat16 (float64 on the CPU); D from 1 to 65536. Strided heads (T, H, D),
            such as a part of a stacked projection, are read in place.
        weight: (D,) floating point, frozen.
        eps: what is added to the mean square.
        residual: of x's shape and dtype, or None.

    Returns:
        y of x's shape and dtype; with a residual (y, x + residual).

    Raises:
        ValueError: a shape, dtype or device is not as above, or the weight requires a gradient.
    """
    D = x.shape[-1] if x.ndim else 0
    if not 1 <= D <= MAX_D:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., D) with D from 1 to {MAX_D}")
    check_floating("x", x)
    if weight.shape != (D,) or not weight.is_floating_point() or weight.device != x.device:
        got = f"{weight.dtype} {tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"the weight is {got}, expected floating point ({D},) on {x.device}")
    if weight.requires_grad:
        raise ValueError("the weight requires a gradient, expected a frozen one")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (
        x.shape,
        x.dtype,
        x.device,
    ):
        got = f"{residual.dtype} {tuple(residual.shape)} on {residual.device}"
        raise ValueError(f"the residual is {got}, expected {x.dtype} {tuple(x.shape)} on {x.device}")
    return _RmsNorm.apply(x, residual, weight.contiguous(), float(eps))
