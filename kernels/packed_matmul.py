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

import torch
import triton
import triton.language as tl

from .code_words import aligned
from .packed_codes import TILE, UNGAIN_BF16, UNGAIN_FP16, decode_packed

# Loads are tiles of two dimensions, columns in runs and rows (half or group, warp, lane): four lanes to a row, so
# eight rows fill a warp, the next eight the next warp, and what is left over goes to registers. Tensor cores want the
# same lanes, so the operands below are but other names of the same registers.


@triton.jit
def _weight_operand(value, WARPS: tl.constexpr):
    """(2 * WARPS * 8, 16) -> (WARPS, 16, 16): lane t's four words are columns 2t, 2t+1, 2t+8, 2t+9."""
    return value.reshape(2, WARPS, 8, 4, 2, 2).permute(1, 0, 2, 4, 3, 5).reshape(WARPS, 16, 16)


@triton.jit
def _x_operands(value, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """(COLUMNS * WARPS * 8, 32) -> two of (WARPS, 16, 8 COLUMNS), with K in the order of ``_weight_operand``."""
    runs = value.reshape(COLUMNS, WARPS, 8, 4, 2, 2, 2).permute(1, 5, 3, 6, 0, 2, 4)
    return tl.split(runs.reshape(WARPS, 16, 8 * COLUMNS, 2))


@triton.jit
def _half(bits, SHIFT: tl.constexpr):
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
def _block_scale(scales, raw, block, exists, B: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The float32 scale of block B of a row's tile, by which a decoded product is multiplied."""
    UNGAIN: tl.constexpr = UNGAIN_BF16 if DTYPE == tl.bfloat16 else UNGAIN_FP16
    if FORMAT == "int4":
        scale = _half(raw, 16 * B)
    elif FORMAT == "nf4":
        scale = (raw >> (32 * B)).to(tl.int32).to(tl.float32, bitcast=True) * UNGAIN
    else:
        group = tl.load(scales[2] + (block + B) // 256)
        code = ((raw >> (8 * B)) & 255).to(tl.int32)
        scale = (tl.load(scales[3] + code) * group + tl.load(scales[4])) * UNGAIN
        scale = tl.where(exists, scale, 0)
    return scale


@triton.jit(do_not_specialize=["M", "tiles", "steps", "first_block"])
def packed_kernel(
    x, codes, scales, bias, out, M, N, tiles, steps, first_block,
    FORMAT: tl.constexpr, PARTIAL: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr, OVER_N: tl.constexpr,
    WARPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """16 ROWS (OVER_N: times WARPS) columns of x @ W.T, to ``out`` (M, N) with bias or to partial sums (SPLIT, M, N).

    x (M, 128 tiles), codes int32 (N, 16 tiles), scales[0] (and int4's scales[1]) one integer a tile: (N, tiles). A
    warp takes ``steps`` tiles of K.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    NF4: tl.constexpr = FORMAT != "int4"
    PER_BLOCK: tl.constexpr = 4 if NF4 else 2
    OVER: tl.constexpr = WARPS if OVER_N else 1
    STRIDE: tl.constexpr = 1 if OVER_N else WARPS
    index, x_index = tl.arange(0, 16 * WARPS)[:, None], tl.arange(0, 8 * WARPS * COLUMNS)[:, None]
    warp, x_warp = index // 8 % WARPS, x_index // 8 % WARPS
    load_row = index // (8 * WARPS) * 8 + index % 8
    word, element = tl.arange(0, 16)[None, :], tl.arange(0, 32)[None, :]
    # The same rows and tiles as the accumulator counts them.
    warp_of_row, row_of_tile = tl.arange(0, WARPS)[:, None], tl.arange(0, 16)[None, :]
    row0 = tl.program_id(0).to(tl.int64) * (16 * ROWS * OVER)
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
    for r in tl.static_range(ROWS):
        row = tl.minimum(load_row0 + 16 * r + load_row, N - 1)
        code_rows = code_rows + (codes + row * tiles * 16 + word,)
        row = tl.minimum(sum_row0 + 16 * r + row_of_tile, N - 1) * tiles
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
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # The weight depends on no earlier kernel: its first tiles go to the L2 cache while the last one ends.
        for r in tl.static_range(ROWS):
            for ahead in tl.static_range(DEPTH + 1):
                begin = code_begins[r] + tl.minimum(tile_of_row + ahead * STRIDE, tiles - 1) * 16
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [begin.to(tl.int64)], tl.int32,
                    is_pure=False, pack=1,
                )  # fmt: skip
        tl.extra.cuda.gdc_wait()
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
            for r in tl.static_range(ROWS):
                values = values + (decode_packed(current[r][0], half, DTYPE, NF4, ASSEMBLY),)
            for b in tl.static_range(4 // PER_BLOCK):
                parts = ()
                for _row in tl.static_range(ROWS):
                    parts = parts + (tl.zeros((WARPS, 16, 8 * COLUMNS), tl.float32),)
                total = tl.zeros((WARPS, 16, 8 * COLUMNS), tl.float32)
                for pair in tl.static_range(b * PER_BLOCK, (b + 1) * PER_BLOCK, 2):
                    x_pair = _x_operands(tl.load(x_tiles + 32 * (2 * half + pair // 2)), WARPS, COLUMNS)
                    for i in tl.static_range(2):
                        added = ()
                        for r in tl.static_range(ROWS):
                            value = _weight_operand(values[r][pair + i], WARPS)
                            added = added + (tl.dot(value, x_pair[i], parts[r]),)
                        parts = added
                        if not NF4:
                            total = tl.dot(ones, x_pair[i], total)
                added = ()
                for r in tl.static_range(ROWS):
                    block = block_rows[r] + 2 * tl.minimum(tile_of_row, tiles - 1)
                    exists = tile_of_row < tiles
                    scale = _block_scale(
                        scales, current[r][1], block, exists, half * (4 // PER_BLOCK) + b, FORMAT, DTYPE
                    )
                    sums = acc[r] + parts[r] * scale[:, :, None]
                    if not NF4:
                        sums += total * (_half(current[r][2], 16 * (2 * half + b)) - 16 * scale)[:, :, None]
                    added = added + (sums,)
                acc = added
        tile += STRIDE
        x_tile += STRIDE
        tile_of_row += STRIDE
    column = m0 + tl.arange(0, 8 * COLUMNS)
    target = (tl.program_id(2).to(tl.int64) * M + column) * N
    for r in tl.static_range(ROWS):
        if OVER_N:
            y, n, start = acc[r], (sum_row0 + 16 * r + row_of_tile)[:, :, None], target[None, None, :]
            inside = (n < N) & (column < M)[None, None, :]
        else:
            y, n, start = tl.sum(acc[r], 0), (row0 + 16 * r + tl.arange(0, 16))[:, None], target[None, :]
            inside = (n < N) & (column < M)[None, :]
        if bias is not None and not PARTIAL:
            y += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
        tl.store(out + start + n, y.to(out.dtype.element_ty), mask=inside)


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


def plan(N, tiles, over_n, warps, rows, programs):
    """Programs over N, tiles of K a warp and splits of K, from N and K alone: about ``programs`` programs in all."""
    across = triton.cdiv(N, 16 * rows * (warps if over_n else 1))
    slices = 1 if over_n else warps
    steps = triton.cdiv(tiles, slices)
    # two tiles of K at least a warp: below that the partial sums cost more than the idle multiprocessors
    steps = triton.cdiv(steps, max(1, min(programs // max(1, across), steps // 2)))
    return across, steps, triton.cdiv(tiles, steps * slices)


def packed_matmul_4bit(x, words, scales, bias, first_block, format, config, assembly=True):
    """x (M, K) float16 or bfloat16 @ W.T + bias, of packed ``words`` and the ``scales`` that ``operands`` lists.

    config: over_n, warps, rows (of 16, a warp's), columns (of 8 rows of x, a program's at most), programs that fill
    the card, pdl (programmatic dependent launch).
    """
    over_n, warps, rows, columns, programs, pdl = config
    (M, K), N = x.shape, len(words)
    columns = min(columns, triton.next_power_of_2(triton.cdiv(M, 8)))
    across, steps, split = plan(N, K // TILE, over_n, warps, rows, programs)
    whole = torch.int16 if format == "nested_nf4" else torch.int64  # a tile's scales
    per_tile = [aligned(t).view(whole) for t in scales[: 2 if format == "int4" else 1]]
    # The three tiles of K = 1536 as soon as possible; elsewhere the registers for it cost resident programs.
    depth = 1 if steps != 3 or columns > 1 else 2 if format == "int4" else 3
    out = x.new_empty(M, N)
    if not out.numel():
        return out
    target = out if split == 1 else x.new_empty(split, M, N, dtype=torch.float32)
    pdl = {"PDL": pdl, "launch_pdl": pdl}
    packed_kernel[(across, triton.cdiv(M, 8 * columns), split)](
        aligned(x), aligned(words), (*per_tile, *scales[len(per_tile) :]), bias, target, M, N, K // TILE, steps,
        first_block, FORMAT=format, PARTIAL=split > 1, ASSEMBLY=assembly, OVER_N=over_n, WARPS=warps, ROWS=rows,
        COLUMNS=columns, DEPTH=depth, num_warps=warps, num_stages=1, **pdl,
    )  # fmt: skip
    if split > 1:
        sum_kernel[(triton.cdiv(M * N, 256),)](
            target, bias, out, M * N, N, SPLIT=split, BLOCK=256, num_warps=2, **pdl
        )
    return out
