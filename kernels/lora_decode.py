"""The low-rank adapters of a few rows, in two launches: ``y += scaling * (x A^T) B^T``, in place.

    h = x A^T                          x (M, K), A (R, K), h (M, R): the ranks of all adapters that share x
    y[:, part p] += scaling * h_p B_p^T        B (rows, r): the rows of all parts, one part after the other

A and B are read where they lie, in their own dtype (float32 as they are trained): an optimiser step needs no copy,
and a captured graph stays valid. Bytes: A and B once for each 32 rows, x, y twice, and S M R float32 partial sums of
h written and read, where S <= ``MAX_SPLITS`` parts of K depend on K alone. FLOPs: 2 M (K R + N r).

Precision: A and B are rounded to x's dtype, sums are float32 in a fixed order, h is rounded to x's dtype once; the
update is added in float32 to the rounded y. A row's result does not depend on the other rows.
"""

import torch
import triton
import triton.language as tl

from . import _runtime

MAX_ROWS = 64  # more rows than that are a library's work
MAX_SPLITS = 16
# Rows are the dot's left operand in tiles of 16 or 32: below 64, Hopper uses mma.sync instead of WGMMA. One table for
# all cards: (BLOCK_K, BLOCK_R, num_warps, num_stages) of h and (BLOCK_N, num_warps) of the update.
DOWN = (128, 16, 4, 3)
UP = (64, 4)


@triton.jit
def _down_kernel(
    x, a, partial, M, K, R, steps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr
):
    """partial (S, M, R) float32: x (M, K) @ a (R, K)^T, each split over its own ``steps`` blocks of K."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    rank = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for step in range(split * steps, split * steps + steps):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x_mask = (row < M)[:, None] & (k < K)[None, :]
        tile = tl.load(x + row[:, None] * K + k[None, :], mask=x_mask, other=0.0)
        a_mask = (rank < R)[:, None] & (k < K)[None, :]
        weight = tl.load(a + rank.to(tl.int64)[:, None] * K + k[None, :], mask=a_mask, other=0.0)
        acc = tl.dot(tile, tl.trans(weight.to(tile.dtype)), acc, input_precision="ieee")
    out = partial + (split.to(tl.int64) * M + row[:, None]) * R + rank[None, :]
    tl.store(out, acc, mask=(row < M)[:, None] & (rank < R)[None, :])


@triton.jit
def _up_kernel(
    partial, b, y, scaling, M, N, R, r, columns,
    SPLITS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (M, N) += scaling * h_p @ b_p^T on the columns of each part; ``columns`` is (start, stop) of each in turn."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    # A tile of columns belongs to one part: find it, its first column and its first row of b.
    part, column, stop, b_row = 0, 0, 0, 0
    first_tile, first_row = 0, 0
    for p in tl.static_range(len(columns) // 2):
        size = columns[2 * p + 1] - columns[2 * p]
        if tile >= first_tile:
            part, stop = p, columns[2 * p + 1]
            column = columns[2 * p] + (tile - first_tile) * BLOCK_N
            b_row = first_row + (tile - first_tile) * BLOCK_N
        first_tile += tl.cdiv(size, BLOCK_N)
        first_row += size
    n, rank = column + tl.arange(0, BLOCK_N), tl.arange(0, RANK)
    dtype = y.dtype.element_ty
    b_at = b + (b_row + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None] * r + rank[None, :]
    weight = tl.load(b_at, mask=(n < stop)[:, None] & (rank < r)[None, :], other=0.0)
    mask = (row < M)[:, None] & (n < stop)[None, :]
    target = y + row[:, None] * N + n[None, :]
    base = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    h_at = partial + row[:, None] * R + (part * r + rank)[None, :]
    h_mask = (row < M)[:, None] & (rank < r)[None, :]
    h = tl.zeros((BLOCK_M, RANK), tl.float32)
    for split in tl.static_range(SPLITS):
        h += tl.load(h_at + tl.cast(split, tl.int64) * M * R, mask=h_mask, other=0.0)
    delta = tl.dot(h.to(dtype), tl.trans(weight.to(dtype)), input_precision="ieee")
    tl.store(target, (base + scaling * delta).to(dtype), mask=mask)


def add_adapters(y, x, a, b, columns, scaling):
    """y (M, N) += scaling * (x (M, K) a^T) b^T, in place, on the columns of each part; all contiguous.

    a: (P r, K) and b: (rows, r), the parts' own one after the other; columns: start and stop of each part in y.
    """
    (M, K), N, R, r = x.shape, y.shape[1], len(a), b.shape[1]
    block_m = 16 if M <= 16 else 32
    block_k, block_r, warps, stages = DOWN
    blocks = triton.cdiv(K, block_k)
    steps = triton.cdiv(blocks, MAX_SPLITS)
    splits, row_tiles = triton.cdiv(blocks, steps), triton.cdiv(M, block_m)
    partial = torch.empty(splits, M, R, dtype=torch.float32, device=x.device)
    with _runtime.launch_on(x):
        _down_kernel[(row_tiles, splits, triton.cdiv(R, block_r))](
            x, a, partial, M, K, R, steps,
            BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        block_n, warps = UP
        tiles = sum(
            triton.cdiv(stop - start, block_n)
            for start, stop in zip(columns[::2], columns[1::2], strict=True)
        )
        _up_kernel[(row_tiles, tiles)](
            partial, b, y, scaling, M, N, R, r, tuple(columns), SPLITS=splits,
            RANK=max(16, triton.next_power_of_2(r)), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
        )  # fmt: skip
    return y
