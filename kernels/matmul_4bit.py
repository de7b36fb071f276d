"""A linear layer on a frozen 4-bit weight: ``y = x @ dequantize(q).T + bias``.

x (..., K), q (N, K), bias (N,), y (..., N) in x's dtype; M rows in all, QB weights a scale.

Routes by the number of rows; sums are float32 in all:

    packed  M <= 16 on Hopper, elsewhere 32 for int4 and 64 for nf4; 16-bit x, codes in the order of
            ``QuantizedWeight.packed``: tensor cores fed from registers (``packed_matmul``), where nf4 values err by
            at most 0.0019 of themselves in bfloat16 and int4's by nothing. Codes in the order of files take the next
            but one.
    tiled   Hopper, from there to M = 256: out^T = W x^T by warp groups, W from registers (``tiled_matmul``), weights
            rounded to x's dtype.
    hopper  In place of both where N K is large (``hopper_matmul``): from M = 9 on, NF4 from 1 where K >= 2 N.
    vector  M <= 4, 16-bit x: CUDA cores, the weights exact in float32 (``gemv_4bit``).
    fused   M <= 64, 16-bit x: codes are decoded in registers, rounded to x's dtype, and go through ``tl.dot``.
            Both read N*K/2 codes and N*K/QB scales (fused: for each 32 rows), x and y. FLOPs: 2*M*N*K.
            Extra memory: SPLIT*M*N*4 bytes of partial sums where K is split to fill the card (none for SPLIT = 1),
            at most 32 KB a row of x (packed, tiled, hopper: 176 KB); a copy of x where x is not contiguous.
    dense   otherwise: one buffer of N*K values in x's dtype, a library matmul, the buffer freed. Bytes: the codes
            once, the buffer written once and read once.

Gradients: dx = dy @ dequantize(q), through the same buffer of N*K values; dbias = dy summed over rows. Backward keeps
the 4-bit tensors alone. Partial sums are added in a fixed order and the split depends on N and K only, so results
repeat bit for bit and, between two meeting points, a row's result does not depend on the others; it changes by
roundings where routes meet, at the numbers of rows in the tables.
Paper: QLoRA, Dettmers et al. 2023, arXiv 2305.14314.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import _runtime
from .code_words import WORDS, aligned, block_scale, code_table, decode_words, weight_tile
from .gemv_4bit import gemv_kernel
from .hopper_matmul import HopperConfig, hopper_config, hopper_products
from .packed_matmul import Config, packed_products, sum_kernel, sum_partials
from .quantization import DTYPES, dequantize_4bit_ref, dequantize_op, kernel_format
from .tiled_matmul import TileConfig, tiled_products

# By the least compute capability: max_rows, BLOCK_N, num_warps, num_stages, programs that fill the card.
# Rows of x are the dot's left operand in tiles of 16 or 32: below 64, Hopper uses mma.sync instead of WGMMA, whose
# register operands ptxas before CUDA 13.3 miscompiles.
CONFIGS = {80: (64, 32, 4, 2, 256)}
VECTOR_CONFIGS = {80: (4, 16, 4, 1, 512)}  # of the vector route, which keeps no shared memory

# Of packed codes, by the least compute capability, format and most rows of x; beyond the last, dense. Programmatic
# dependent launch begins with 90.
_FEW = (False, 4, 1, 2, 1024)
_MORE, _MOST = (True, 4, 2, 4, 264), (True, 4, 2, 4, 132)
_TILES = {
    32: TileConfig(32, 64, warps=4, stages=2, unroll=1, programs=528, pdl=True),
    64: TileConfig(64, 64, warps=4, stages=2, unroll=2, programs=264, pdl=True),
    128: TileConfig(128, 64, warps=4, stages=2, unroll=1, programs=264, pdl=True),
    256: TileConfig(128, 64, warps=4, stages=2, unroll=1, programs=132, pdl=True),
}
_UNTILED = lambda pdl: {
    "nf4": {16: Config(*_FEW, pdl), 32: Config(*_MORE, pdl), 64: Config(*_MOST, pdl)},
    "int4": {16: Config(*_FEW, pdl), 32: Config(*_MORE, pdl)},
}
LEAST_ROWS = 8  # up to so many, ``hopper_matmul`` is faster for long rows of NF4 alone
HOPPER_ROWS = 16, 32, 64, 128, 256  # up to which a configuration of its serves
# WGMMA, which ``tiled_matmul`` is made for, is Hopper's alone.
PACKED_CONFIGS = {
    80: _UNTILED(False),
    90: dict.fromkeys(("nf4", "int4"), {16: Config(*_FEW, True), **_TILES}),
    100: _UNTILED(True),
}


def matmul_4bit_ref(x, q, bias=None):
    """What ``matmul_4bit`` computes, in x's dtype, with autograd's own gradients."""
    return F.linear(x, dequantize_4bit_ref(q, x.dtype), bias)


# As in ``gemv_kernel``, a row's length in words is not specialised.
@triton.jit(do_not_specialize=["words_per_row"])
def _matmul_kernel(
    x, codes, scales, bias, out, M, N, words_per_row, steps, first_block,
    QUANT_BLOCK: tl.constexpr, FORMAT: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A tile of x @ W.T over ``steps`` steps of K: to ``out`` (M, N) with bias, or to partial sums (SPLIT, M, N)."""
    PER_BLOCK: tl.constexpr = QUANT_BLOCK // 8
    BLOCK_K: tl.constexpr = 8 * WORDS
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    lane = tl.arange(0, WORDS)
    x_row = x + m.to(tl.int64)[:, None] * words_per_row * 8
    row = codes + n[:, None] * words_per_row
    block_row = n[:, None] * (words_per_row // PER_BLOCK)
    table = code_table(scales[1], BLOCK_N, FORMAT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * steps, split * steps + steps):
        w = step * WORDS + lane
        mask = (n < N)[:, None] & (w < words_per_row)[None, :]
        words = tl.load(row + w[None, :], mask=mask, other=0)
        block = block_row + tl.max_contiguous(w // PER_BLOCK, 2)[None, :]
        scale, minimum = block_scale(scales, block, mask, first_block, FORMAT)
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (m < M)[:, None] & (k < words_per_row * 8)[None, :]
        x_tile = tl.load(x_row + k[None, :], mask=inside, other=0)
        values = decode_words(words, table, FORMAT)
        tile = weight_tile(values, scale, minimum, x.dtype.element_ty, FORMAT)
        acc = tl.dot(x_tile, tl.trans(tile), acc)
    if bias is not None and not PARTIAL:
        acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    target = split.to(tl.int64) * M + m
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + target[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


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
    if codes.dtype == torch.int32:
        format = kernel_format(scales)
        config = None if x.dtype == torch.float32 else product_config(arch, len(x), codes, format)
        if config is None:
            return _matmul_torch(x, codes, scales, bias, quant_block, first_block)
        if not x.numel() * len(codes):
            return x.new_empty(len(x), len(codes))
        with _runtime.launch_on(x):
            y = products(aligned(x), codes, scales, bias, first_block, config)
            return y if y.ndim == 2 else sum_partials(y, bias, x.dtype, config.pdl)
    max_rows, *fused = _entry(CONFIGS, arch)
    (M, K), N = x.shape, len(codes)
    if M > max_rows or x.dtype == torch.float32:
        return _matmul_torch(x, codes, scales, bias, quant_block, first_block)
    out = x.new_empty(M, N)
    if not out.numel():
        return out
    layout = {"QUANT_BLOCK": quant_block, "FORMAT": kernel_format(scales), "enable_fp_fusion": False}
    max_vector_rows, *vector = _entry(VECTOR_CONFIGS, arch)
    block_n, num_warps, num_stages, programs = vector if max_vector_rows >= M else fused
    tiles = triton.cdiv(N, block_n)
    steps, split = _plan(tiles, triton.cdiv(K, 8 * WORDS), programs)
    target = out if split == 1 else x.new_empty(split, M, N, dtype=torch.float32)
    words = aligned(codes).view(torch.int32)
    operands = (words, tuple(scales), bias, target, M, N, K // 8, steps, first_block)
    layout |= {
        "PARTIAL": split > 1,
        "BLOCK_N": block_n,
        "WORDS": WORDS,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    with _runtime.launch_on(x):
        if max_vector_rows >= M:
            rows, bf16 = triton.next_power_of_2(M), x.dtype == torch.bfloat16
            four = aligned(x).view(torch.int64)
            gemv_kernel[(tiles, split)](four, *operands, ROWS=rows, BF16=bf16, **layout)
        else:
            block_m = 16 if M <= 16 else 32
            grid = (tiles, triton.cdiv(M, block_m), split)
            _matmul_kernel[grid](x.contiguous(), *operands, BLOCK_M=block_m, **layout)
        if split > 1:
            grid = (triton.cdiv(M * N, 1024),)
            sum_kernel[grid](target, bias, out, M * N, N, SPLIT=split, BLOCK=1024, PDL=False, num_warps=4)
    return out


def products(x, words, scales, bias, first_block, config):
    """x @ W.T of packed codes in one launch: y with the bias, or partial sums (SPLIT, M, N) float32 without it."""
    operands = x, words, scales, bias, first_block, kernel_format(scales), config
    if isinstance(config, HopperConfig):
        return hopper_products(*operands)
    run = packed_products if isinstance(config, Config) else tiled_products
    return run(*operands, not _runtime.INTERPRET)


def product_config(arch, M, words, format):
    """The fastest fused configuration of packed codes (N, K/8) for M rows of 16-bit x, or None: dequantise, then a
    library matmul."""
    config, N, K = packed_config(arch, M, format), len(words), 8 * words.shape[1]
    if config is None or arch != 90 or _runtime.INTERPRET:
        return config
    if M <= LEAST_ROWS and (K < 2 * N or format == "int4"):
        return config
    return hopper_config(N, K, next(rows for rows in HOPPER_ROWS if rows >= M)) or config


def packed_config(arch, M, format):
    """The same of what Triton's interpreter can run."""
    by_rows = _entry(PACKED_CONFIGS, arch)[format.removeprefix("nested_")]
    return next((config for rows, config in by_rows.items() if rows >= M), None)


def _entry(table, arch):
    return table[max(cc for cc in table if cc <= arch)]


def _plan(tiles, steps, programs):
    """Steps of K a program and the number of splits, from N and K alone."""
    # two steps of K at least a program: below that the partial sums cost more than the idle multiprocessors
    steps_per_split = triton.cdiv(steps, max(1, min(programs // tiles, steps // 2)))
    return steps_per_split, triton.cdiv(steps, steps_per_split)


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
        with torch.autocast(dy.device.type, enabled=False):
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
        (..., N) in x's dtype, in which all is computed under autocast, too; with gradients to x and bias.

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
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return matmul_4bit(x, q, bias)
    codes, scales, quant_block, first_block = q.operands()
    bias = None if bias is None else bias.contiguous()
    y = matmul_op(x.reshape(-1, K), codes, scales, bias, quant_block, first_block)
    return y.view(*x.shape[:-1], N)
