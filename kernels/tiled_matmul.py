"""x (M, K) @ W.T on packed 4-bit codes (``packed_codes``) for tens to hundreds of rows: W goes from registers alone.

A program takes BLOCK_N rows of W and BLOCK_M rows of x. It computes out^T = W @ x^T, so that decoded weights are the
operand that tensor cores take from registers (WGMMA on Hopper), and x the one that they take from shared memory,
where it comes by asynchronous copies, STAGES turns of the loop deep. Codes and scales go from global memory straight
to the lane that decodes them, UNROLL tiles of 128 elements of K ahead, as many as a turn takes: they meet no shared
memory and no barrier. K is split over programs where N alone does not fill the card.

    nf4    acc += (GAIN code_book[codes] * (scale_b / GAIN)) @ x_b
    int4   acc += (scale_b codes + minimum_b) @ x_b

with the weights rounded to x's dtype as ``dequantize_4bit`` rounds them (nf4: beside the rounding of
``packed_codes``, and in bfloat16 with 16 bits of the scale; int4: but for 2^-19 of the scale); sums are float32 in a
fixed order. Beside the products h = x A^T may be made in the same launch, for a dense A (R, K) in its own dtype,
rounded to x's. Bytes: N K / 2 codes and the scales once for each BLOCK_M rows, x once for each BLOCK_N columns
(through the L2 cache), SPLIT M (N + R) 4 twice for partial sums where K is split. FLOPs: 2 M (N + R) K. A row's
result depends on that row, N, K and the configuration alone, BLOCK_M, STAGES and UNROLL excepted.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .code_words import aligned
from .dependent_launch import prefetch
from .packed_codes import TILE, UNGAIN_BF16, UNGAIN_FP16, decode_quads
from .packed_matmul import block_scale_of, half_float, per_tile_scales

MOST_SPLITS = 10  # of K: more cost more in partial sums than they gain
HALF_TILE = tl.constexpr(64)  # elements of K in a product: a whole tile would take twice the registers

# Word 4 s + 2 v + l of a tile holds, at nibble 2 a + u, element 32 a + 8 s + 4 u + 2 v + l. Tensor cores want lane
# 2 u + v of a row's four to hold elements 2 u + v of each run of eight, so that lane takes two of every four words.


@triton.jit
def _pairs(even, odd):
    """Two (rows, 4), one value a lane, to (rows, 8): neighbours in a lane."""
    return tl.join(even, odd).reshape(even.shape[0], 8)


@triton.jit
def _fetch(pointers, tile, FORMAT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """A tile's words for the lanes (rows, 4): eight tensors, and the row's block scales (int4: minima) as integers.

    By assembly, as the compiler would take tl.load's through shared memory.
    """
    codes, scales, minima = pointers
    words = ()
    for s in tl.static_range(4):
        at = codes + (tile * 16 + 4 * s)
        if ASSEMBLY:
            even, odd = tl.inline_asm_elementwise(
                "ld.global.nc.L1::evict_last.L2::128B.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [at.to(tl.int64)],
                (tl.int32, tl.int32), is_pure=False, pack=1,
            )  # fmt: skip
        else:
            even, odd = tl.load(at), tl.load(at + 1)
        words = words + (even, odd)
    scale = _fetch_one(scales + tile, ASSEMBLY)
    minimum = scale
    if FORMAT == "int4":
        minimum = _fetch_one(minima + tile, ASSEMBLY)
    return words, scale, minimum


@triton.jit
def _fetch_one(at, ASSEMBLY: tl.constexpr):
    if not ASSEMBLY:
        return tl.load(at)
    elif at.dtype.element_ty == tl.int64:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b64 $0, [$1];", "=l,l", [at.to(tl.int64)], tl.int64, is_pure=False, pack=1
        )
    elif at.dtype.element_ty == tl.int16:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b16 $0, [$1];", "=h,l", [at.to(tl.int64)], tl.int16, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=f,l", [at.to(tl.int64)], tl.float32, is_pure=False, pack=1
        )


@triton.jit
def _block_scale(
    scales, raw, block, NUMBER: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr
):  # fmt: skip
    """As ``block_scale_of``, which reads nested tables by tl.load."""
    if FORMAT == "nested_nf4":
        UNGAIN: tl.constexpr = UNGAIN_BF16 if DTYPE == tl.bfloat16 else UNGAIN_FP16
        group = _fetch_one(scales[2] + (block + NUMBER) // 256, ASSEMBLY)
        code = ((raw >> (8 * NUMBER)) & 255).to(tl.int32)
        return (_fetch_one(scales[3] + code, ASSEMBLY) * group + tl.load(scales[4])) * UNGAIN
    else:
        return block_scale_of(scales, raw, block, True, NUMBER, FORMAT, DTYPE)


@triton.jit
def _scaled(value, scale, minimum, DTYPE: tl.constexpr, FORMAT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Decoded codes (rows, 8) as weights; scale, minimum (rows, 4) float32."""
    if FORMAT == "int4":
        minimum = minimum - 16 * scale
        return (value.to(tl.float32) * _pairs(scale, scale) + _pairs(minimum, minimum)).to(DTYPE)
    elif ASSEMBLY and DTYPE == tl.bfloat16:
        # Two values at once: value * high is exact inside the addition, so that one rounding is left, and
        # value * low is of 16 bits of the scale.
        high = scale.to(tl.bfloat16)
        low = (scale - high.to(tl.float32)).to(tl.bfloat16)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 $0, $1, $2, t; }", "=r,r,r,r",
            [value, _pairs(high, high), _pairs(low, low)], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return (value.to(tl.float32) * _pairs(scale, scale)).to(DTYPE)


@triton.jit
def _settled(acc, ASSEMBLY: tl.constexpr):
    """acc, when the product behind it is done with its registers: ptxas before CUDA 13.3 gives them away earlier.

    An operation between two products, here an empty one, makes the compiler wait for the first.
    """
    if ASSEMBLY:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def _x_tile(x, rows, m0, k, K, ASSEMBLY: tl.constexpr):
    """HALF_TILE elements of BLOCK_M rows of x from k on, transposed; from K on zeros."""
    if ASSEMBLY:
        tile = x.load([m0, k])
    else:
        tile = tl.load(rows + k, mask=k < K, other=0)
    return tl.trans(tile)


@triton.jit(do_not_specialize=["M", "across", "tiles", "steps", "first_block"])
def tiled_kernel(
    x, codes, scales, bias, out, a, h, M, N, R, across, tiles, steps, first_block,
    FORMAT: tl.constexpr, PARTIAL: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of x @ W.T over ``steps`` tiles of K: ``out`` (M, N) with bias or partial sums (SPLIT, M, N).

    x: a descriptor (ASSEMBLY) or pointer of (M, 128 tiles); codes, scales as those of ``packed_kernel``.
    Programs from ``across`` on take BLOCK_N rows of a (R, 128 tiles) instead, to h (SPLIT, M, R) float32.
    """
    DTYPE: tl.constexpr = x.dtype if ASSEMBLY else x.dtype.element_ty
    A_LINE: tl.constexpr = HALF_TILE if a is None else 1024 // a.dtype.element_ty.primitive_bitwidth
    program, split = tl.program_id(0), tl.program_id(2).to(tl.int64)
    m0 = tl.program_id(1) * BLOCK_M
    m = m0.to(tl.int64) + tl.arange(0, BLOCK_M)
    n0 = program.to(tl.int64) * BLOCK_N
    # Rows past M and columns past N are copies of the last (by descriptor: zeros) and not stored.
    x_rows = x
    if not ASSEMBLY:
        x_rows = x + tl.minimum(m, M - 1)[:, None] * (tiles * 128) + tl.arange(0, HALF_TILE)[None, :]
    first = tl.program_id(2) * steps
    last = tl.minimum(first + steps, tiles)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if a is not None and program >= across:
        rank = (program - across) * BLOCK_N + tl.arange(0, BLOCK_N)
        a_rows = a + tl.minimum(rank, R - 1).to(tl.int64)[:, None] * (tiles * 128)
        if ASSEMBLY:
            for step in tl.range(2 * first, 2 * last):
                prefetch(a_rows + step * HALF_TILE + A_LINE * tl.arange(0, HALF_TILE // A_LINE)[None, :])
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        for step in tl.range(2 * first, 2 * last, num_stages=STAGES):
            k = step * HALF_TILE
            weight = tl.load(a_rows + (k + tl.arange(0, HALF_TILE))[None, :]).to(DTYPE)
            acc = tl.dot(weight, _x_tile(x, x_rows, m0, k, tiles * 128, ASSEMBLY), _settled(acc, ASSEMBLY))
        inside = (m < M)[None, :] & (rank < R)[:, None]
        tl.store(h + (split * M + m)[None, :] * R + rank[:, None], acc, mask=inside)
    else:
        # Rows of W in the order in which a load's registers are the operand's: (repeat, half, warp, lane).
        REPEATS: tl.constexpr = BLOCK_N // (16 * WARPS)
        index, lane = tl.arange(0, BLOCK_N), tl.arange(0, 4)[None, :]
        row = index // (16 * WARPS) * (16 * WARPS) + index // 8 % WARPS * 16
        row += index // (8 * WARPS) % 2 * 8 + index % 8
        row = tl.minimum(n0 + row, N - 1)[:, None] + 0 * lane
        minima = scales[0]
        if FORMAT == "int4":
            minima = scales[1]
        pointers = codes + row * (tiles * 16) + lane % 2 * 2, scales[0] + row * tiles, minima + row * tiles
        upper = _pairs(0 * row + lane // 2 * 4, 0 * row + lane // 2 * 4).to(tl.int32)
        # The weight depends on no earlier kernel. All of it goes to the L2 cache at once: what is on its way to
        # registers alone would keep but a fraction of the memory's bandwidth busy.
        if ASSEMBLY:
            n = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)[:, None]
            two = tl.arange(0, 2)[None, :]
            for tile in tl.range(first + UNROLL, last, 4):
                prefetch(codes + (n * tiles + tl.minimum(tile + 2 * two, last - 1)) * 16)
            prefetch(scales[0] + n * tiles + tl.where(two == 0, first, last - 1))
            if FORMAT == "int4":
                prefetch(scales[1] + n * tiles + tl.where(two == 0, first, last - 1))
        queue = ()
        for ahead in tl.static_range(UNROLL):
            queue = queue + (_fetch(pointers, tl.minimum(first + ahead, last - 1), FORMAT, ASSEMBLY),)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        for turn in tl.range(first, last, UNROLL, num_stages=STAGES):
            for u in tl.static_range(UNROLL):
                # Past the last tile stands that one again, and x is zero.
                tile = tl.minimum(turn + u, last - 1)
                k = tl.where(turn + u < last, tile, tiles) * 128
                words, raw, raw_minimum = queue[0]
                block = (row * tiles + tile) * 2 + first_block
                quads = ()
                for s in tl.static_range(4):
                    both = _pairs(words[2 * s], words[2 * s + 1])
                    quads = quads + (decode_quads(both, upper, DTYPE, FORMAT != "int4", ASSEMBLY),)
                following = tl.minimum(turn + u + UNROLL, last - 1)
                queue = queue[1:] + (_fetch(pointers, following, FORMAT, ASSEMBLY),)
                for half in tl.static_range(2):
                    runs = ()
                    for s in tl.static_range(4):
                        pair = ()
                        for i in tl.static_range(2):
                            number = 2 * half + i if FORMAT == "int4" else half
                            scale = _block_scale(scales, raw, block, number, FORMAT, DTYPE, ASSEMBLY)
                            minimum = half_float(raw_minimum, 16 * number) if FORMAT == "int4" else scale
                            value = quads[s][2 * half + i]
                            pair = pair + (_scaled(value, scale, minimum, DTYPE, FORMAT, ASSEMBLY),)
                        runs = runs + (tl.join(pair[0], pair[1]),)
                    weight = tl.join(tl.join(runs[0], runs[1]), tl.join(runs[2], runs[3]))
                    # columns (2 lane + l, i, s % 2, s // 2) to (i, s // 2, s % 2, 2 lane + l)
                    weight = weight.reshape(REPEATS, 2, WARPS, 8, 8, 2, 2, 2).permute(0, 2, 1, 3, 5, 7, 6, 4)
                    weight = weight.reshape(BLOCK_N, HALF_TILE)
                    x_tile = _x_tile(x, x_rows, m0, k + half * HALF_TILE, tiles * 128, ASSEMBLY)
                    acc = tl.dot(weight, x_tile, _settled(acc, ASSEMBLY))
        n = n0 + tl.arange(0, BLOCK_N)
        if bias is not None and not PARTIAL:
            acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
        y = acc.to(out.dtype.element_ty)
        tl.store(out + (split * M + m)[None, :] * N + n[:, None], y, mask=(m < M)[None, :] & (n < N)[:, None])


class TileConfig(NamedTuple):
    """How ``tiled_kernel`` divides the work. unroll: tiles a turn where K is not split, otherwise one; programs: how
    many fill the card (they split K); pdl as in ``Config``."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    unroll: int
    programs: int
    pdl: bool


def tile_plan(N, tiles, config):
    """Programs over N, tiles of K a program and splits of K, from N and K alone."""
    across = triton.cdiv(N, config.block_n)
    # the nearest number of splits, and two tiles of K at least a program, as in ``packed_matmul.plan``
    splits = min((2 * config.programs + across) // (2 * across), tiles // 2, MOST_SPLITS)
    steps = triton.cdiv(tiles, max(1, splits))
    return across, steps, triton.cdiv(tiles, steps)


def tiled_products(x, words, scales, bias, first_block, format, config, assembly=True, *, a=None):
    """As ``packed_products``: y, or partial sums (SPLIT, M, N); with a (R, K) also h (SPLIT, M, R)."""
    (M, K), N = x.shape, len(words)
    across, steps, split = tile_plan(N, K // TILE, config)
    out = x.new_empty(M, N) if split == 1 else x.new_empty(split, M, N, dtype=torch.float32)
    h, R = None, 0
    if a is not None:
        R = len(a)
        h = x.new_empty(split, M, R, dtype=torch.float32)
    source = TensorDescriptor.from_tensor(x, [config.block_m, HALF_TILE.value]) if assembly else x
    grid = across + triton.cdiv(R, config.block_n), triton.cdiv(M, config.block_m), split
    tiled_kernel[grid](
        source, aligned(words), per_tile_scales(scales, format), bias, out, a, h, M, N, R, across, K // TILE, steps,
        first_block, FORMAT=format, PARTIAL=split > 1, ASSEMBLY=assembly, PDL=config.pdl,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, WARPS=config.warps, STAGES=config.stages,
        UNROLL=config.unroll if split == 1 else 1,
        num_warps=config.warps, launch_pdl=config.pdl,
    )  # fmt: skip
    return out if a is None else (out, h)
