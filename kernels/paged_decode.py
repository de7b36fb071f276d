"""Decode over a paged key-value cache: one query a sequence, with or without rotation and store of its last token.

A context of C tokens is its last token, and splits of SPLIT tokens before it that are anchored at position 0:

    of split s:      m_s = max_j x_j       l_s = sum_j 2^(x_j - m_s)       a_s = sum_j 2^(x_j - m_s) v_j
    of the last:     m = x_{C-1}           l = 1                           a = v_{C-1}

with x_j = log2(e) * scale * q . k_j in float32. The parts are folded in order, the last token last, into a / l.
One program per (sequence, key head) reads each key and value once for all H / KVH query heads. Where these are too
few to fill a card, up to ``PROGRAMS`` of them share a context's splits, and a second kernel folds the parts: which
way a step takes depends on its shapes, but the parts, their order and so the bits do not. A sequence's result
depends on neither its batch nor the width of the table.

With ``cos`` and ``sin`` q and k are rotated in registers, rounded as ``rotary`` rounds them, and the cache gets the
rotated key. The last token's key and value are taken from the arguments, so nothing waits for their store.

For C tokens of context: 2 C KVH D elements read, 4 C H D FLOPs. Workspace, on the second way alone: S H (splits + 1)
(D + 2) float32 values, splits = ceil(tokens of the table's width / SPLIT), held to ``WORKSPACE`` bytes by taking the
sequences in chunks (of one at least).
"""

import torch
import triton
import triton.language as tl

from . import _runtime
from .dependent_launch import dependent_launch, wait_for_inputs
from .kv_store import place
from .rotary import turn

PROGRAMS = 256  # programs that fill a card
WORKSPACE = 64 * 2**20  # bytes of workspace, unless one sequence needs more
LOG2_E = 1.4426950408889634

# Most bytes of a padded head row; SPLIT, warps, stages. One table for all cards: two tiles of keys and two of values
# fit the 99 KiB of sm_86, sm_89 and sm_120.
CONFIGS = ((128, (128, 4, 2)), (256, (64, 4, 2)), (512, (32, 4, 2)), (1024, (16, 4, 2)))


@triton.jit
def _fold(m, l, acc, m_part, l_part, part):
    """Add a part to the (m, l, acc) of the parts before it. Explicit, so that every kernel rounds alike."""
    m_new = tl.maximum(m, m_part)
    shrink, grow = tl.exp2(m - m_new), tl.exp2(m_part - m_new)
    l = tl.fma(l_part, grow, l * shrink)
    if len(acc.shape) == 2:
        acc = tl.fma(part, tl.broadcast_to(grow[:, None], acc.shape), acc * shrink[:, None])
    else:
        acc = tl.fma(part, tl.broadcast_to(grow, acc.shape), acc * shrink)
    return m_new, l, acc


@triton.jit
def _split_blocks(table, n, last, PAGE: tl.constexpr):
    """The cache blocks of tokens ``n``."""
    return tl.load(table + n // PAGE, mask=n < last, other=0).to(tl.int64)


@triton.jit
def _split_part(
    queries, n, last, block, k_cache, v_cache, scale_log2, k_block, k_token, v_block, v_token,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(m, l, a) of the tokens ``n`` before position ``last``, in cache blocks ``block``, for rows of queries."""
    d = tl.arange(0, BLOCK_D)
    stored = n < last
    # Absent keys and values load as zeros: what an unused slot holds must not reach a product.
    mask = stored[:, None] & (d < D)[None, :]
    k_at = k_cache + (block * k_block + n % PAGE * k_token)[:, None] + d[None, :]
    v_at = v_cache + (block * v_block + n % PAGE * v_token)[:, None] + d[None, :]
    key, value = tl.load(k_at, mask=mask, other=0.0), tl.load(v_at, mask=mask, other=0.0)
    scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale_log2
    scores = tl.where(stored[None, :], scores, float("-inf"))
    m = tl.max(scores, 1)
    p = tl.exp2(scores - m[:, None])
    return m, tl.sum(p, 1), tl.dot(p.to(value.dtype), value, input_precision="ieee")


@triton.jit
def _load_heads(x, row, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of pointers offset by ``row``, and for each value the one that it is rotated with, with its sign."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, BLOCK_D)
    other = tl.where(d < HALF, d + HALF, d - HALF)
    mask = mask[:, None] & (d < D)[None, :]
    values = tl.load(x + row[:, None] + d[None, :], mask=mask, other=0.0)
    partner = tl.load(x + row[:, None] + other[None, :], mask=mask, other=0.0)
    return values, tl.where((d < HALF)[None, :], -partner, partner)


@triton.jit
def _turned(values, partner, cos, sin, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of heads, rotated where cos is given and rounded as ``rotary`` rounds."""
    if cos is not None:
        HALF: tl.constexpr = D // 2
        d = tl.arange(0, BLOCK_D)
        angle = tl.where(d < HALF, d, d - HALF)
        c, s = tl.load(cos + angle, mask=d < D, other=0.0), tl.load(sin + angle, mask=d < D, other=0.0)
        values = turn(values.to(tl.float32), partner.to(tl.float32), c[None, :], s[None, :]).to(values.dtype)
    return values


@triton.jit
def _decode_kernel(
    q, k, v, cos, sin, k_cache, v_cache, block_table, context_lens, addresses, out, partial, stats, scale_log2, slots,
    table_row, q_token, q_head, new_k_token, new_k_head, new_v_token, new_v_head, cos_token, sin_token,
    out_token, out_head, k_block, k_token, k_head, v_block, v_token, v_head,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, MERGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, key head, p) takes splits p, p + P, ... of P programs; MERGE: it leaves their parts."""
    wait_for_inputs(PDL)
    sequence, kv_head, program = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    last = tl.load(context_lens + sequence) - 1
    if MERGE:
        if program * SPLIT >= tl.maximum(last, 1):
            return
    k_cache = place(k_cache, addresses, 0) + kv_head * k_head
    v_cache = place(v_cache, addresses, 1) + kv_head * v_head
    table = block_table + sequence * table_row
    row, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + row
    if cos is not None:
        cos, sin = cos + sequence * cos_token, sin + sequence * sin_token
    n = program * SPLIT + tl.arange(0, SPLIT)
    blocks = _split_blocks(table, n, last, PAGE)  # ahead of all that would wait for another load
    values, partner = _load_heads(q + sequence * q_token, head * q_head, row < GROUP, D, BLOCK_D)
    # The last token is loaded before the splits, and folded and stored after them.
    owner = (program == 0) & (last >= 0)
    there = (d < D) & owner
    block = tl.load(table + last // PAGE, mask=owner, other=0).to(tl.int64)
    k_at = k_cache + block * k_block + last % PAGE * k_token + d
    v_at = v_cache + block * v_block + last % PAGE * v_token + d
    if k is None:
        key, value = tl.load(k_at, mask=there, other=0.0)[None, :], tl.load(v_at, mask=there, other=0.0)
        key_partner = key
    else:
        new_k = k + sequence * new_k_token + kv_head * new_k_head
        key, key_partner = _load_heads(
            new_k, tl.zeros([1], tl.int32), tl.full([1], True, tl.int1), D, BLOCK_D
        )
        value = tl.load(v + sequence * new_v_token + kv_head * new_v_head + d, mask=there, other=0.0)
    queries = _turned(values, partner, cos, sin, D, BLOCK_D)
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    slot = (sequence * tl.num_programs(1) * GROUP + head) * slots
    inside = (row < GROUP)[:, None] & (d < D)[None, :]
    for split in range(program, tl.cdiv(last, SPLIT), tl.num_programs(2)):
        m_part, l_part, part = _split_part(
            queries, n, last, blocks, k_cache, v_cache, scale_log2, k_block, k_token, v_block, v_token,
            D, PAGE, BLOCK_D,
        )  # fmt: skip
        n += tl.num_programs(2) * SPLIT
        blocks = _split_blocks(table, n, last, PAGE)
        if MERGE:
            tl.store(stats + (slot + split) * 2, m_part, mask=row < GROUP)
            tl.store(stats + (slot + split) * 2 + 1, l_part, mask=row < GROUP)
            tl.store(partial + (slot + split)[:, None] * D + d[None, :], part, mask=inside)
        else:
            m, l, acc = _fold(m, l, acc, m_part, l_part, part)
    if owner:
        if k is not None:
            key = _turned(key, key_partner, cos, sin, D, BLOCK_D)
            tl.store(k_at[None, :], key, mask=there[None, :])
            tl.store(v_at, value, mask=there)
        m_part = tl.sum(queries.to(tl.float32) * key.to(tl.float32), 1) * scale_log2
        l_part = tl.full([BLOCK_G], 1.0, tl.float32)
        part = tl.broadcast_to(value.to(tl.float32)[None, :], (BLOCK_G, BLOCK_D))
        if MERGE:
            end = slot + tl.cdiv(last, SPLIT)
            tl.store(stats + end * 2, m_part, mask=row < GROUP)
            tl.store(stats + end * 2 + 1, l_part, mask=row < GROUP)
            tl.store(partial + end[:, None] * D + d[None, :], part, mask=inside)
        else:
            m, l, acc = _fold(m, l, acc, m_part, l_part, part)
    if not MERGE:
        result = acc / tl.where(l > 0, l, 1.0)[:, None]  # an empty context gives zero
        to = out + sequence * out_token + head[:, None] * out_head + d[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _merge_kernel(
    partial, stats, context_lens, out, slots, out_token, out_head,
    D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out of one (sequence, head): its parts folded in order, AHEAD of them loaded together."""
    wait_for_inputs(PDL)
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    first = (sequence * tl.num_programs(1) + head) * slots
    last = tl.load(context_lens + sequence) - 1
    parts = tl.where(last < 0, 0, tl.cdiv(last, SPLIT) + 1)
    m, l = float("-inf"), 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, parts, AHEAD):
        loaded = ()
        for i in tl.static_range(AHEAD):
            at, there = first + begin + i, begin + i < parts
            loaded = loaded + (
                (
                    tl.load(stats + 2 * at, mask=there, other=float("-inf")),
                    tl.load(stats + 2 * at + 1, mask=there, other=0.0),
                    tl.load(partial + at * D + d, mask=there & (d < D), other=0.0),
                ),
            )
        for i in tl.static_range(AHEAD):
            m, l, acc = _fold(m, l, acc, loaded[i][0], loaded[i][1], loaded[i][2])
    result = acc / tl.where(l > 0, l, 1.0)
    tl.store(out + sequence * out_token + head * out_head + d, result.to(out.dtype.element_ty), mask=d < D)


def head_block(q):
    """The head dimension of ``q``, padded to what tiles can have."""
    return max(16, triton.next_power_of_2(q.shape[2]))


def config(q):
    """SPLIT, warps and stages of decode for queries like ``q``."""
    width = head_block(q) * q.element_size()
    return next(tiles for most, tiles in CONFIGS if width <= most)


def contiguous_rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def paged_decode(q, k, v, cos, sin, k_cache, v_cache, block_table, context_lens, scale, addresses):
    """Decode; with ``k`` and ``v`` these are stored as the last of each context, else they stand there already."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q) == 0:
        return out
    q, table, lens = contiguous_rows(q), block_table.contiguous(), context_lens.contiguous()
    (tokens, heads, dim), (page, kv_heads) = q.shape, k_cache.shape[1:3]
    split, warps, stages = config(q)
    strides = [*q.stride()[:2], 0, 0, 0, 0, 0, 0]
    if k is not None:
        k, v = contiguous_rows(k), contiguous_rows(v)
        strides[2:6] = *k.stride()[:2], *v.stride()[:2]
    if cos is not None:
        cos, sin = contiguous_rows(cos), contiguous_rows(sin)
        strides[6:] = cos.stride(0), sin.stride(0)
    splits = triton.cdiv(table.shape[1] * page, split)
    programs = min(splits, triton.cdiv(PROGRAMS, tokens * kv_heads))
    chunk, values, slots = tokens, 0, splits + 1
    if programs > 1:
        chunk = min(tokens, max(1, WORKSPACE // (4 * heads * slots * (dim + 2))))
        values = chunk * heads * slots
    partial = torch.empty(values * dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(values * 2, dtype=torch.float32, device=q.device)
    launch = dependent_launch(q)
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        part = [x if x is None or chunk == tokens else x[rows] for x in (q, k, v, cos, sin, table, lens, out)]
        *new, part_table, part_lens, part_out = part
        with _runtime.launch_on(q):
            _decode_kernel[(rows.stop - start, kv_heads, max(1, programs))](
                *new, k_cache, v_cache, part_table, part_lens, addresses, part_out, partial, stats,
                scale * LOG2_E, slots, table.stride(0), *strides, *out.stride()[:2], *k_cache.stride()[:3],
                *v_cache.stride()[:3], GROUP=heads // kv_heads, D=dim, PAGE=page, SPLIT=split, MERGE=programs > 1,
                BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK_D=head_block(q),
                num_warps=warps, num_stages=stages, **launch,
            )  # fmt: skip
            if programs > 1:
                _merge_kernel[(rows.stop - start, heads)](
                    partial, stats, part_lens, part_out, slots, *out.stride()[:2], D=dim, SPLIT=split,
                    BLOCK_D=head_block(q), AHEAD=4, num_warps=1, **launch,
                )  # fmt: skip
    return out
