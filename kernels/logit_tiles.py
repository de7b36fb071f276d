"""The jit kernels of ``linear_logprob``: tiles of logits, their statistics, and what gradients are made of.

Here x = logit * scale is in bits, scale = log2(e) / temperature, since 2^x costs a third of the instructions of e^x.
A tile is BLOCK_M rows by BLOCK_V words. Each leaves two or three numbers a row: m = max x, s = sum 2^(x - m) and, for
the entropy, t = sum (x - m) 2^(x - m). Which program makes a tile, and what else it writes, changes none of them, and
the tiles of a row are merged in one fixed order. So log-probabilities have the same bits in every pass.

hidden and weight reach the kernels as pointers or, where TMA is set, as tensor descriptors. N, V and first_col stay
unspecialised: the binary, and with it a row's bits, must not depend on how many rows or words a launch covers.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # in place of -inf, where -inf minus -inf or -inf times 0 would give NaN
# A tile that lies further than this above its row's reference is left out of the accumulator and repaired later:
# 2^86 times any vocabulary and any weight stays inside float32 and bfloat16.
REACH = tl.constexpr(86.0)
NEGLIGIBLE = tl.constexpr(-58.0)  # 2^-58 of the probability, over 256 words, is far below float32's rounding
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(u):
    # Near 0 the quotient below cancels; the series is exact to float32 there.
    square = u * u
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    decay = tl.exp2(tl.abs(u) * (-2 / LN2))
    return tl.where(square < 0.0625, u * series, tl.where(u < 0, decay - 1, 1 - decay) / (1 + decay))


@triton.jit
def _one_minus_exp(u):
    # 1 - exp(u) for u <= 0, exact to float32 near 0 too.
    series = 1 + u / 2 * (1 + u / 3 * (1 + u / 4 * (1 + u / 5 * (1 + u / 6 * (1 + u / 7 * (1 + u / 8))))))
    return tl.where(u > -0.35, -u * series, 1 - tl.exp(u))


@triton.jit
def _logits_tile(
    hidden, weight, bias_ptr, first_row, first_col, first_word, N, V, D, stride_wv, stride_wd, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x of the tile at (first_row, first_col) in float32; rows past N and columns past V are the caller's to mask.

    Column 0 is row first_word of weight.
    """
    rows, cols = first_row + tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_V)
    x = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if TMA:
        for start in range(0, D, BLOCK_D):
            a, b = hidden.load([first_row, start]), weight.load([first_word + first_col, start])
            x = tl.dot(a, b.T, x, input_precision="ieee")
    else:
        dims = tl.arange(0, BLOCK_D)
        hidden_ptrs = hidden + rows.to(tl.int64)[:, None] * D + dims[None, :]
        weight_ptrs = (
            weight + (first_word + cols.to(tl.int64))[None, :] * stride_wv + dims[:, None] * stride_wd
        )
        row_mask, col_mask = (rows < N)[:, None], (cols < V)[None, :]
        for start in range(0, D, BLOCK_D):
            if EVEN_D:
                a = tl.load(hidden_ptrs, mask=row_mask, other=0.0)
                b = tl.load(weight_ptrs, mask=col_mask, other=0.0)
            else:
                inside = dims < D - start
                a = tl.load(hidden_ptrs, mask=row_mask & inside[None, :], other=0.0)
                b = tl.load(weight_ptrs, mask=col_mask & inside[:, None], other=0.0)
            x = tl.dot(a, b, x, input_precision="ieee")
            hidden_ptrs += BLOCK_D
            weight_ptrs += BLOCK_D * stride_wd
    if HAS_BIAS:
        x += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        x = softcap * _tanh(x / softcap)
    return x * scale


@triton.jit
def _slope(x, scale, softcap):
    """d(softcap * tanh(z / softcap)) / dz from x = scale * softcap * tanh(z / softcap)."""
    tanh = x / (scale * softcap)
    return 1 - tanh * tanh


@triton.jit
def _targets(target_ptr, rows, first_col, N, V):
    """Columns of the targets, counted from first_col; -1 where that is not in [0, V)."""
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1) - first_col
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


@triton.jit
def _first_rows(counts_ptr, N):
    """How many rows the first chunk has: N, or what _compact_kernel has counted."""
    if counts_ptr is not None:
        N = tl.load(counts_ptr + 1)
    return N


@triton.jit(do_not_specialize=["N", "V", "first_col", "first_word"])
def _stats_kernel(
    hidden, weight, bias_ptr, target_ptr, reference_ptr, partial_ptr, x_target_ptr, weights_out, counts_ptr,
    N, V, D, first_col, first_word, stride_wv, stride_wd, stride_tile, stride_plane, stride_out, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, WEIGHTS: tl.constexpr,
    EVEN_D: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All tiles of N rows and V words to partial (2 or 3, tiles, rows), and x of the targets that lie in these words.

    The words are those from first_col on, which stand in weight from row first_word on.

    WEIGHTS also writes 2^(x - reference) * slope, 0 at the target and in tiles out of REACH, to weights_out (N, V).
    """
    N = _first_rows(counts_ptr, N)
    row_blocks = tl.cdiv(N, BLOCK_M)
    tiles = row_blocks * tl.cdiv(V, BLOCK_V)
    # Row blocks run fastest, so programs that run together read the same weight tiles from L2.
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_row, col_tile = (tile % row_blocks) * BLOCK_M, tile // row_blocks
        rows, cols = first_row + tl.arange(0, BLOCK_M), col_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        target = _targets(target_ptr, rows, first_col, N, V)
        x = _logits_tile(
            hidden, weight, bias_ptr, first_row, col_tile * BLOCK_V, first_word, N, V, D, stride_wv, stride_wd,
            scale, softcap, HAS_BIAS, HAS_SOFTCAP, EVEN_D, TMA, BLOCK_M, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        owned = (target >= col_tile * BLOCK_V) & (target < (col_tile + 1) * BLOCK_V)
        # Most tiles hold no target and end before V: they skip what follows from either.
        any_owned = tl.max(owned.to(tl.int32), 0) > 0
        if any_owned:
            x_target = tl.sum(tl.where(cols[None, :] == target[:, None], x, 0.0), 1)
            tl.store(x_target_ptr + rows, x_target, mask=owned)
        if (col_tile + 1) * BLOCK_V > V:
            x = tl.where((cols < V)[None, :], x, float("-inf"))
        m = tl.maximum(tl.max(x, 1), LOWEST)
        e = tl.exp2(x - m[:, None])
        tile_ptrs = partial_ptr + (first_col // BLOCK_V + col_tile).to(tl.int64) * stride_tile + rows
        tl.store(tile_ptrs, m)
        tl.store(tile_ptrs + stride_plane, tl.sum(e, 1))
        if ENTROPY:
            tl.store(tile_ptrs + 2 * stride_plane, tl.sum(tl.maximum(x - m[:, None], LOWEST) * e, 1))
        if WEIGHTS:
            shift = m - tl.load(reference_ptr + rows, mask=rows < N, other=0.0)
            e *= tl.where(shift < REACH, tl.exp2(shift), 0.0)[:, None]
            if HAS_SOFTCAP:
                e *= _slope(x, scale, softcap)
            if any_owned:
                e = tl.where(cols[None, :] == target[:, None], 0.0, e)
            if TMA:
                weights_out.store([first_row, col_tile * BLOCK_V], e.to(weights_out.dtype))
            else:
                out_ptrs = weights_out + rows.to(tl.int64)[:, None] * stride_out + cols[None, :]
                inside = (rows < N)[:, None] & (cols < V)[None, :]
                tl.store(out_ptrs, e.to(weights_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "V", "tiles", "first_row"])
def _merge_kernel(
    partial_ptr, x_target_ptr, target_ptr, rows_ptr, logprob_ptr, entropy_ptr, stats_ptr, N, V, tiles, first_row,
    stride_tile, stride_plane, stride_stats, ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Merge the tiles of each row in one fixed order; m and log2 s to stats (2, .), from first_row on.

    Log-prob and entropy go to the same places or, where rows is given, to those that it names. A target outside the
    vocabulary has log-prob NaN: no tile has written its x.
    """
    rows, index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        inside = (start + index < tiles)[:, None]
        ptrs = partial_ptr + (start + index).to(tl.int64)[:, None] * stride_tile + rows[None, :]
        m_tile = tl.load(ptrs, mask=inside, other=LOWEST)
        s_tile = tl.load(ptrs + stride_plane, mask=inside, other=0.0)
        top = tl.maximum(m, tl.max(m_tile, 0))
        shift, decay = m_tile - top[None, :], tl.exp2(m - top)
        weight = tl.exp2(shift)
        if ENTROPY:
            t_tile = tl.load(ptrs + 2 * stride_plane, mask=inside, other=0.0)
            t = (t + (m - top) * s) * decay + tl.sum((t_tile + shift * s_tile) * weight, 0)
        s = s * decay + tl.sum(s_tile * weight, 0)
        m = top
    log_s = tl.log2(s)
    mask = rows < N
    target = tl.load(target_ptr + rows, mask=mask, other=-1)
    known = (target >= 0) & (target < V)
    x_target = tl.load(x_target_ptr + rows, mask=known, other=float("nan"))
    out = first_row + rows
    tl.store(stats_ptr + out, m, mask=mask)
    tl.store(stats_ptr + stride_stats + out, log_s, mask=mask)
    if rows_ptr is not None:
        out = tl.load(rows_ptr + out, mask=mask, other=0)
    tl.store(logprob_ptr + out, ((x_target - m) - log_s) * LN2, mask=mask)
    if ENTROPY:
        tl.store(entropy_ptr + out, (log_s - t / s) * LN2, mask=mask)


@triton.jit(do_not_specialize=["N"])
def _reference_kernel(
    hidden_ptr, target_weight_ptr, target_ptr, sample_ptr, bias_ptr, reference_ptr, counts_ptr, N, D, V,
    stride_tv, stride_td, stride_sv, stride_sd, scale, softcap, GATHERED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, SAMPLE: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A logit near the top of each row: the largest of the target's and those of SAMPLE words, evenly spread.

    target_weight and sample are the whole head or, GATHERED, its rows for the targets and for the sample.
    """
    N = _first_rows(counts_ptr, N)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place, dims, wide = tl.arange(0, SAMPLE), tl.arange(0, BLOCK_D), tl.arange(0, 2 * BLOCK_D)
    target = _known_targets(target_ptr + rows, rows < N, V)
    words = place.to(tl.int64) * V // SAMPLE
    if GATHERED:
        target_row, sample_row = rows.to(tl.int64), place.to(tl.int64)
    else:
        target_row, sample_row = target, words
    hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * D
    target_rows = target_weight_ptr + target_row[:, None] * stride_tv
    sample_rows = sample_ptr + sample_row[None, :] * stride_sv
    # Two loops, since loads that feed no dot are not fetched ahead: these are few and wide instead.
    products = tl.zeros((BLOCK_M, 2 * BLOCK_D), tl.float32)
    for start in range(0, D, 2 * BLOCK_D):
        mask = (rows < N)[:, None] & (start + wide < D)[None, :]
        a = tl.load(hidden_rows + (start + wide)[None, :], mask=mask, other=0.0)
        b = tl.load(target_rows + (start + wide)[None, :] * stride_td, mask=mask, other=0.0)
        products += a.to(tl.float32) * b.to(tl.float32)
    x_target = tl.sum(products, 1)
    x = tl.zeros((BLOCK_M, SAMPLE), tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        inside = start + dims < D
        a = tl.load(
            hidden_rows + (start + dims)[None, :], mask=(rows < N)[:, None] & inside[None, :], other=0.0
        )
        c = tl.load(sample_rows + (start + dims)[:, None] * stride_sd, mask=inside[:, None], other=0.0)
        x = tl.dot(a, c, x, input_precision="ieee")
    if HAS_BIAS:
        x_target += tl.load(bias_ptr + target).to(tl.float32)
        x += tl.load(bias_ptr + words).to(tl.float32)[None, :]
    top = tl.maximum(x_target, tl.max(x, 1))
    if HAS_SOFTCAP:
        top = softcap * _tanh(top / softcap)
    tl.store(reference_ptr + rows, tl.maximum(top * scale, LOWEST), mask=rows < N)


@triton.jit
def _known_targets(target_ptrs, mask, V):
    """Targets, int64; one outside the vocabulary stands for the nearest word, so that its weight can be read."""
    target = tl.load(target_ptrs, mask=mask, other=0)
    return tl.minimum(tl.maximum(target, 0), V - 1)


@triton.jit(do_not_specialize=["words", "first_col"])
def _direction_kernel(
    total_ptr, packed_ptr, packed_scale_ptr, hidden_ptr, weight_ptr, bias_ptr, target_weight_ptr, target_ptr,
    x_target_ptr, reference_ptr, partial_ptr, rows_ptr, logprob_ptr, m_ptr, log_s_ptr,
    D, V, words, first_col, stride_tv, stride_td, stride_wv, stride_wd, stride_tile, stride_plane, scale, softcap,
    GATHERED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row by row in place: total = sum 2^(x - reference) * slope * W becomes d logprob / d hidden.

    FIRST does so; each launch also takes the tiles out of REACH of its words, those from first_col on, recomputed
    word by word, from the rows that have any. Where packed is given, the result goes there (see _packed_row) instead.

    Recomputed logits sum in another order. A tile's own s says how much it weighs; they only say how that is shared.
    """
    row, dims = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    m, log_s, reference = tl.load(m_ptr + row), tl.load(log_s_ptr + row), tl.load(reference_ptr + row)
    direction = tl.load(total_ptr + row * D + dims, mask=dims < D, other=0.0)
    if FIRST:
        place = row
        if rows_ptr is not None:
            place = tl.load(rows_ptr + row)
        own = _one_minus_exp(tl.load(logprob_ptr + place)) * (scale * LN2)
        if HAS_SOFTCAP:
            own *= _slope(tl.load(x_target_ptr + row), scale, softcap)
        target_row = row
        if not GATHERED:
            target_row = _known_targets(target_ptr + row, True, V)
        target_ptrs = target_weight_ptr + target_row * stride_tv + dims * stride_td
        target_weight = tl.load(target_ptrs, mask=dims < D, other=0.0).to(tl.float32)
        others = tl.exp2((reference - m) - log_s) * (scale * LN2)
        direction = own * target_weight - others * direction
    if m - reference >= REACH:
        target = tl.load(target_ptr + row) - first_col
        h = tl.load(hidden_ptr + row * D + dims, mask=dims < D, other=0.0).to(tl.float32)
        for tile in range(0, tl.cdiv(words, BLOCK_V)):
            tile_ptr = partial_ptr + (first_col // BLOCK_V + tile).to(tl.int64) * stride_tile + row
            top = tl.load(tile_ptr)
            if (top - reference >= REACH) & ((top - m) - log_s > NEGLIGIBLE):
                total, mass = tl.zeros((BLOCK_D,), tl.float32), 0.0
                for col in range(tile * BLOCK_V, tl.minimum((tile + 1) * BLOCK_V, words)):
                    w_ptrs = weight_ptr + tl.cast(col, tl.int64) * stride_wv + dims * stride_wd
                    w = tl.load(w_ptrs, mask=dims < D, other=0.0).to(tl.float32)
                    x = tl.sum(h * w, 0)
                    if HAS_BIAS:
                        x += tl.load(bias_ptr + col).to(tl.float32)
                    if HAS_SOFTCAP:
                        x = softcap * _tanh(x / softcap)
                    x *= scale
                    e = tl.exp2(x - top)
                    mass += e
                    if HAS_SOFTCAP:
                        e *= _slope(x, scale, softcap)
                    total += tl.where(col == target, 0.0, e) * w
                share = tl.load(tile_ptr + stride_plane) * tl.exp2((top - m) - log_s) / mass
                direction -= total * (share * scale * LN2)
    if packed_ptr is not None:
        packed, packed_scale = _packed_row(direction)
        tl.store(packed_ptr + row * D + dims, packed, mask=dims < D)
        tl.store(packed_scale_ptr + row, packed_scale)
    else:
        tl.store(total_ptr + row * D + dims, direction, mask=dims < D)


@triton.jit
def _packed_row(direction):
    """A float32 row as float16 and a power of two that fills its range: 11 exact bits, 3 more than bfloat16."""
    peak = tl.max(tl.abs(direction), 0)
    power = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(power > 1.0e-30, power * 2.0**-14, 2.0**-114)
    return (direction / scale).to(tl.float16), scale


@triton.jit
def _scale_rows_kernel(
    direction_ptr, scale_ptr, upstream_ptr, rows_ptr, out_ptr, D, stride_upstream, BLOCK_D: tl.constexpr
):
    """Row i of direction times its scale and its upstream gradient to row rows[i] (or i) of out."""
    row = tl.program_id(0).to(tl.int64)
    target = row
    if rows_ptr is not None:
        target = tl.load(rows_ptr + row)
    factor = tl.load(upstream_ptr + target * stride_upstream)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr + row)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        direction = tl.load(direction_ptr + row * D + dims, mask=dims < D, other=0.0)
        value = direction.to(tl.float32) * factor
        tl.store(out_ptr + target * D + dims, value.to(out_ptr.dtype.element_ty), mask=dims < D)


@triton.jit(do_not_specialize=["N", "V", "first_col"])
def _coefficients_kernel(
    hidden, weight, bias_ptr, target_ptr, stats_ptr, upstream_ptr, out_ptr,
    N, V, D, first_col, stride_wv, stride_wd, stride_stats, stride_upstream, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, EVEN_D: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of dz * temperature, from recomputed logits, to out (N, V); V and cols count from first_col."""
    first_row, first = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_V
    rows, cols = first_row + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_V)
    x = _logits_tile(
        hidden, weight, bias_ptr, first_row, first, 0, N, V, D, stride_wv, stride_wd, scale, softcap,
        HAS_BIAS, HAS_SOFTCAP, EVEN_D, TMA, BLOCK_M, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    target = _targets(target_ptr, rows, first_col, N, V)
    m = tl.load(stats_ptr + rows, mask=rows < N, other=float("inf"))
    log_s = tl.load(stats_ptr + stride_stats + rows, mask=rows < N, other=0.0)
    g = tl.load(upstream_ptr + rows, mask=rows < N, other=0.0)
    bits = (x - m[:, None]) - log_s[:, None]
    p = tl.exp2(bits)
    dz = g[:, None] * (tl.where(cols[None, :] == target[:, None], 1.0, 0.0) - p)
    if ENTROPY:
        entropy = tl.load(stats_ptr + 2 * stride_stats + rows, mask=rows < N, other=0.0)
        h = tl.load(upstream_ptr + stride_upstream + rows, mask=rows < N, other=0.0)
        dz -= h[:, None] * p * (tl.maximum(bits, LOWEST) * LN2 + entropy[:, None])
    if HAS_SOFTCAP:
        dz *= _slope(x, scale, softcap)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * V + cols[None, :]
    tl.store(out_ptrs, dz.to(out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols < V)[None, :])
