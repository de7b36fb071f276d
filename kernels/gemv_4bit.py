"""A few rows of x (M, K) times a 4-bit weight (N, K) on the CUDA cores: the decode step's ``matmul_4bit``.

A lane owns one 32-bit word of each of its rows of codes: eight neighbouring elements (nf4), or four and the four 16
places on (int4). Its eight codes are looked up in registers (``tl.gather``: one warp shuffle each; int4: exact
integer bits), multiplied with x in float32 and summed; that partial sum takes the block's scale. The weights are
never rounded. Bytes: N*K/2 codes, the scales and, for each tile of N, M*K of x. FLOPs: 2*M*N*K.
"""

import triton
import triton.language as tl

from .code_words import block_scale, code_table, decode_words


@triton.jit
def _four(pointer, mask, BF16: tl.constexpr):
    """Four neighbouring 16-bit floats, read as one int64, in float32."""
    bits = tl.load(pointer, mask=mask, other=0)
    low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
    if BF16:  # the upper half of a float32
        a, b = (low << 16).to(tl.float32, bitcast=True), ((low >> 16) << 16).to(tl.float32, bitcast=True)
        c, d = (high << 16).to(tl.float32, bitcast=True), ((high >> 16) << 16).to(tl.float32, bitcast=True)
    else:
        a, b = _half(low), _half(low >> 16)
        c, d = _half(high), _half(high >> 16)
    return a[None, :], b[None, :], c[None, :], d[None, :]


@triton.jit
def _half(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


# A row's length in words is not specialised: were its divisibility known, a lane would take more words than one.
@triton.jit(do_not_specialize=["words_per_row"])
def gemv_kernel(
    x, codes, scales, bias, out, M, N, words_per_row, steps, first_block,
    QUANT_BLOCK: tl.constexpr, FORMAT: tl.constexpr, BF16: tl.constexpr, PARTIAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of x @ W.T over ``steps`` steps of K: to ``out`` (M, N), or partial sums (SPLIT, M, N).

    x is read as int64 (M, K/4), codes as int32 (N, words_per_row); M <= ROWS.
    """
    PER_BLOCK: tl.constexpr = QUANT_BLOCK // 8
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    lane = tl.arange(0, WORDS)
    row = codes + n[:, None] * words_per_row
    block_row = n[:, None] * (words_per_row // PER_BLOCK)
    exists = (n < N)[:, None]
    table = code_table(scales[1], BLOCK_N, FORMAT)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BLOCK_N, WORDS), tl.float32),)
    w = split * steps * WORDS + lane
    mask = exists & (w < words_per_row)[None, :]
    words = tl.load(row + w[None, :], mask=mask, other=0)
    # the stated contiguity keeps neighbouring blocks on neighbouring lanes, as the words are
    block = block_row + tl.max_contiguous(w // PER_BLOCK, 2)[None, :]
    scale, minimum = block_scale(scales, block, mask, first_block, FORMAT)
    for step in range(steps):
        w = (split * steps + step) * WORDS + lane
        within = w < words_per_row
        after = w + WORDS
        mask = exists & (after < words_per_row)[None, :]
        next_words = tl.load(row + after[None, :], mask=mask, other=0)
        block = block_row + tl.max_contiguous(after // PER_BLOCK, 2)[None, :]
        next_scale, next_minimum = block_scale(scales, block, mask, first_block, FORMAT)
        v0, v1, v2, v3, v4, v5, v6, v7 = decode_words(words, table, FORMAT)
        if FORMAT == "int4":
            near, far = w // 4 * 8 + w % 4, w // 4 * 8 + w % 4 + 4
        else:
            near, far = 2 * w, 2 * w + 1
        added = ()
        for m in tl.static_range(ROWS):
            x_row = x + m * (words_per_row.to(tl.int64) * 2)
            x0, x1, x2, x3 = _four(x_row + near, within & (m < M), BF16)
            x4, x5, x6, x7 = _four(x_row + far, within & (m < M), BF16)
            total = tl.fma(v1, tl.broadcast_to(x1, v1.shape), v0 * x0)
            total = tl.fma(v2, tl.broadcast_to(x2, v2.shape), total)
            total = tl.fma(v3, tl.broadcast_to(x3, v3.shape), total)
            total = tl.fma(v4, tl.broadcast_to(x4, v4.shape), total)
            total = tl.fma(v5, tl.broadcast_to(x5, v5.shape), total)
            total = tl.fma(v6, tl.broadcast_to(x6, v6.shape), total)
            total = tl.fma(v7, tl.broadcast_to(x7, v7.shape), total)
            total = tl.fma(total, scale, sums[m])
            if FORMAT == "int4":
                x_sum = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
                total = tl.fma(minimum, tl.broadcast_to(x_sum, minimum.shape), total)
            added = added + (total,)
        sums = added
        words, scale, minimum = next_words, next_scale, next_minimum
    for m in tl.static_range(ROWS):
        y = tl.sum(sums[m], 1)
        if bias is not None and not PARTIAL:
            y += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
        target = out + (split.to(tl.int64) * M + m) * N + n
        tl.store(target, y.to(out.dtype.element_ty), mask=(n < N) & (m < M))
