"""x (M, K) @ W.T on packed 4-bit codes for Hopper: one warp fetches, warp groups decode and multiply.

A program takes 64 UNITS rows of W and BLOCK_M rows of x. A warp of its own brings codes and x to shared memory by the
tensor memory accelerator, STAGES tiles of 128 elements of K ahead, so that nothing but arithmetic is left to the
others. Each warp group decodes its 64 rows of W to registers, from which the tensor cores take them (out^T = W @
x^T), half a tile while the product of the half before still runs. (With more than one group ptxas 12.8 makes a group
wait for each of its products.) All groups share x: from 64 rows of x on, what bounds a tile is bringing (4096 UNITS +
256 BLOCK_M) bytes of it from the L2 cache to a multiprocessor.

Arithmetic and order of sums are those of ``tiled_matmul``, bit for bit where K is split alike, and so are partial
sums and what a row's result depends on. That kernel is what Triton's interpreter can run; this one is written in
Gluon, which sees registers, barriers and warps, and has no interpreter.

ptxas before CUDA 13.3 gives away registers of a running product. Here every product's operand is named in the wait
that ends it, and what is written to the same registers next is computed from values that pass through that wait.
"""

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .code_words import aligned
from .packed_codes import TILE
from .packed_matmul import per_tile_scales
from .tiled_matmul import MOST_SPLITS
from .warp_barriers import arrive, await_phase, group_barrier, make_empty, next_slot
from .warp_group_weights import ROWS, WORDS, U, decoded, fill_table, lane_table, operand

PROCESSORS = 132  # multiprocessors that the plans below fill
LEAST_VALUES = 1 << 23  # of W: with fewer, a program's start costs more than it gains
# By UNITS: registers of a thread at launch, those of a warp group behind the first, which takes what is left, and
# programs that then fit on a multiprocessor.
REGISTERS = {1: (128, None, 2), 2: (168, 240, 1), 3: (128, 160, 1), 4: (96, 112, 1)}
TILE_MICROSECONDS, BYTES_A_MICROSECOND = {2: 1.09, 3: 1.55}, 4e6  # with 128 rows of x, measured on an H200
FETCH_REGISTERS = gl.constexpr(24)
TABLE_KB, MOST_STAGES = 34, 8  # the table, barriers and what CUDA keeps for itself

_PREFETCH = gl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
CODES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32, rank=2)
X_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def _prefetch(at):
    gl.inline_asm_elementwise(_PREFETCH, "=r,l", [at.to(gl.int64)], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _raw_scales(scale_rows, minimum_rows, tile, last, FORMAT: gl.constexpr):
    """A tile's scales, and int4's minima, of each row as an integer; from the last tile on, that one's."""
    tile = gl.minimum(tile, last - 1)
    raw = gl.load(scale_rows + tile)
    raw_minimum = raw
    if FORMAT == "int4":
        raw_minimum = gl.load(minimum_rows + tile)
    return raw, raw_minimum


@gluon.jit
def _fetch_codes(codes, codes_ring, full, n0, tile, slot, UNITS: gl.constexpr):
    for unit in gl.static_range(UNITS):
        tma.async_copy_global_to_shared(
            codes, [n0 + 64 * unit, tile * 16], full.index(slot), codes_ring.index(slot * UNITS + unit)
        )


@gluon.jit
def _fetch_x(x, x_ring, full, m0, tile, slot):
    for half in gl.static_range(2):
        at = [m0, tile * 128 + 64 * half]
        tma.async_copy_global_to_shared(x, at, full.index(slot), x_ring.index(2 * slot + half))


@gluon.jit
def _fetch(
    to_fetch,
    PDL: gl.constexpr, BLOCK_M: gl.constexpr, UNITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What the fetching warp does: codes and x of a tile as slots fall empty."""
    x, codes, x_ring, codes_ring, full, empty, n0, m0, first, last = to_fetch
    BYTES: gl.constexpr = 4096 * UNITS + 256 * BLOCK_M
    # The weight depends on no earlier kernel.
    for ahead in gl.static_range(STAGES):
        if first + ahead < last:
            mbarrier.expect(full.index(ahead), BYTES)
            _fetch_codes(codes, codes_ring, full, n0, first + ahead, ahead, UNITS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for ahead in gl.static_range(STAGES):
        if first + ahead < last:
            _fetch_x(x, x_ring, full, m0, first + ahead, ahead)
    slot = 0
    phase = 0
    for tile in range(first + STAGES, last):
        await_phase(empty + 8 * slot, phase)
        mbarrier.expect(full.index(slot), BYTES)
        _fetch_codes(codes, codes_ring, full, n0, tile, slot, UNITS)
        _fetch_x(x, x_ring, full, m0, tile, slot)
        slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _multiply(
    given, UNIT: gl.constexpr,
    FORMAT: gl.constexpr, PARTIAL: gl.constexpr, PDL: gl.constexpr,
    BLOCK_M: gl.constexpr, UNITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What warp group UNIT of a program does: 64 of its columns."""
    x_ring, codes_ring, full, empty, table, scales, bias, out, M, N, tiles, first_block = given[:12]
    n0, m0, first, last, split = given[12:]
    DTYPE: gl.constexpr = x_ring.dtype
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    n0 += 64 * UNIT
    row = gl.minimum(n0 + gl.arange(0, 64, ROWS), N - 1).to(gl.int64)
    scale_rows = scales[0] + row * tiles
    minimum_rows = scale_rows
    if FORMAT == "int4":
        minimum_rows = scales[1] + row * tiles
    if FORMAT != "int4":
        table = lane_table(table)
    upper = 4 * gl.arange(0, 2, U).expand_dims(0).expand_dims(2)
    # Scales come two tiles ahead from the L2 cache, to which all of them go at once.
    for tile in range(first, last, 16):
        _prefetch(scale_rows + tile)
        if FORMAT == "int4":
            _prefetch(minimum_rows + tile)
    raw, raw_minimum = _raw_scales(scale_rows, minimum_rows, first, last, FORMAT)
    next_raw, next_minimum = _raw_scales(scale_rows, minimum_rows, first + 1, last, FORMAT)
    acc = warpgroup_mma_init(gl.zeros([64, BLOCK_M], gl.float32, ACC))
    even = gl.zeros([64, 64], DTYPE, OPERAND)
    odd = gl.zeros([64, 64], DTYPE, OPERAND)
    slot = 0
    phase = 0
    before = 0
    for tile in range(first, last):
        later_raw, later_minimum = _raw_scales(scale_rows, minimum_rows, tile + 2, last, FORMAT)
        block = (row * tiles + tile) * 2 + first_block
        mbarrier.wait(full.index(slot), phase)
        words = codes_ring.index(slot * UNITS + UNIT).load(gl.SliceLayout(1, WORDS)).expand_dims(1)
        words, upper_of = gl.broadcast(words, upper)
        value = decoded(words, upper_of, table + 0 * upper_of, FORMAT, DTYPE)
        # One product may still run, the other operand's.
        acc, even, v0, v1 = warpgroup_mma_wait(1, deps=[acc, even, value[0], value[1]])
        even = operand(v0, v1, scales, raw, raw_minimum, block, 0, FORMAT, OPERAND)
        acc = warpgroup_mma(even, x_ring.index(2 * slot).permute((1, 0)), acc, is_async=True)
        acc, odd, v2, v3 = warpgroup_mma_wait(1, deps=[acc, odd, value[2], value[3]])
        arrive(empty + 8 * before, tile > first)
        odd = operand(v2, v3, scales, raw, raw_minimum, block, 1, FORMAT, OPERAND)
        acc = warpgroup_mma(odd, x_ring.index(2 * slot + 1).permute((1, 0)), acc, is_async=True)
        raw, raw_minimum = next_raw, next_minimum
        next_raw, next_minimum = later_raw, later_minimum
        before = slot
        slot, phase = next_slot(slot, phase, STAGES)
    acc, even, odd = warpgroup_mma_wait(0, deps=[acc, even, odd])
    if PDL:
        gdc_wait()
    n = n0 + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, ACC))
    if bias is not None and not PARTIAL:
        acc += gl.load(bias + n, mask=n < N, other=0).to(gl.float32).expand_dims(1)
    out += (split.to(gl.int64) * M + m0) * N
    inside = (m < M - m0).expand_dims(0) & (n < N).expand_dims(1)
    gl.store(out + (m.expand_dims(0) * N + n.expand_dims(1)), acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["M", "tiles", "steps", "first_block"])
def hopper_kernel(
    x, codes, scales, bias, out, M, N, tiles, steps, first_block,
    FORMAT: gl.constexpr, PARTIAL: gl.constexpr, PDL: gl.constexpr,
    BLOCK_M: gl.constexpr, UNITS: gl.constexpr, STAGES: gl.constexpr, GROUP_REGISTERS: gl.constexpr,
):  # fmt: skip
    """64 UNITS columns of x @ W.T over ``steps`` tiles of K: ``out`` (M, N) with bias or partial sums (SPLIT, M, N).

    x, codes: descriptors of (M, 128 tiles) and of int32 (N, 16 tiles); scales as those of ``packed_kernel``.
    """
    n0 = gl.program_id(0) * (64 * UNITS)
    m0 = gl.program_id(1) * BLOCK_M
    split = gl.program_id(2)
    first = split * steps
    last = gl.minimum(first + steps, tiles)
    x_ring = gl.allocate_shared_memory(x.dtype, [2 * STAGES, BLOCK_M, 64], x.layout)
    codes_ring = gl.allocate_shared_memory(gl.int32, [STAGES * UNITS, 64, 16], codes.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    empty = make_empty(STAGES, 4 * UNITS)  # every warp that reads
    fence_async_shared()
    table = 0
    if FORMAT != "int4":
        table = fill_table(x.dtype)
    table = group_barrier(table, 128)
    given = (
        x_ring, codes_ring, full, empty, table, scales, bias, out, M, N, tiles, first_block, n0, m0, first, last,
        split,
    )  # fmt: skip
    to_fetch = (x, codes, x_ring, codes_ring, full, empty, n0, m0, first, last)
    # One list of partitions for each number of groups: a variable would not keep what is constant.
    G: gl.constexpr = GROUP_REGISTERS
    if UNITS == 1:
        gl.warp_specialize([
            (_multiply, (given, 0, FORMAT, PARTIAL, PDL, BLOCK_M, UNITS, STAGES)),
            (_fetch, (to_fetch, PDL, BLOCK_M, UNITS, STAGES)),
        ], [1], [FETCH_REGISTERS])  # fmt: skip
    elif UNITS == 2:
        gl.warp_specialize([
            (_multiply, (given, 0, FORMAT, PARTIAL, PDL, BLOCK_M, UNITS, STAGES)),
            (_multiply, (given, 1, FORMAT, PARTIAL, PDL, BLOCK_M, UNITS, STAGES)),
            (_fetch, (to_fetch, PDL, BLOCK_M, UNITS, STAGES)),
        ], [4, 1], [G, FETCH_REGISTERS])  # fmt: skip
    elif UNITS == 3:
        gl.warp_specialize([
            (_multiply, (given, 0, FORMAT, PARTIAL, PDL, BLOCK_M, UNITS, STAGES)),
            (_multiply, (given, 1, FORMAT, PARTIAL, PDL, BLOCK_M, UNITS, STAGES)),
            (_multiply, (given, 2, FORMAT, PARTIAL, PDL, BLOCK_M, UNITS, STAGES)),
            (_fetch, (to_fetch, PDL, BLOCK_M, UNITS, STAGES)),
        ], [4, 4, 1], [G, G, FETCH_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (given, 0, FORMAT, PARTIAL, PDL, BLOCK_M, UNITS, STAGES)),
            (_multiply, (given, 1, FORMAT, PARTIAL, PDL, BLOCK_M, UNITS, STAGES)),
            (_multiply, (given, 2, FORMAT, PARTIAL, PDL, BLOCK_M, UNITS, STAGES)),
            (_multiply, (given, 3, FORMAT, PARTIAL, PDL, BLOCK_M, UNITS, STAGES)),
            (_fetch, (to_fetch, PDL, BLOCK_M, UNITS, STAGES)),
        ], [4, 4, 4, 1], [G, G, G, FETCH_REGISTERS])  # fmt: skip


class HopperConfig(NamedTuple):
    """How ``hopper_kernel`` divides the work: BLOCK_M, UNITS and splits of K; pdl as in ``packed_matmul.Config``."""

    block_m: int
    units: int
    splits: int
    pdl: bool


def hopper_config(N, K, rows):
    """The configuration for up to ``rows`` (16, 32, 64, 128 or 256) rows of x, from N and K alone.

    None where ``tiled_matmul``, or for 16 rows ``packed_matmul``, is as fast.
    """
    groups, tiles = triton.cdiv(N, 64), K // TILE
    if N * K < LEAST_VALUES or (rows != 64 and tiles < 16):
        return None
    most = min(MOST_SPLITS, tiles // 2)  # two tiles of K at least a program
    if rows <= 64:
        for units in (3, 4):
            # all programs at once and most of the card: every x that comes to a multiprocessor serves many columns
            if 0.7 * PROCESSORS <= triton.cdiv(groups, units) <= PROCESSORS:
                return HopperConfig(rows, units, 1, True)
        return HopperConfig(rows, 1, max(1, min(2 * PROCESSORS // groups, most)), True)

    def planned(units):
        """Microseconds, units and splits."""
        programs = triton.cdiv(groups, units) * (rows // 128)
        splits = max(1, min(PROCESSORS // programs, most))
        turns = triton.cdiv(programs * splits, PROCESSORS) * triton.cdiv(tiles, splits)
        partial = 8 * splits * rows * N / BYTES_A_MICROSECOND  # sums, written and read
        return turns * TILE_MICROSECONDS[units] + partial, units, splits

    _, units, splits = min(map(planned, TILE_MICROSECONDS))
    return HopperConfig(128, units, splits, True)


def stages_of(block_m, units):
    """Tiles that shared memory holds; two at least, since a tile is let go of when the next one's products begin."""
    stages = (227 // REGISTERS[units][2] - TABLE_KB) // (4 * units + block_m // 4)
    return min(MOST_STAGES, stages)


def hopper_products(x, words, scales, bias, first_block, format, config):
    """As ``packed_products``, without an update."""
    (M, K), N = x.shape, len(words)
    block_m, units, splits, pdl = config
    steps = triton.cdiv(K // TILE, splits)
    split = triton.cdiv(K // TILE, steps)
    out = x.new_empty(M, N) if split == 1 else x.new_empty(split, M, N, dtype=torch.float32)
    registers, of_group, _ = REGISTERS[units]
    stages = stages_of(block_m, units)
    hopper_kernel[(triton.cdiv(N, 64 * units), triton.cdiv(M, block_m), split)](
        TensorDescriptor(x, [M, K], [K, 1], [block_m, 64], X_LAYOUT),  # one row may have any stride
        TensorDescriptor.from_tensor(aligned(words), [64, 16], CODES_LAYOUT),
        per_tile_scales(scales, format), bias, out, M, N, K // TILE, steps, first_block,
        FORMAT=format, PARTIAL=split > 1, PDL=pdl, BLOCK_M=block_m, UNITS=units, STAGES=stages,
        GROUP_REGISTERS=of_group, num_warps=4, launch_pdl=pdl, maxnreg=registers,
    )  # fmt: skip
    return out
