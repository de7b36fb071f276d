"""Two products in one, for Hopper: what a linear layer with adapters gives for many rows, and its gradient to x.

    y = x W^T + h B^T + bias                  dx = dy W + g A

The second product goes on where the first ends, in the same accumulators, so that the result is written once and not
read: ranks are a few more steps of K. A library would write the smaller product first and read it back.

One program a multiprocessor takes tiles of 128 x 128 in turn. A warp of its own brings both operands to shared memory
by the tensor memory accelerator, STAGES steps of 64 ahead and across the borders of tiles; two warp groups multiply.
Sums are float32 in one fixed order, so that a row's result depends on no other row, nor on how many there are.
Written in Gluon, which has no interpreter.
"""

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

from . import _runtime
from .warp_barriers import arrive, await_phase, group_barrier, make_empty, next_slot

BLOCK_M, BLOCK_N, STEP = 128, 128, 64
STAGES = 6
LEAST_ROWS, MOST_K = 768, 2  # rows of x; values of K for each of N: beyond, a library may be faster
BAND = 8  # row blocks that run side by side, so that programs share both operands in the L2 cache
MOST_PARTS = 3
REGISTERS, FETCH_REGISTERS = 168, 24  # of a thread at launch, which the fetching warp passes on; its own
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def _place(tile, row_blocks, col_blocks, BAND: gl.constexpr):
    """Row and column block of a tile: bands of BAND row blocks, and in each down the rows first."""
    first = tile // (BAND * col_blocks) * BAND
    height = gl.minimum(row_blocks - first, BAND)
    within = tile - first * col_blocks
    return first + within % height, within // height


@gluon.jit
def _fetch_w(w, n0, k, full, target, OF_ROWS: gl.constexpr):
    if OF_ROWS:
        tma.async_copy_global_to_shared(w, [n0, k], full, target)
    else:
        tma.async_copy_global_to_shared(w, [k, n0], full, target)


@gluon.jit
def _fetch(
    given, steps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr
):
    x, w, h, b, x_ring, w_ring, full, empty, row_blocks, col_blocks, base_steps, r, second, third = given
    OF_ROWS: gl.constexpr = w.block_shape[0] == BLOCK_N
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), row_blocks * col_blocks, gl.num_programs(0)):
        row_block, col_block = _place(tile, row_blocks, col_blocks, BAND)
        m0 = row_block * BLOCK_M
        n0 = col_block * BLOCK_N
        part = (n0 >= second).to(gl.int32) + (n0 >= third).to(gl.int32)
        for step in range(0, steps):
            await_phase(empty + 8 * slot, phase)
            mbarrier.expect(full.index(slot), (BLOCK_M + BLOCK_N) * 128)
            if step < base_steps:
                k = 64 * step
                tma.async_copy_global_to_shared(x, [m0, k], full.index(slot), x_ring.index(slot))
                _fetch_w(w, n0, k, full.index(slot), w_ring.index(slot), OF_ROWS)
            else:
                k = 64 * (step - base_steps)
                tma.async_copy_global_to_shared(h, [m0, part * r + k], full.index(slot), x_ring.index(slot))
                _fetch_w(b, n0, k, full.index(slot), w_ring.index(slot), OF_ROWS)
            slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _multiply(
    given, steps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr
):  # fmt: skip
    x_ring, w_ring, full, empty, row_blocks, col_blocks, out, out_tile, bias, N = given
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    OF_ROWS: gl.constexpr = w_ring.shape[1] == BLOCK_N
    acc = warpgroup_mma_init(gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACC))
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), row_blocks * col_blocks, gl.num_programs(0)):
        row_block, col_block = _place(tile, row_blocks, col_blocks, BAND)
        before = 0
        for step in range(0, steps):
            mbarrier.wait(full.index(slot), phase)
            w = w_ring.index(slot)
            if OF_ROWS:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x_ring.index(slot), w, acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
            arrive(empty + 8 * before, step > 0)
            before = slot
            slot, phase = next_slot(slot, phase, STAGES)
        y = warpgroup_mma_wait(0, deps=[acc])
        arrive(empty + 8 * before, steps > 0)
        acc = warpgroup_mma_init(y)
        if bias is not None:
            n = col_block * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, ACC))
            y += gl.load(bias + n, mask=n < N, other=0).to(gl.float32).expand_dims(0)
        tma.store_wait(0)
        out_tile.store(y.to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [row_block * BLOCK_M, col_block * BLOCK_N], out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "base_steps", "steps", "r", "second", "third"])
def hopper_linear_kernel(
    x, w, h, b, bias, out, M, N, base_steps, steps, r, second, third,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Descriptors of x (M, K), w (N, K) or (K, N), h (M, P r), b (N, r) or (r, N) and out (M, N); ``steps`` over both
    products, of which ``base_steps`` over K; the first outputs of parts 1 and 2."""
    row_blocks = gl.cdiv(M, BLOCK_M)
    col_blocks = gl.cdiv(N, BLOCK_N)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, 64], x.layout)
    w_ring = gl.allocate_shared_memory(x.dtype, [STAGES, w.block_shape[0], w.block_shape[1]], x.layout)
    out_tile = gl.allocate_shared_memory(x.dtype, [BLOCK_M, BLOCK_N], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    empty = make_empty(STAGES, 8)
    fence_async_shared()
    group_barrier(empty, 256)
    gl.warp_specialize([
        (_multiply, (
            (x_ring, w_ring, full, empty, row_blocks, col_blocks, out, out_tile, bias, N),
            steps, BLOCK_M, BLOCK_N, STAGES, BAND,
        )),
        (_fetch, (
            (x, w, h, b, x_ring, w_ring, full, empty, row_blocks, col_blocks, base_steps, r, second, third),
            steps, BLOCK_M, BLOCK_N, STAGES, BAND,
        )),
    ], [1], [FETCH_REGISTERS])  # fmt: skip


def fits(x, out, r, *operands, starts=(0,)):
    """Whether ``hopper_linear`` takes x (M, K), out (M, N) and ranks in parts of r, and beats a library.

    operands: those of w and b that exist already; h and what is made anew is taken to be contiguous. From
    ``LEAST_ROWS`` on the answer does not depend on M.
    """
    if _runtime.INTERPRET or not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    (M, K), N = x.shape, out.shape[1]
    if M < LEAST_ROWS or K > MOST_K * N or K % 8 or N % 8 or r % 8:
        return False
    if _runtime.arch(x.device) != 90 or len(starts) > MOST_PARTS or any(start % BLOCK_N for start in starts):
        return False
    return all(map(_describable, (x, out, *operands)))


def _describable(matrix):
    """Whether a tensor descriptor can hold it: rows contiguous and apart, from 16-byte boundaries."""
    apart = matrix.stride(0) % 8 == 0 and matrix.stride(0) >= matrix.shape[1]
    return apart and matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0


def _described(matrix, *block):
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block), LAYOUT)


def hopper_linear(x, w, h, b, out, bias=None, starts=(0,), by_rows=True):
    """Write x (M, K) w^T + h b^T + bias (N,) to out (M, N): 16-bit operands that ``fits`` takes.

    by_rows: w (N, K) and b (N, r); h (M, P r) has the ranks of P parts side by side, and part p owns the outputs from
    starts[p] on, a multiple of 128. Where r is no multiple of 64 the ranks of the next part meet zeros: a value of h
    that is not finite spoils that part, too. Otherwise w (K, N) and b (r, N) with h (M, r), one part.
    """
    (M, K), N, r = x.shape, out.shape[1], b.shape[1 if by_rows else 0]
    base_steps = triton.cdiv(K, STEP)
    second, third = (*starts[1:], N, N)[:2]
    block = (BLOCK_N, STEP) if by_rows else (STEP, BLOCK_N)
    tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    with _runtime.launch_on(x):
        hopper_linear_kernel[(min(tiles, _runtime.processors(x.device)),)](
            _described(x, BLOCK_M, STEP), _described(w, *block), _described(h, BLOCK_M, STEP), _described(b, *block),
            bias, _described(out, BLOCK_M, BLOCK_N), M, N, base_steps, base_steps + triton.cdiv(r, STEP), r, second,
            third, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, STAGES=STAGES, BAND=BAND, FETCH_REGISTERS=FETCH_REGISTERS,
            num_warps=8, maxnreg=REGISTERS,
        )  # fmt: skip
    return out
