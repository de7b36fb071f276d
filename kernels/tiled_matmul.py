"""x (M, K) @ W.T on packed 4-bit codes (``packed_codes``) for tens of rows: codes are decoded to shared memory.

A program decodes BLOCK_N rows of W, half a tile of 128 elements of K at a time, into shared memory, where the tensor
cores of Hopper want their operands; x comes there by asynchronous copies, tiles ahead. No operand of a product is in
registers. K is split over programs where N alone does not fill the card.

    nf4    acc += (GAIN code_book[codes] * (scale_b / GAIN)) @ x_b
    int4   acc += (scale_b codes + minimum_b) @ x_b

with the weights rounded to x's dtype as ``dequantize_4bit`` rounds them (nf4: beside the rounding of
``packed_codes``, and in bfloat16 with 16 bits of the scale); sums are float32 in a fixed order. Bytes: N K / 2 codes
and the scales once for each BLOCK_M rows, x once for each BLOCK_N columns (through the L2 cache), SPLIT M N 4 twice
for partial sums where K is split. FLOPs: 2 M N K. A row's result depends on that row and the configuration alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .code_words import aligned
from .packed_codes import TILE, decode_packed
from .packed_matmul import block_scale_of, half_float, per_tile_scales


@triton.jit
def _weights(
    values, raw, minimum, scales, block, HALF: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Half a tile's weights in four tensors of the words' shape, as ``decode_packed`` gives the codes."""
    PER_BLOCK: tl.constexpr = 2 if FORMAT == "int4" else 4
    result = ()
    for i in tl.static_range(4):
        number = HALF * (4 // PER_BLOCK) + i // PER_BLOCK
        scale = block_scale_of(scales, raw, block, True, number, FORMAT, DTYPE)[:, None]
        if FORMAT == "int4":
            value = (values[i].to(tl.float32) - 16) * scale + half_float(minimum, 16 * number)[:, None]
        elif ASSEMBLY and DTYPE == tl.bfloat16:
            # Two values at once: value * high is exact inside the addition, so that one rounding is left, and
            # value * low is of 16 bits of the scale.
            high = scale.to(tl.bfloat16)
            low = (scale - high.to(tl.float32)).to(tl.bfloat16)
            high, low = tl.broadcast_to(high, values[i].shape), tl.broadcast_to(low, values[i].shape)
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 $0, $1, $2, t; }", "=r,r,r,r",
                [values[i], high, low], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            value = values[i].to(tl.float32) * scale
        result = result + (value.to(DTYPE),)
    return result


@triton.jit
def _in_order(values, BLOCK_N: tl.constexpr):
    """Four tensors (BLOCK_N, 16) of half a tile to (BLOCK_N, 64), with K as x has it."""
    runs = tl.join(tl.join(values[0], values[1]), tl.join(values[2], values[3]))
    return runs.reshape(BLOCK_N, 4, 4, 2, 2).permute(0, 4, 1, 3, 2).reshape(BLOCK_N, 64)


@triton.jit(do_not_specialize=["M", "tiles", "steps", "first_block"])
def tiled_kernel(
    x, codes, scales, bias, out, M, N, tiles, steps, first_block,
    FORMAT: tl.constexpr, PARTIAL: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr, LATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of x @ W.T over ``steps`` tiles of K; operands as those of ``packed_kernel``."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    # Rows past M and columns past N are copies of the last and not stored.
    rows = tl.minimum(n, N - 1)
    code_rows = codes + rows[:, None] * (tiles * 16) + tl.arange(0, 16)[None, :]
    x_rows = x + tl.minimum(m, M - 1)[:, None] * (tiles * 128) + tl.arange(0, 64)[None, :]
    first, last = split * steps, tl.minimum(split * steps + steps, tiles)
    if PDL and not LATE:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        words = tl.load(code_rows + tile * 16)
        raw = tl.load(scales[0] + rows * tiles + tile)
        minimum = raw
        if FORMAT == "int4":
            minimum = tl.load(scales[1] + rows * tiles + tile)
        for half in tl.static_range(2):
            values = decode_packed(words, half, DTYPE, FORMAT != "int4", ASSEMBLY)
            block = (rows * tiles + tile) * 2 + first_block
            values = _weights(values, raw, minimum, scales, block, half, FORMAT, DTYPE, ASSEMBLY)
            x_tile = tl.load(x_rows + tile * 128 + half * 64)
            acc = tl.dot(x_tile, tl.trans(_in_order(values, BLOCK_N)), acc)
    if PDL and LATE:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if bias is not None and not PARTIAL:
        acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    target = out + (split * M + m)[:, None] * N + n[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


class TileConfig(NamedTuple):
    """How ``tiled_kernel`` divides the work. programs: one for each multiprocessor (they split K; three where N
    alone has more than one); pdl as in ``Config``."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int
    pdl: bool


def tile_plan(N, tiles, config):
    """Programs over N, tiles of K a program and splits of K, from N and K alone."""
    across = triton.cdiv(N, config.block_n)
    programs = config.programs if across <= config.programs else 3 * config.programs
    # two tiles of K at least a program, as in ``packed_matmul.plan``
    steps = triton.cdiv(tiles, max(1, min(programs // max(1, across), tiles // 2)))
    return across, steps, triton.cdiv(tiles, steps)


def tiled_products(x, words, scales, bias, first_block, format, config, assembly=True, *, late=False):
    """As ``packed_products``: y, or partial sums (SPLIT, M, N) without the bias."""
    (M, K), N = x.shape, len(words)
    across, steps, split = tile_plan(N, K // TILE, config)
    out = x.new_empty(M, N) if split == 1 else x.new_empty(split, M, N, dtype=torch.float32)
    tiled_kernel[(across, triton.cdiv(M, config.block_m), split)](
        x, aligned(words), per_tile_scales(scales, format), bias, out, M, N, K // TILE, steps, first_block,
        FORMAT=format, PARTIAL=split > 1, ASSEMBLY=assembly, PDL=config.pdl, LATE=late, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, STAGES=config.stages, num_warps=config.warps, launch_pdl=config.pdl,
    )  # fmt: skip
    return out
