"""Rotary position embedding of queries and keys in one launch, in the half-split layout.

    low, high = x[..., :D/2], x[..., D/2:]
    rotary(x) = [low * cos - high * sin, high * cos + low * sin]
    q (T, H, D), k (T, KVH, D), cos and sin (T, D/2) float32, one angle a token and frequency

The gradient is the rotation by minus the angle: one more launch of the same kernel. q and k may be parts of one
stacked projection (T, (H + 2 KVH) D); they are read in place. Bytes a call: 2 T (H + KVH) D b + 4 T D for b-byte
values, forward and backward. Kept for backward: cos and sin. No memory beside the outputs.

Precision: float32 inside, rounded once to the dtype of q and k.

Paper: RoFormer, Su et al. 2021, arXiv 2104.09864.
"""

import torch
import triton
import triton.language as tl

from . import _runtime
from .dependent_launch import dependent_launch, wait_for_inputs
from .dispatch import check_floating, route

BLOCK_HEADS = 16  # query heads of a program; the key heads are spread over the same programs
NUM_WARPS = 4


def rotary_ref(q, k, cos, sin):
    """Specification of :func:`rotary`, with autograd's own gradients."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]

    def rotate(x):
        low, high = x.to(dtype).chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


@triton.jit
def turn(x, partner, cos, sin):
    """x * cos + partner * sin, where partner is -high for the low half and low for the high one.

    The one rounding of a product is explicit: whatever kernel turns a head gives the same bits.
    """
    return tl.fma(x, tl.broadcast_to(cos, x.shape), partner * sin)


@triton.jit
def _rotate_heads(
    x, out, cos, sin, token, first, heads, x_token, x_head, half, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Heads first .. first + BLOCK - 1 of one token: out (T, heads, 2 half) contiguous."""
    head, column = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    mask = (head < heads)[:, None] & (column < half)[None, :]
    source = x + token * x_token + head[:, None].to(tl.int64) * x_head + column[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    target = out + (token * heads + head[:, None]) * (2 * half) + column[None, :]
    dtype = out.dtype.element_ty
    tl.store(target, turn(low, -high, cos[None, :], sin[None, :]).to(dtype), mask=mask)
    tl.store(target + half, turn(high, low, cos[None, :], sin[None, :]).to(dtype), mask=mask)


@triton.jit
def _rotary_kernel(
    q, k, cos, sin, q_out, k_out, H, KVH, half, q_token, q_head, k_token, k_head, cos_token, sin_token,
    INVERSE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q_out (T, H, D), k_out (T, KVH, D): one token and one share of its heads a program."""
    wait_for_inputs(PDL)
    token, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    c = tl.load(cos + token * cos_token + column, mask=column < half, other=0.0)
    s = tl.load(sin + token * sin_token + column, mask=column < half, other=0.0)
    s = -s if INVERSE else s
    _rotate_heads(q, q_out, c, s, token, share * BLOCK_Q, H, q_token, q_head, half, BLOCK_Q, BLOCK_D)
    _rotate_heads(k, k_out, c, s, token, share * BLOCK_K, KVH, k_token, k_head, half, BLOCK_K, BLOCK_D)


def _rotary_triton(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> list[torch.Tensor]:
    out = _fake(q, k, cos, sin, inverse)
    (T, H, D), KVH = q.shape, k.shape[1]
    if not T:
        return out
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    block_q = min(BLOCK_HEADS, triton.next_power_of_2(H))
    shares = triton.cdiv(H, block_q)
    block_k = triton.next_power_of_2(triton.cdiv(KVH, shares))
    with _runtime.launch_on(q):
        _rotary_kernel[(T, shares)](
            q, k, cos, sin, *out, H, KVH, D // 2, *q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0),
            INVERSE=inverse, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_D=max(16, triton.next_power_of_2(D // 2)),
            num_warps=NUM_WARPS, **dependent_launch(q),
        )  # fmt: skip
    return out


def _rotary_torch(q, k, cos, sin, inverse):
    return list(rotary_ref(q, k, cos, -sin if inverse else sin))


def _fake(q, k, cos, sin, inverse):
    return [q.new_empty(q.shape), k.new_empty(k.shape)]


_op = _runtime.register("rotary", triton_impl=_rotary_triton, torch_impl=_rotary_torch, fake=_fake)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        q_out, k_out = route(_op, _rotary_triton, _rotary_torch, q.device)(q, k, cos, sin, False)
        return q_out, k_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        rotate = route(_op, _rotary_triton, _rotary_torch, dq.device)
        dq, dk = rotate(dq, dk, *ctx.saved_tensors, True)
        needs_q, needs_k = ctx.needs_input_grad[:2]
        return dq if needs_q else None, dk if needs_k else None, None, None


def rotary(q, k, cos, sin):
    """Rotate each token's queries and keys by its angles, with gradients to both.

    Args:
        q: (T, H, D) float32, float16 or bfloat16 (float64 on the CPU), D even; any strides.
        k: (T, KVH, D) of q's dtype; any strides.
        cos: (T, D / 2) float32 cosines of each token's angles; no gradient.
        sin: (T, D / 2) float32 sines.

    Returns:
        The rotated q and k, contiguous.

    Raises:
        ValueError: a shape, dtype or device is not as above.
    """
    check_floating("q", q)
    if q.ndim != 3 or q.shape[-1] % 2 or not q.shape[1] * q.shape[2]:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (T, H, D) with an even D")
    (T, _, D), dtype, device = q.shape, q.dtype, q.device
    if (
        k.ndim != 3
        or (k.shape[0], k.shape[2]) != (T, D)
        or (k.dtype, k.device) != (dtype, device)
        or not k.shape[1]
    ):
        got = f"{k.dtype} {tuple(k.shape)} on {k.device}"
        raise ValueError(f"k is {got}, expected {dtype} ({T}, KVH, {D}) on {device}")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.shape != (T, D // 2) or t.dtype != torch.float32 or t.device != device or t.requires_grad:
            got = f"{t.dtype} {tuple(t.shape)} on {t.device}, requires_grad {t.requires_grad}"
            raise ValueError(
                f"{name} is {got}, expected torch.float32 ({T}, {D // 2}) on {device} without gradient"
            )
    return _Rotary.apply(q, k, cos, sin)
