"""A linear layer on a frozen 4-bit weight: ``y = x @ dequantize(q).T + bias``.

x (..., K), q (N, K), bias (N,), y (..., N) in x's dtype; M rows in all, QB weights a scale.

Two routes, both rounding the weights to x's dtype before the dot and accumulating in float32:

    fused   M <= max_rows, 16-bit x: codes are decoded in registers and go straight into ``tl.dot``.
            Bytes: N*K/2 codes and N*K/QB scales for each 32 rows, plus x and y. FLOPs: 2*M*N*K.
            Extra memory: SPLIT*M*N*4 bytes of partial sums where K is split to fill the card (none for SPLIT = 1),
            at most 32 KB a row; a copy of x where x is not contiguous.
    dense   otherwise: one buffer of N*K values in x's dtype, a library matmul, the buffer freed. Bytes: the codes
            once, the buffer written once and read once.

Gradients: dx = dy @ dequantize(q), through the same buffer of N*K values; dbias = dy summed over rows. Backward keeps
the 4-bit tensors alone. Partial sums are added in a fixed order and the split depends on N and K only, so results
repeat bit for bit. Paper: QLoRA, Dettmers et al. 2023, arXiv 2305.14314.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import _runtime
from .quantization import DTYPES, decode_tile, dequantize_4bit_ref, dequantize_op, kernel_format

# By the least compute capability: max_rows, BLOCK_N, BLOCK_K, num_warps, num_stages, programs that fill the card.
# Rows of x are the dot's left operand in tiles of 16 or 32: below 64, Hopper uses mma.sync instead of WGMMA, whose
# register operands ptxas before CUDA 13.3 miscompiles.
CONFIGS = {80: (64, 32, 256, 4, 3, 256)}


def matmul_4bit_ref(x, q, bias=None):
    """What ``matmul_4bit`` computes, in x's dtype, with autograd's own gradients."""
    return F.linear(x, dequantize_4bit_ref(q, x.dtype), bias)


@triton.jit
def _matmul_kernel(
    x, codes, scales, bias, out, M, N, blocks_per_row, blocks_per_split, first_block,
    QUANT_BLOCK: tl.constexpr, FORMAT: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of x @ W.T over one part of K: to ``out`` (M, N) with bias, or to partial sums (SPLIT, M, N)."""
    BLOCKS: tl.constexpr = BLOCK_K // QUANT_BLOCK
    HALF: tl.constexpr = QUANT_BLOCK // 2
    # where the two nibbles' elements stand in their block: 2j, 2j+1 (nf4) or j, j+16 (int4)
    STRIDE: tl.constexpr = 1 if FORMAT == "int4" else 2
    SHIFT: tl.constexpr = HALF if FORMAT == "int4" else 1
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    rows = x + m.to(tl.int64)[:, None] * blocks_per_row * QUANT_BLOCK
    stop = tl.minimum((split + 1) * blocks_per_split, blocks_per_row)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * blocks_per_split, stop, BLOCKS):
        b = start + tl.arange(0, BLOCKS)
        mask = (n < N)[:, None, None] & (b < stop)[None, :, None]
        block = n[:, None, None] * blocks_per_row + b[None, :, None]
        first, second = decode_tile(codes, scales, block, mask, first_block, QUANT_BLOCK, FORMAT)
        first = first.to(x.dtype.element_ty).reshape(BLOCK_N, BLOCKS * HALF)
        second = second.to(x.dtype.element_ty).reshape(BLOCK_N, BLOCKS * HALF)
        byte = tl.arange(0, BLOCKS * HALF)
        k = (start + byte // HALF) * QUANT_BLOCK + byte % HALF * STRIDE
        inside = (m < M)[:, None] & (k < stop * QUANT_BLOCK)[None, :]
        acc = tl.dot(tl.load(rows + k[None, :], mask=inside, other=0), tl.trans(first), acc)
        acc = tl.dot(tl.load(rows + k[None, :] + SHIFT, mask=inside, other=0), tl.trans(second), acc)
    if bias is not None and SPLIT == 1:
        acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    row = split.to(tl.int64) * M + m
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + row[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(partial, bias, out, total, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """out (M, N) = partial sums (SPLIT, M, N) added in order, + bias; ``total`` = M*N."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLIT):
        acc += tl.load(partial + split * total + index, mask=mask, other=0)
    if bias is not None:
        acc += tl.load(bias + index % N, mask=mask, other=0).to(tl.float32)
    tl.store(out + index, acc.to(out.dtype.element_ty), mask=mask)


def _matmul_triton(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: list[torch.Tensor],
    bias: torch.Tensor | None,
    quant_block: int,
    first_block: int,
) -> torch.Tensor:
    arch = _runtime.arch(x.device)
    _runtime.check(arch >= min(CONFIGS), f"compute capability {arch}, expected {min(CONFIGS)} or later")
    max_rows, block_n, block_k, num_warps, num_stages, programs = CONFIGS[
        max(cc for cc in CONFIGS if cc <= arch)
    ]
    (M, K), N = x.shape, len(codes)
    if M > max_rows or x.dtype == torch.float32 or quant_block > block_k:
        return _matmul_torch(x, codes, scales, bias, quant_block, first_block)
    x, out = x.contiguous(), x.new_empty(M, N)
    if not out.numel():
        return out
    tiles, steps, blocks = triton.cdiv(N, block_n), triton.cdiv(K, block_k), block_k // quant_block
    # two steps of K at least a program: below that the partial sums cost more than the idle multiprocessors
    steps_per_split = triton.cdiv(steps, max(1, min(programs // tiles, steps // 2)))
    split = triton.cdiv(steps, steps_per_split)
    target = out if split == 1 else x.new_empty(split, M, N, dtype=torch.float32)
    block_m = 16 if M <= 16 else 32
    with _runtime.launch_on(x):
        _matmul_kernel[(tiles, triton.cdiv(M, block_m), split)](
            x, codes, tuple(scales), bias, target, M, N, K // quant_block, steps_per_split * blocks, first_block,
            QUANT_BLOCK=quant_block, FORMAT=kernel_format(scales), SPLIT=split,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False,
        )  # fmt: skip
        if split > 1:
            grid = (triton.cdiv(M * N, 1024),)
            _sum_kernel[grid](target, bias, out, M * N, N, SPLIT=split, BLOCK=1024, num_warps=4)
    return out


def _matmul_torch(x, codes, scales, bias, quant_block, first_block):
    return F.linear(x, dequantize_op(codes, scales, quant_block, first_block, x.dtype), bias)


def _matmul_fake(x, codes, scales, bias, quant_block, first_block):
    return x.new_empty(x.shape[0], codes.shape[0])


def _setup_context(ctx, inputs, output):
    x, codes, scales, bias, ctx.quant_block, ctx.first_block = inputs
    ctx.save_for_backward(codes, *scales)


def _matmul_bwd(ctx, dy):
    codes, *scales = ctx.saved_tensors
    needs_x, _, _, needs_bias, *_ = ctx.needs_input_grad
    dx = dbias = None
    if needs_x:
        dx = dy @ dequantize_op(codes, scales, ctx.quant_block, ctx.first_block, dy.dtype)
    if needs_bias:
        dbias = dy.sum(0)
    return dx, None, [None] * len(scales), dbias, None, None


matmul_op = _runtime.register(
    "matmul_4bit",
    triton_impl=_matmul_triton,
    torch_impl=_matmul_torch,
    fake=_matmul_fake,
    backward=_matmul_bwd,
    setup_context=_setup_context,
)


def matmul_4bit(x, q, bias=None):
    """``x @ dequantize_4bit(q, x.dtype).T + bias`` without a dense weight that outlives the call.

    Args:
        x: (..., K) float32, float16 or bfloat16, on q's device.
        q: QuantizedWeight of shape (N, K), frozen.
        bias: (N,) of x's dtype, or None.

    Returns:
        (..., N) in x's dtype, with gradients to x and bias.

    Raises:
        ValueError: for other shapes, dtypes or devices.
    """
    N, K = q.shape
    _runtime.check(x.dtype in DTYPES, f"x is {x.dtype}, expected one of {DTYPES}")
    _runtime.check(x.ndim > 0 and x.shape[-1] == K, f"x has shape {tuple(x.shape)}, expected (..., {K})")
    _runtime.check(x.device == q.device, f"x is on {x.device}, the weight on {q.device}")
    if bias is not None:
        _runtime.check(
            tuple(bias.shape) == (N,) and bias.dtype == x.dtype and bias.device == x.device,
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, expected {x.dtype} {(N,)} on {x.device}",
        )
    codes, scales, quant_block, first_block = q.operands()
    y = matmul_op(x.reshape(-1, K), codes, scales, bias, quant_block, first_block)
    return y.view(*x.shape[:-1], N)
