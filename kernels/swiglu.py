"""The gated activation of the MLP over a stacked gate and up projection, with a backward that keeps its input alone.

    y = silu(gate) * up         gate_up (M, 2F) = [gate | up], y (M, F), silu(g) = g * s, s = sigmoid(g)
    dgate = dy * up * s * (1 + gate * (1 - s))          dup = dy * gate * s

One launch forward, one backward. Bytes a call for b-byte values: 3 M F b forward, 5 M F b backward. Kept for it:
gate_up. No memory beside the outputs.

Precision: float32 inside, one rounding of y and of each gradient. Plain torch also rounds silu(gate) to the dtype
before the product: in half precision this is the more exact by that rounding.

Paper: Shazeer 2020, arXiv 2002.05202.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import _runtime
from .dependent_launch import dependent_launch, wait_for_inputs
from .dispatch import check_floating, route, wide

BLOCK_F, NUM_WARPS = 1024, 4


def swiglu_ref(gate_up):
    """Specification of :func:`swiglu`, with autograd's own gradients."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@triton.jit
def _swiglu_kernel(gate_up, y, columns, row_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y (M, F), one row's BLOCK columns a program; gate_up rows are row_stride apart."""
    wait_for_inputs(PDL)
    tiles = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    source = gate_up + row * row_stride + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(dy, gate_up, grad, columns, dy_stride, row_stride, BLOCK: tl.constexpr):
    """grad (M, 2F) contiguous from dy (M, F), one row's BLOCK columns of both halves a program."""
    tiles = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    source = gate_up + row * row_stride + column
    g = tl.load(dy + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    target = grad + row * 2 * columns + column
    dtype = grad.dtype.element_ty
    tl.store(target, (g * up * s * (1 + gate * (1 - s))).to(dtype), mask=mask)
    tl.store(target + columns, (g * gate * s).to(dtype), mask=mask)


def _rows(t):
    return t if t.stride(-1) == 1 else t.contiguous()


def _swiglu_triton(gate_up: torch.Tensor) -> torch.Tensor:
    y = _fake(gate_up)
    if y.numel():
        rows, (M, columns) = _rows(gate_up), y.shape
        with _runtime.launch_on(y):
            _swiglu_kernel[(M * triton.cdiv(columns, BLOCK_F),)](
                rows, y, columns, rows.stride(0), BLOCK=BLOCK_F, num_warps=NUM_WARPS, **dependent_launch(y)
            )
    return y


def _swiglu_torch(gate_up):
    return swiglu_ref(gate_up).contiguous()


def _swiglu_bwd_triton(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    grad = _bwd_fake(dy, gate_up)
    if grad.numel():
        dy, rows, (M, columns) = _rows(dy), _rows(gate_up), dy.shape
        with _runtime.launch_on(dy):
            _swiglu_bwd_kernel[(M * triton.cdiv(columns, BLOCK_F),)](
                dy, rows, grad, columns, dy.stride(0), rows.stride(0), BLOCK=BLOCK_F, num_warps=NUM_WARPS
            )
    return grad


def _swiglu_bwd_torch(dy, gate_up):
    gate, up = wide(gate_up).chunk(2, dim=-1)
    g, s = wide(dy), torch.sigmoid(gate)
    return torch.cat([g * up * s * (1 + gate * (1 - s)), g * gate * s], dim=-1).to(gate_up.dtype).contiguous()


def _fake(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _bwd_fake(dy, gate_up):
    return gate_up.new_empty(gate_up.shape)


_op = _runtime.register("swiglu", triton_impl=_swiglu_triton, torch_impl=_swiglu_torch, fake=_fake)
_bwd_op = _runtime.register(
    "swiglu_bwd", triton_impl=_swiglu_bwd_triton, torch_impl=_swiglu_bwd_torch, fake=_bwd_fake
)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return route(_op, _swiglu_triton, _swiglu_torch, gate_up.device)(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return route(_bwd_op, _swiglu_bwd_triton, _swiglu_bwd_torch, dy.device)(dy, *ctx.saved_tensors)


def swiglu(gate_up):
    """``silu(gate) * up`` of a stacked projection, with its gradient.

    Args:
        gate_up: (..., 2F) float32, float16 or bfloat16 (float64 on the CPU), columns [gate | up].

    Returns:
        (..., F) in the dtype of ``gate_up``.

    Raises:
        ValueError: the dtype is another, or the last dimension is odd or empty.
    """
    check_floating("gate_up", gate_up)
    columns = gate_up.shape[-1] if gate_up.ndim else 0
    if columns == 0 or columns % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}, expected (..., 2F)")
    y = _Swiglu.apply(gate_up.reshape(-1, columns))
    return y.view(*gate_up.shape[:-1], columns // 2)
