"""x (M, K) @ W.T on packed 4-bit codes (``packed_codes``) and 16-bit x: tensor cores fed from registers alone.

A warp takes 16 ROWS rows of W and 8 COLUMNS of x. Codes and x go from global memory straight to the registers of the
lane that multiplies them: no shared memory and no barrier inside the loop; codes are loaded DEPTH tiles ahead. The
WARPS warps of a program take as many groups of rows of W (OVER_N), or every WARPS-th tile of K of the same rows,
summed at the end; K is split further, over programs, where N alone does not fill the card.

For each block b of scales in a tile of 128 elements of K

    nf4    acc += (GAIN code_book[codes] @ x_b) * (scale_b / GAIN)
    int4   acc += ((16 + codes) @ x_b) * scale_b + sum(x_b) * (minimum_b - 16 scale_b)

where the products, and sum(x_b) as a product with ones, take 16-bit inputs to float32 sums; scales are float32. int4
weights are never rounded; nf4's err as ``packed_codes`` states. Bytes: N*K/2 codes and the scales once, x once for
each group of rows (through the caches), SPLIT*M*N*4 twice for partial sums where K is split. FLOPs: 2*M*N*K.
A row's result depends on that row and the configuration alone, COLUMNS and DEPTH excepted, which change no bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .code_words import aligned
from .dependent_launch import prefetch
from .packed_codes import TILE, UNGAIN_BF16, UNGAIN_FP16, decode_packed

# Loads are tiles of two dimensions, columns in runs and rows (half or group, warp, lane): four lanes to a row, so
# eight rows fill a warp, the next eight the next warp, and what is left over goes to registers. Tensor cores want the
# same lanes, so the operands below are but other names of the same registers.


@triton.jit
def weight_operand(value, WARPS: tl.constexpr):
    """(2 * WARPS * 8, 16) -> (WARPS, 16, 16): lane t's four words are columns 2t, 2t+1, 2t+8, 2t+9."""
    return value.reshape(2, WARPS, 8, 4, 2, 2).permute(1, 0, 2, 4, 3, 5).reshape(WARPS, 16, 16)


@triton.jit
def _x_operands(value, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """(COLUMNS * WARPS * 8, 32) -> two of (WARPS, 16, 8 COLUMNS), with K in the order of ``weight_operand``."""
    runs = value.reshape(COLUMNS, WARPS, 8, 4, 2, 2, 2).permute(1, 5, 3, 6, 0, 2, 4)
    return tl.split(runs.reshape(WARPS, 16, 8 * COLUMNS, 2))


@triton.jit
def x_operand(value, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """(COLUMNS * WARPS * 8, 16) -> (WARPS, 16, 8 COLUMNS), with K in the order of ``weight_operand``."""
    runs = value.reshape(COLUMNS, WARPS, 8, 4, 2, 2).permute(1, 4, 3, 5, 0, 2)
    return runs.reshape(WARPS, 16, 8 * COLUMNS)


@triton.jit
def half_float(bits, SHIFT: tl.constexpr):
    return (bits >> SHIFT).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_tile(pointers, tile, tile_of_row, tiles, FORMAT: tl.constexpr, ROWS: tl.constexpr):
    """A tile's words and, as one integer a row, its block scales (and int4's minima); zeros past the end of K."""
    codes, scales, minima = pointers
    loaded = ()
    exists, exists_of_row = tile < tiles, tile_of_row < tiles
    for r in tl.static_range(ROWS):
        words = tl.load(codes[r] + tile * 16, mask=exists, other=0, eviction_policy="evict_first")
        scale = tl.load(scales[r] + tile_of_row, mask=exists_of_row, other=0)
        minimum = scale
        if FORMAT == "int4":
            minimum = tl.load(minima[r] + tile_of_row, mask=exists_of_row, other=0)
        loaded = loaded + ((words, scale, minimum),)
    return loaded


@triton.jit
def block_scale_of(scales, raw, block, exists, B: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The float32 scale of block B of a row's tile, by which a decoded product is multiplied."""
    UNGAIN: tl.constexpr = UNGAIN_BF16 if DTYPE == tl.bfloat16 else UNGAIN_FP16
    if FORMAT == "int4":
        scale = half_float(raw, 16 * B)
    elif FORMAT == "nf4":
        scale = (raw >> (32 * B)).to(tl.int32).to(tl.float32, bitcast=True) * UNGAIN
    else:
        group = tl.load(scales[2] + (block + B) // 256)
        code = ((raw >> (8 * B)) & 255).to(tl.int32)
        scale = (tl.load(scales[3] + code) * group + tl.load(scales[4])) * UNGAIN
        scale = tl.where(exists, scale, 0)
    return scale


@triton.jit
def part_of(n, columns):
    """The part that each output n belongs to, -1 for none, and its row among those of all parts' B."""
    part, row, first_row = tl.full(n.shape, -1, tl.int32), 0 * n, 0
    for p in tl.static_range(len(columns) // 2):
        inside = (n >= columns[2 * p]) & (n < columns[2 * p + 1])
        part = tl.where(inside, p, part)
        row = tl.where(inside, n - columns[2 * p] + first_row, row)
        first_row += columns[2 * p + 1] - columns[2 * p]
    return part, row


@triton.jit
def _update(
    sums, h, b, scaling, columns, n0, b_rows, part_of, m, M, R, r,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``sums`` (WARPS, 16, 8 COLUMNS) of outputs n0 to n0 + 16 with the adapters' part, whose ranks warps share."""
    warp = tl.arange(0, 8 * WARPS * COLUMNS)[:, None] // 8 % WARPS
    rank = 16 * warp + tl.arange(0, 16)[None, :]
    for p in tl.static_range(len(columns) // 2):
        if (n0 < columns[2 * p + 1]) & (n0 + 16 > columns[2 * p]):
            delta = tl.zeros((WARPS, 16, 8 * COLUMNS), tl.float32)
            for k in tl.static_range(0, RANK, 16 * WARPS):
                value = tl.zeros((8 * WARPS * COLUMNS, 16), tl.float32)
                for split in tl.static_range(SPLITS):
                    at = h + (split * M + m).to(tl.int64) * R + (p * r + k) + rank
                    value += tl.load(at, mask=rank + k < r, other=0.0)
                weight = tl.where(part_of == p, b_rows[k // (16 * WARPS)], 0.0).to(DTYPE)
                operand = x_operand(value.to(DTYPE), WARPS, COLUMNS)
                delta = tl.dot(weight_operand(weight, WARPS), operand, delta)
            sums += scaling * delta
    return sums


@triton.jit(do_not_specialize=["M", "tiles", "steps", "first_block"])
def packed_kernel(
    x, codes, scales, bias, out, h, b, residual, scaling, columns, M, N, R, r, tiles, steps, first_block,
    FORMAT: tl.constexpr, PARTIAL: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr, LATE: tl.constexpr,
    OVER_N: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    SPLITS: tl.constexpr, RANK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """16 ROWS (OVER_N: times WARPS) columns of x @ W.T, to ``out`` (M, N) with bias or to partial sums (SPLIT, M, N).

    x (M, 128 tiles), codes int32 (N, 16 tiles), scales[0] (and int4's scales[1]) one integer a tile: (N, tiles). A
    warp takes ``steps`` tiles of K. LATE: the kernel before has promised that x is complete; wait for its own output
    alone. That is h, where b (rows, r) is given: partial sums (SPLITS, M, R) of the adapters' ranks. GATED: ROWS is
    2, the second is N/2 further, and ``out`` (M, N/2) = silu(first) * second.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    NF4: tl.constexpr = FORMAT != "int4"
    PER_BLOCK: tl.constexpr = 4 if NF4 else 2
    index, x_index = tl.arange(0, 16 * WARPS)[:, None], tl.arange(0, 8 * WARPS * COLUMNS)[:, None]
    warp, x_warp = index // 8 % WARPS, x_index // 8 % WARPS
    load_row = index // (8 * WARPS) * 8 + index % 8
    word, element = tl.arange(0, 16)[None, :], tl.arange(0, 32)[None, :]
    # The same rows and tiles as the accumulator counts them.
    warp_of_row, row_of_tile = tl.arange(0, WARPS)[:, None], tl.arange(0, 16)[None, :]
    OVER: tl.constexpr = WARPS if OVER_N else 1
    STRIDE: tl.constexpr = 1 if OVER_N else WARPS
    apart = 16
    if GATED:
        apart = N // 2
    row0 = tl.program_id(0).to(tl.int64) * (16 if GATED else 16 * ROWS * OVER)
    first = tl.program_id(2) * steps * STRIDE
    tile, x_tile, tile_of_row = first + 0 * warp, first + 0 * x_warp, first + 0 * warp_of_row
    load_row0, sum_row0 = row0 + 0 * warp, row0 + 0 * warp_of_row
    if OVER_N:
        load_row0 += warp * (16 * ROWS)
        sum_row0 += warp_of_row * (16 * ROWS)
    else:
        tile += warp
        x_tile += x_warp
        tile_of_row += warp_of_row
    code_rows, code_begins, scale_rows, minimum_rows, block_rows, acc = (), (), (), (), (), ()
    for g in tl.static_range(ROWS):
        row = tl.minimum(load_row0 + apart * g + load_row, N - 1)
        code_rows = code_rows + (codes + row * tiles * 16 + word,)
        row = tl.minimum(sum_row0 + apart * g + row_of_tile, N - 1) * tiles
        code_begins = code_begins + (codes + row * 16,)
        scale_rows = scale_rows + (scales[0] + row,)
        if FORMAT == "int4":
            minimum_rows = minimum_rows + (scales[1] + row,)
        block_rows = block_rows + (row * 2 + first_block,)
        acc = acc + (tl.zeros((WARPS, 16, 8 * COLUMNS), tl.float32),)
    pointers = (code_rows, scale_rows, minimum_rows)
    m0 = tl.program_id(1) * (8 * COLUMNS)
    # Rows past M are copies of the last and not stored; tiles past K have codes and scales of zero.
    m = tl.minimum(m0 + x_index // (8 * WARPS) * 8 + x_index % 8, M - 1)
    x_rows = x + m.to(tl.int64) * (tiles * 128) + element
    ones = tl.full((WARPS, 16, 16), 1.0, DTYPE)
    if PDL and not LATE:
        tl.extra.cuda.gdc_launch_dependents()
        # The weight depends on no earlier kernel: its first tiles go to the L2 cache while the last one ends.
        for g in tl.static_range(ROWS):
            for ahead in tl.static_range(DEPTH + 1):
                prefetch(code_begins[g] + tl.minimum(tile_of_row + ahead * STRIDE, tiles - 1) * 16)
        tl.extra.cuda.gdc_wait()
    b_rows, parts = (), ()
    if b is not None:
        for g in tl.static_range(ROWS):
            part, b_row = part_of(row0 + apart * g + load_row, columns)
            loaded = ()
            for k in tl.static_range(0, RANK, 16 * WARPS):
                rank = 16 * warp + word + k
                # four values a lane, as of words: a wider load of b would change the layout of both
                place = tl.max_contiguous(b_row * r + rank, (1, 4))
                loaded = loaded + (tl.load(b + place, mask=(part >= 0) & (rank < r), other=0.0),)
            b_rows, parts = b_rows + (loaded,), parts + (part,)
    queue = ()
    for ahead in tl.static_range(DEPTH):
        queue = queue + (
            _load_tile(pointers, tile + ahead * STRIDE, tile_of_row + ahead * STRIDE, tiles, FORMAT, ROWS),
        )
    for _ in range(steps):
        current = queue[0]
        last = _load_tile(pointers, tile + DEPTH * STRIDE, tile_of_row + DEPTH * STRIDE, tiles, FORMAT, ROWS)
        queue = queue[1:] + (last,)
        x_tiles = x_rows + tl.minimum(x_tile, tiles - 1) * 128
        for half in tl.static_range(2):
            values = ()
            for g in tl.static_range(ROWS):
                values = values + (decode_packed(current[g][0], half, DTYPE, NF4, ASSEMBLY),)
            for block in tl.static_range(4 // PER_BLOCK):
                products = ()
                for _row in tl.static_range(ROWS):
                    products = products + (tl.zeros((WARPS, 16, 8 * COLUMNS), tl.float32),)
                total = tl.zeros((WARPS, 16, 8 * COLUMNS), tl.float32)
                for pair in tl.static_range(block * PER_BLOCK, (block + 1) * PER_BLOCK, 2):
                    x_pair = _x_operands(tl.load(x_tiles + 32 * (2 * half + pair // 2)), WARPS, COLUMNS)
                    for i in tl.static_range(2):
                        added = ()
                        for g in tl.static_range(ROWS):
                            value = weight_operand(values[g][pair + i], WARPS)
                            added = added + (tl.dot(value, x_pair[i], products[g]),)
                        products = added
                        if not NF4:
                            total = tl.dot(ones, x_pair[i], total)
                added = ()
                for g in tl.static_range(ROWS):
                    at = block_rows[g] + 2 * tl.minimum(tile_of_row, tiles - 1)
                    exists, number = tile_of_row < tiles, half * (4 // PER_BLOCK) + block
                    scale = block_scale_of(scales, current[g][1], at, exists, number, FORMAT, DTYPE)
                    sums = acc[g] + products[g] * scale[:, :, None]
                    if not NF4:
                        sums += total * (half_float(current[g][2], 16 * number) - 16 * scale)[:, :, None]
                    added = added + (sums,)
                acc = added
        tile += STRIDE
        x_tile += STRIDE
        tile_of_row += STRIDE
    if PDL and LATE:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    column, split = m0 + tl.arange(0, 8 * COLUMNS), tl.program_id(2).to(tl.int64)
    if OVER_N:
        target = ((split * M + column) * N)[None, None, :]
        for g in tl.static_range(ROWS):
            y, n = acc[g], (sum_row0 + 16 * g + row_of_tile)[:, :, None]
            if bias is not None and not PARTIAL:
                y += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
            inside = (n < N) & (column < M)[None, None, :]
            tl.store(out + target + n, y.to(out.dtype.element_ty), mask=inside)
    else:
        WIDTH = N // 2 if GATED else N
        target, results = ((split * M + column) * WIDTH)[None, :], ()
        for g in tl.static_range(ROWS):
            n, sums = (row0 + apart * g + tl.arange(0, 16))[:, None], acc[g]
            if b is not None:
                sums = _update(
                    sums, h, b, scaling, columns, row0 + apart * g, b_rows[g], parts[g], m, M, R, r,
                    WARPS, COLUMNS, RANK, SPLITS, DTYPE,
                )  # fmt: skip
            y = tl.sum(sums, 0)
            if bias is not None and not PARTIAL:
                y += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
            inside = (n < N) & (column < M)[None, :]
            if residual is not None:
                y = y.to(DTYPE).to(tl.float32) + tl.load(residual + target + n, mask=inside, other=0).to(
                    tl.float32
                )
            if GATED:
                results = results + (y.to(DTYPE).to(tl.float32),)
            else:
                tl.store(out + target + n, y.to(out.dtype.element_ty), mask=inside)
        if GATED:
            n = (row0 + tl.arange(0, 16))[:, None]
            y = results[0] * tl.sigmoid(results[0]) * results[1]
            tl.store(out + target + n, y.to(DTYPE), mask=(n < WIDTH) & (column < M)[None, :])


@triton.jit
def sum_kernel(partial, bias, out, total, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out (M, N) = partial sums (SPLIT, M, N) added in order, + bias; ``total`` = M*N."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(partial + split * total + index, mask=mask, other=0)
    if bias is not None:
        acc += tl.load(bias + index % N, mask=mask, other=0).to(tl.float32)
    tl.store(out + index, acc.to(out.dtype.element_ty), mask=mask)


FEW_PROGRAMS = 264


class Config(NamedTuple):
    """How ``packed_kernel`` divides the work: see the module. programs: how many fill the card (they split K);
    columns: of 8 rows of x, a program's at most; pdl: launches are programmatic dependents of each other."""

    over_n: bool
    warps: int
    rows: int
    columns: int
    programs: int
    pdl: bool


class Update(NamedTuple):
    """What adapters add to y: ``scaling`` * h_p b_p^T on the columns (start and stop in turn) of each part p.

    h (S, M, R) float32: partial sums of all parts' ranks, b (rows, r). gated: store silu(y[:, : N / 2]) *
    y[:, N / 2 :], (M, N / 2). residual (M, N): store residual + y. Both with the roundings of separate operations.
    """

    h: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scaling: float = 0.0
    columns: tuple[int, ...] = ()
    gated: bool = False
    residual: torch.Tensor | None = None


def plan(N, tiles, config):
    """Programs over N, tiles of K a warp and splits of K, from N and K alone: about ``programs`` programs in all."""
    over_n, warps, rows, _, programs, _ = config
    across = triton.cdiv(N, 16 * rows * (warps if over_n else 1))
    slices = 1 if over_n else warps
    steps = triton.cdiv(tiles, slices)
    # two tiles of K at least a warp: below that the partial sums cost more than the idle multiprocessors
    steps = triton.cdiv(steps, max(1, min(programs // max(1, across), steps // 2)))
    return across, steps, triton.cdiv(tiles, steps * slices)


def per_tile_scales(scales, format):
    """``scales`` with a tile's as one integer each."""
    whole = torch.int16 if format == "nested_nf4" else torch.int64
    count = 2 if format == "int4" else 1
    return *(aligned(t).view(whole) for t in scales[:count]), *scales[count:]


def packed_products(
    x, words, scales, bias, first_block, format, config, assembly=True, *, update=None, late=False
):
    """x (M, K) float16 or bfloat16 @ W.T (+ bias) in one launch: y, or partial sums (SPLIT, M, N) without the bias.

    words, scales: of packed codes, as ``operands`` lists them. update: an ``Update`` of a y that is not split. late:
    the launch before this one has promised that x is complete, as ``dependent_launch`` says.
    """
    over_n, warps, rows, columns, _, pdl = config
    (M, K), N, update = x.shape, len(words), update or Update()
    columns = min(columns, triton.next_power_of_2(triton.cdiv(M, 8)))
    across, steps, split = plan(N, K // TILE, config)
    R, r, splits = 0, 0, 0
    if update.b is not None:
        (splits, _, R), r = update.h.shape, update.b.shape[1]
    if update.gated:
        rows, across = 2, triton.cdiv(N // 2, 16)
    # Tiles of K as soon as possible where programs are few, in registers that leave room for the launch before,
    # beside which they start; elsewhere more tiles would cost resident programs, of which three gated ones are
    # wanted. A lane has 2048 / warps registers at most.
    depth, registers = 1, min(256, 2048 // warps)
    if rows == 1 and across <= FEW_PROGRAMS and steps >= 3 and (columns == 1 or update.b is not None):
        depth = 2 if columns > 1 or format == "int4" else 4 if warps == 8 else 3
        if update.b is not None:
            registers = min(registers, 128 if columns == 1 and warps < 8 else 160)
    elif update.gated or warps == 8:
        registers = min(registers, 160)
    registers = registers if registers < 256 else None
    out = x.new_empty(M, N // 2 if update.gated else N)
    if split > 1:
        out = x.new_empty(split, M, N, dtype=torch.float32)
    packed_kernel[(across, triton.cdiv(M, 8 * columns), split)](
        x, aligned(words), per_tile_scales(scales, format), bias, out, update.h, update.b, update.residual,
        update.scaling, update.columns, M, N, R, r, K // TILE, steps, first_block,
        FORMAT=format, PARTIAL=split > 1, ASSEMBLY=assembly, PDL=pdl, LATE=late, OVER_N=over_n, WARPS=warps,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, SPLITS=splits, RANK=max(16 * warps, triton.next_power_of_2(r)),
        GATED=update.gated, num_warps=warps, num_stages=1, launch_pdl=pdl, maxnreg=registers,
    )  # fmt: skip
    return out


def sum_partials(partial, bias, dtype, pdl):
    """y (M, N) of ``dtype`` from partial sums (SPLIT, M, N) and a bias."""
    split, M, N = partial.shape
    out = partial.new_empty(M, N, dtype=dtype)
    sum_kernel[(triton.cdiv(M * N, 256),)](
        partial, bias, out, M * N, N, SPLIT=split, BLOCK=256, PDL=pdl, num_warps=2, launch_pdl=pdl
    )
    return out
