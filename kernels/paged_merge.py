"""The second kernel of decode over a paged cache: a context's parts folded in order, its last token last.

``paged_decode`` says what the parts are. Of each split D + 2 float32 values are read a head; the last token's
key and value come from the arguments, rotated, rounded and stored into the cache here, or from the cache.
"""

import triton
import triton.language as tl

from .kv_store import place, quantized
from .rotary import turn


@triton.jit
def _fold(m, l, acc, m_part, l_part, part):
    """Add a part to the (m, l, acc) of the parts before it."""
    m_new = tl.maximum(m, m_part)
    shrink, grow = tl.exp2(m - m_new), tl.exp2(m_part - m_new)
    return m_new, l * shrink + l_part * grow, acc * shrink[:, None] + part * grow[:, None]


@triton.jit
def _heads(x, cos, sin, row, angle_row, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of heads (rows, BLOCK_D), rotated where cos is given and rounded as ``rotary`` rounds; zero beyond mask.

    row and angle_row: offsets of each row in x and in cos and sin.
    """
    d = tl.arange(0, BLOCK_D)
    mask = mask[:, None] & (d < D)[None, :]
    values = tl.load(x + row[:, None] + d[None, :], mask=mask, other=0.0)
    if cos is not None:
        HALF: tl.constexpr = D // 2
        other, angle = tl.where(d < HALF, d + HALF, d - HALF), tl.where(d < HALF, d, d - HALF)
        partner = tl.load(x + row[:, None] + other[None, :], mask=mask, other=0.0).to(tl.float32)
        at = angle_row[:, None] + angle[None, :]
        c, s = tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0)
        partner = tl.where((d < HALF)[None, :], -partner, partner)
        values = turn(values.to(tl.float32), partner, c, s).to(values.dtype)
    return values


@triton.jit
def _last_part(
    queries, k, v, cos, sin, k_cache, v_cache, k_scales, v_scales, table, last, scale_log2, k_row, v_row, angle_row,
    k_block, k_token, v_block, v_token, scale_block, scale_token, D: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(m, a) of the token at ``last`` for queries (ROWS, BLOCK_D); where k and v bring it, it is put into the cache.

    Each row has its own copy of the key and the value, so that no warp waits for another.
    """
    row, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    present = (row >= 0) & (last >= 0)
    there = present[:, None] & (d < D)[None, :]
    block = tl.load(table + last // PAGE, mask=last >= 0, other=0).to(tl.int64)
    k_at = k_cache + (block * k_block + last % PAGE * k_token + 0 * row)[:, None] + d[None, :]
    v_at = v_cache + (block * v_block + last % PAGE * v_token + 0 * row)[:, None] + d[None, :]
    scale_at = block * scale_block + last % PAGE * scale_token + 0 * row
    if k is None:
        key, value = tl.load(k_at, mask=there, other=0.0), tl.load(v_at, mask=there, other=0.0)
        if k_scales is not None:
            k_scale = tl.load(k_scales + scale_at, mask=present, other=0.0)
            v_scale = tl.load(v_scales + scale_at, mask=present, other=0.0)
    else:
        key = _heads(k, cos, sin, k_row + 0 * row, angle_row + 0 * row, row >= 0, D, BLOCK_D)
        value = tl.load(v + (v_row + 0 * row)[:, None] + d[None, :], mask=there, other=0.0)
        stores = present & (row == 0)
        if k_scales is not None:
            key, k_scale = quantized(key)
            value, v_scale = quantized(value)
            tl.store(k_scales + scale_at, k_scale, mask=stores)
            tl.store(v_scales + scale_at, v_scale, mask=stores)
        tl.store(k_at, key, mask=stores[:, None] & there)
        tl.store(v_at, value, mask=stores[:, None] & there)
    key, value = key.to(tl.float32), value.to(tl.float32)
    if k_scales is not None:
        key, value = key * k_scale[:, None], value * v_scale[:, None]
    return tl.sum(queries.to(tl.float32) * key, 1) * scale_log2, value


@triton.jit(do_not_specialize=["slots"])
def _merge_kernel(
    q, k, v, cos, sin, k_cache, v_cache, k_scales, v_scales, block_table, context_lens, addresses, partial, stats,
    out, scale_log2, slots, table_row, angle_token, q_token, q_head, new_k_token, new_k_head, new_v_token, new_v_head,
    k_block, k_token, k_head, v_block, v_token, v_head, scale_block, scale_token, scale_head, out_token, out_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out of one (sequence, key head)'s query heads, a row each: parts folded in order, AHEAD loaded together, then
    the last token.

    The parts' kernel has promised that all before it is complete: only its own output awaits its end. What is stored
    here it does not read.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    sequence, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside, head = row < GROUP, kv_head * GROUP + row
    last = tl.load(context_lens + sequence) - 1
    angle_row = sequence * angle_token
    query = _heads(q, cos, sin, sequence * q_token + head * q_head, angle_row + 0 * head, inside, D, BLOCK_D)
    if k_scales is not None:
        k_scales = place(k_scales, addresses, 2) + kv_head * scale_head
        v_scales = place(v_scales, addresses, 3) + kv_head * scale_head
    m_last, last_part = _last_part(
        query, k, v, cos, sin, place(k_cache, addresses, 0) + kv_head * k_head,
        place(v_cache, addresses, 1) + kv_head * v_head, k_scales, v_scales, block_table + sequence * table_row, last,
        scale_log2, sequence * new_k_token + kv_head * new_k_head, sequence * new_v_token + kv_head * new_v_head,
        angle_row, k_block, k_token, v_block, v_token, scale_block, scale_token, D, PAGE,
        ROWS, BLOCK_D,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    first = (sequence * (tl.num_programs(1) * GROUP) + head) * slots
    parts = tl.cdiv(tl.maximum(last, 0), SPLIT)
    m, l = tl.where(inside, float("-inf"), 0.0), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for begin in range(0, parts, AHEAD):
        loaded = ()
        for i in tl.static_range(AHEAD):
            at, there = first + begin + i, inside & (begin + i < parts)
            loaded = loaded + (
                (
                    tl.load(stats + 2 * at, mask=there, other=float("-inf")),
                    tl.load(stats + 2 * at + 1, mask=there, other=0.0),
                    tl.load(partial + at[:, None] * D + d, mask=there[:, None] & (d < D), other=0.0),
                ),
            )
        for i in tl.static_range(AHEAD):
            m, l, acc = _fold(m, l, acc, loaded[i][0], loaded[i][1], loaded[i][2])
    m, l, acc = _fold(m, l, acc, m_last, tl.full([ROWS], 1.0, tl.float32), last_part)
    result = (acc / l[:, None]).to(out.dtype.element_ty)  # an empty context has one key and value, of zeros
    to = out + sequence * out_token + head[:, None] * out_head + d[None, :]
    tl.store(to, result, mask=inside[:, None] & (d < D)[None, :])
