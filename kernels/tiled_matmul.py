"""x (M, K) @ W.T on packed 4-bit codes (``packed_codes``) for tens of rows: codes are decoded to shared memory.

A program decodes BLOCK_N rows of W, half a tile of 128 elements of K at a time, into shared memory, where the tensor
cores of Hopper want their operands; x comes there by asynchronous copies, tiles ahead. No operand of a product is in
registers. K is split over programs where N alone does not fill the card.

    nf4    acc += (GAIN code_book[codes] * (scale_b / GAIN)) @ x_b
    int4   acc += (scale_b codes + minimum_b) @ x_b

with the weights rounded to x's dtype as ``dequantize_4bit`` rounds them (nf4: beside the rounding of
``packed_codes``); sums are float32 in a fixed order. Bytes: N K / 2 codes and the scales once for each BLOCK_M rows,
x once for each BLOCK_N columns (through the L2 cache), SPLIT M N 4 twice for partial sums where K is split. FLOPs: 2
M N K. A row's result depends on that row and the configuration alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .code_words import aligned
from .packed_codes import TILE, decode_packed
from .packed_matmul import Update, block_scale_of, half_float, per_tile_scales


@triton.jit
def _weights(
    values, raw, minimum, scales, block, HALF: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Half a tile's weights in four tensors of the words' shape, as ``decode_packed`` gives the codes."""
    PER_BLOCK: tl.constexpr = 2 if FORMAT == "int4" else 4
    result = ()
    for i in tl.static_range(4):
        number = HALF * (4 // PER_BLOCK) + i // PER_BLOCK
        scale = block_scale_of(scales, raw, block, True, number, FORMAT, DTYPE)[:, None]
        if PAIRS:
            high = scale.to(tl.bfloat16)
            low = (scale - high.to(tl.float32)).to(tl.bfloat16)
            high, low = tl.broadcast_to(high, values[i].shape), tl.broadcast_to(low, values[i].shape)
            # value * high is exact inside the addition: one rounding, as of a float32 product, two values at once
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 $0, $1, $2, t; }", "=r,r,r,r",
                [values[i], high, low], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            value = values[i].to(tl.float32)
            if FORMAT == "int4":
                value = (value - 16) * scale + half_float(minimum, 16 * number)[:, None]
            else:
                value *= scale
        result = result + (value.to(DTYPE),)
    return result


@triton.jit
def _in_order(values, BLOCK_N: tl.constexpr):
    """Four tensors (BLOCK_N, 16) of half a tile to (BLOCK_N, 64), with K as x has it."""
    runs = tl.join(tl.join(values[0], values[1]), tl.join(values[2], values[3]))
    return runs.reshape(BLOCK_N, 4, 4, 2, 2).permute(0, 4, 1, 3, 2).reshape(BLOCK_N, 64)


@triton.jit
def _whole_in_order(first, second, BLOCK_N: tl.constexpr):
    """Both halves of a tile to (BLOCK_N, 128), with K as x has it."""
    a = tl.join(tl.join(first[0], first[1]), tl.join(first[2], first[3]))
    b = tl.join(tl.join(second[0], second[1]), tl.join(second[2], second[3]))
    runs = tl.join(a, b)
    return runs.reshape(BLOCK_N, 4, 4, 2, 2, 2).permute(0, 5, 4, 1, 3, 2).reshape(BLOCK_N, 128)


@triton.jit
def _parts_of(n, columns):
    """The part that each output n belongs to, -1 for none, and its row of B."""
    part, b_row, first_row = -1 + 0 * n, 0 * n, 0
    for p in tl.static_range(len(columns) // 2):
        inside = (n >= columns[2 * p]) & (n < columns[2 * p + 1])
        part = tl.where(inside, p, part)
        b_row = tl.where(inside, n - columns[2 * p] + first_row, b_row)
        first_row += columns[2 * p + 1] - columns[2 * p]
    return part, b_row


@triton.jit
def _update(
    acc, h, b, scaling, columns, n0, width, part, b_row, m, M, R, r,
    GATED: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``acc`` (BLOCK_M, BLOCK_N) with the adapters' part."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    GROUPS: tl.constexpr = BLOCK_M // 32
    RANKS: tl.constexpr = 16 if RANK < 32 else 32
    for p in tl.static_range(len(columns) // 2):
        meets = (n0 < columns[2 * p + 1]) & (n0 + WIDTH > columns[2 * p])
        if GATED:
            meets |= (n0 + width < columns[2 * p + 1]) & (n0 + width + WIDTH > columns[2 * p])
        if meets:
            delta = tl.zeros((GROUPS, BLOCK_M // GROUPS, BLOCK_N), tl.float32)
            for first_rank in range(0, RANK, RANKS):
                rank = first_rank + tl.arange(0, RANKS)
                of_rank = (rank < r)[None, :]
                mask = (part == p)[:, None] & of_rank
                weight = tl.load(b + b_row[:, None] * r + rank[None, :], mask=mask, other=0.0)
                at = h + m[:, None] * R + (p * r + rank)[None, :]
                mask = (m < M)[:, None] & of_rank
                value = tl.load(at, mask=mask, other=0.0)
                for split in tl.static_range(1, SPLITS):
                    value += tl.load(at + tl.cast(split, tl.int64) * M * R, mask=mask, other=0.0)
                # By 32 rows, for mma.sync: WGMMA would take ``value`` from registers, which ptxas miscompiles.
                value = value.to(DTYPE).reshape(GROUPS, BLOCK_M // GROUPS, RANKS)
                weight = tl.broadcast_to(tl.trans(weight.to(DTYPE))[None], GROUPS, RANKS, BLOCK_N)
                delta = tl.dot(value, weight, delta, input_precision="ieee")
            acc += scaling * delta.reshape(BLOCK_M, BLOCK_N)
    return acc


@triton.jit(do_not_specialize=["M", "tiles", "steps", "first_block"])
def tiled_kernel(
    x, codes, scales, bias, out, h, b, residual, scaling, columns, M, N, R, r, tiles, steps, first_block,
    FORMAT: tl.constexpr, PARTIAL: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr, LATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr,
    GATED: tl.constexpr, WHOLE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of x @ W.T over ``steps`` tiles of K; operands as those of ``packed_kernel``.

    GATED: half of them stand N/2 further, and ``out`` (M, N/2) = silu(first) * second.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    n0, width = tl.program_id(0).to(tl.int64) * WIDTH, N
    n = n0 + tl.arange(0, BLOCK_N)
    exists = n < N
    if GATED:
        width = N // 2
        own = tl.arange(0, BLOCK_N)
        exists = n0 + own % WIDTH < width
        n = n0 + own % WIDTH + own // WIDTH * width
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    # Rows past M and columns past N are copies of the last and not stored.
    rows = tl.minimum(n, N - 1)
    code_rows = codes + rows[:, None] * (tiles * 16) + tl.arange(0, 16)[None, :]
    x_rows = x + tl.minimum(m, M - 1)[:, None] * (tiles * 128) + tl.arange(0, 128 if WHOLE else 64)[None, :]
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
        block = (rows * tiles + tile) * 2 + first_block
        if WHOLE:
            first_half = decode_packed(words, 0, DTYPE, FORMAT != "int4", ASSEMBLY)
            second_half = decode_packed(words, 1, DTYPE, FORMAT != "int4", ASSEMBLY)
            first_half = _weights(first_half, raw, minimum, scales, block, 0, FORMAT, DTYPE, PAIRS)
            second_half = _weights(second_half, raw, minimum, scales, block, 1, FORMAT, DTYPE, PAIRS)
            x_tile = tl.load(x_rows + tile * 128)
            acc = tl.dot(x_tile, tl.trans(_whole_in_order(first_half, second_half, BLOCK_N)), acc)
        else:
            for half in tl.static_range(2):
                values = decode_packed(words, half, DTYPE, FORMAT != "int4", ASSEMBLY)
                values = _weights(values, raw, minimum, scales, block, half, FORMAT, DTYPE, PAIRS)
                x_tile = tl.load(x_rows + tile * 128 + half * 64)
                acc = tl.dot(x_tile, tl.trans(_in_order(values, BLOCK_N)), acc)
    if PDL and LATE:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if bias is not None and not PARTIAL:
        acc += tl.load(bias + n, mask=exists, other=0).to(tl.float32)[None, :]
    if b is not None:
        part, b_row = _parts_of(n, columns)
        acc = _update(
            acc, h, b, scaling, columns, n0, width, part, b_row, m, M, R, r,
            GATED, WIDTH, SPLITS, RANK, DTYPE,
        )  # fmt: skip
    mask = (m < M)[:, None] & exists[None, :]
    if GATED:
        y = acc.to(DTYPE).to(tl.float32).reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1)
        gate, up = tl.split(y)
        column = n0 + tl.arange(0, WIDTH)
        y, mask = gate * tl.sigmoid(gate) * up, (m < M)[:, None] & (column < width)[None, :]
        tl.store(out + m[:, None] * width + column[None, :], y.to(DTYPE), mask=mask)
    else:
        target = (split * M + m)[:, None] * N + n[None, :]
        if residual is not None:
            acc = acc.to(DTYPE).to(tl.float32) + tl.load(residual + target, mask=mask, other=0).to(tl.float32)
        tl.store(out + target, acc.to(out.dtype.element_ty), mask=mask)


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


def tiled_products(
    x,
    words,
    scales,
    bias,
    first_block,
    format,
    config,
    assembly=True,
    *,
    update=None,
    late=False,
    whole=True,
    registers=None,
    pairs=None,
):
    """As ``packed_products``: y, or partial sums (SPLIT, M, N) without the bias."""
    (M, K), N, update = x.shape, len(words), update or Update()
    across, steps, split = tile_plan(N, K // TILE, config)
    R, r, splits = 0, 0, 0
    if update.b is not None:
        (splits, _, R), r = update.h.shape, update.b.shape[1]
    if update.gated:
        across = triton.cdiv(N // 2, config.block_n // 2)
    if pairs is None:
        pairs = assembly and x.dtype == torch.bfloat16 and format != "int4"
    if registers is None and update.b is not None and config.warps == 4:
        registers = 168
    out = x.new_empty(M, N // 2 if update.gated else N)
    if split > 1:
        out = x.new_empty(split, M, N, dtype=torch.float32)
    tiled_kernel[(across, triton.cdiv(M, config.block_m), split)](
        x, aligned(words), per_tile_scales(scales, format), bias, out, update.h, update.b, update.residual,
        update.scaling, update.columns, M, N, R, r, K // TILE, steps, first_block,
        FORMAT=format, PARTIAL=split > 1, ASSEMBLY=assembly, PDL=config.pdl, LATE=late, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, STAGES=config.stages, SPLITS=splits, RANK=max(16, triton.next_power_of_2(r)),
        GATED=update.gated, WHOLE=whole, PAIRS=pairs, num_warps=config.warps, launch_pdl=config.pdl,
        maxnreg=registers,
    )  # fmt: skip
    return out
