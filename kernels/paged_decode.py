"""Decode over a paged key-value cache: one query a sequence, with or without rotation and store of its last token.

A context of C tokens is its last token, and splits of SPLIT tokens before it that are anchored at position 0:

    of split s:      m_s = max_j x_j       l_s = sum_j 2^(x_j - m_s)       a_s = sum_j 2^(x_j - m_s) v_j
    of the last:     m = x_{C-1}           l = 1                           a = v_{C-1}

with x_j = log2(e) * scale * q . k_j in float32. The parts are folded in order, the last token last, into a / l.
Programs (sequence, key head, p) leave the parts in a workspace, each key and value read once for all H / KVH query
heads; a second kernel folds them. How many programs share a context's splits depends on the shapes of a call, but
the parts, their order and so the bits do not: a sequence's result depends on neither its batch nor the width of the
table.

Keys and values go from memory straight to the registers of the lane that multiplies them. Warp w of a program has the
keys w KEYS .. w KEYS + KEYS - 1 of its split, and the warps' parts are added in a tree.

With ``cos`` and ``sin`` q and k are rotated in registers, rounded as ``rotary`` rounds them, and the cache gets the
rotated key. The last token's key and value are taken from the arguments, so nothing waits for their store.

Neighbouring sequences, up to FAMILY, whose tables name the same blocks for a full split are found on the device; one
program then reads the split once for all of them. The arithmetic of a row is the same, bit for bit.

For C tokens of context: 2 C KVH D elements read, 4 C H D FLOPs. Workspace: S H splits (D + 2) float32 values,
splits = ceil(tokens of the table's width / SPLIT), held to ``WORKSPACE`` bytes by taking the sequences in chunks (of
one at least).
"""

import torch
import triton
import triton.language as tl

from . import _runtime
from .dependent_launch import dependent_launch
from .kv_store import place
from .rotary import turn

PROGRAMS = 528  # programs that fill a card
FAMILY = 2  # neighbouring sequences that may share the reading of a split
WORKSPACE = 64 * 2**20  # bytes of workspace, unless one sequence needs more
LOG2_E = 1.4426950408889634

# Most bytes of a padded head row; WARPS and KEYS, whose product is SPLIT. One table for all cards: what the warps
# exchange fits the 99 KiB of sm_86, sm_89 and sm_120.
CONFIGS = ((128, (4, 32)), (256, (4, 32)), (512, (2, 16)), (1024, (2, 16)))

# Whether the compiler deals a tile's dimensions out to lanes, warps and registers from the first on.
LANES_FIRST = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)


@triton.jit
def _wait_and_release():
    """Wait for the kernel before; then let the next one's programs start, which may read what was complete by now."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


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
    queries, k, v, cos, sin, k_cache, v_cache, table, last, stores, scale_log2, k_row, v_row, angle_row,
    k_block, k_token, v_block, v_token, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(m, a) of the token at ``last``; where k and v bring it, it is put into the cache if ``stores``."""
    d = tl.arange(0, BLOCK_D)
    there = (d < D) & (last >= 0)
    block = tl.load(table + last // PAGE, mask=last >= 0, other=0).to(tl.int64)
    k_at = k_cache + block * k_block + last % PAGE * k_token + d
    v_at = v_cache + block * v_block + last % PAGE * v_token + d
    if k is None:
        key, value = tl.load(k_at, mask=there, other=0.0)[None, :], tl.load(v_at, mask=there, other=0.0)
    else:
        one = tl.zeros([1], tl.int64)
        key = _heads(k, cos, sin, one + k_row, one + angle_row, one == 0, D, BLOCK_D)
        value = tl.load(v + v_row + d, mask=there, other=0.0)
        tl.store(k_at[None, :], key, mask=(there & stores)[None, :])
        tl.store(v_at, value, mask=there & stores)
    m = tl.sum(queries.to(tl.float32) * key.to(tl.float32), 1) * scale_log2
    return m, tl.broadcast_to(value.to(tl.float32)[None, :], queries.shape)


@triton.jit
def _tables(
    table, sequence, sequences, split, width, table_row,
    PAGE_BITS: tl.constexpr, WARPS: tl.constexpr, KEYS: tl.constexpr, FAMILY: tl.constexpr,
):  # fmt: skip
    """Blocks of a split's keys, 8 keys each (WARPS, KEYS // 8), and of its family, a page each: (FAMILY, pages) of
    the members and of the sequence before each. What stands beyond a context may be anything.
    """
    PAGE: tl.constexpr = 1 << PAGE_BITS
    SPLIT: tl.constexpr = WARPS * KEYS
    PAGES: tl.constexpr = SPLIT // PAGE if SPLIT > PAGE else 1
    at = split * (SPLIT // 8) + tl.arange(0, WARPS)[:, None] * (KEYS // 8) + tl.arange(0, KEYS // 8)[None, :]
    at = at >> (PAGE_BITS - 3)
    blocks = tl.load(table + sequence * table_row + at, mask=at < width, other=0)
    own, earlier = blocks, blocks
    if FAMILY > 1:
        base = sequence // FAMILY * FAMILY
        i = (base + tl.arange(0, FAMILY))[:, None]
        at = (split * SPLIT // PAGE + tl.arange(0, PAGES))[None, :]
        there = (i < sequences) & (at < width)
        own = tl.load(table + i * table_row + at, mask=there, other=0)
        earlier = tl.load(table + tl.maximum(i - 1, base) * table_row + at, mask=there, other=0)
    return blocks, own, earlier


@triton.jit
def _family(own, earlier, lens, lens_earlier, sequence, split, SPLIT: tl.constexpr, FAMILY: tl.constexpr):
    """How many sequences from this one on have this split, full, in the same blocks; 0: an earlier one speaks for it.

    None across a multiple of FAMILY, whose sequences have ``lens``; each has ``lens_earlier`` before it.
    """
    member, base = tl.arange(0, FAMILY), sequence // FAMILY * FAMILY
    full = tl.minimum(lens, lens_earlier) > (split + 1) * SPLIT
    joined = full & (member > 0) & (tl.max((own != earlier).to(tl.int32), 1) == 0)
    place = sequence - base
    led = tl.max(((member == place) & joined).to(tl.int32), 0)
    stop = tl.min(tl.where((member > place) & (joined == 0), member, FAMILY), 0)
    return tl.where(led > 0, 0, stop - place)


@triton.jit
def _load_dealt(at, there, LANES_FIRST: tl.constexpr):
    """Load a tile whose first dimensions are the lanes', zero where it is not ``there``."""
    at, there = tl.broadcast(at, there)
    if LANES_FIRST:
        tile = tl.load(at, mask=there, other=0.0)
    elif len(at.shape) == 6:
        at, there = at.permute(4, 3, 2, 1, 0, 5), there.permute(4, 3, 2, 1, 0, 5)
        tile = tl.load(at, mask=there, other=0.0).permute(4, 3, 2, 1, 0, 5)
    else:
        at, there = at.permute(5, 4, 3, 2, 1, 0, 6), there.permute(5, 4, 3, 2, 1, 0, 6)
        tile = tl.load(at, mask=there, other=0.0).permute(5, 4, 3, 2, 1, 0, 6)
    return tile


@triton.jit
def _over_warps(x, WARPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of (WARPS, ROWS, COLUMNS) over the warps, in a tree: one exchange, then additions of registers."""
    x = x.permute(1, 2, 0)
    if WARPS == 8:
        even, odd = tl.split(x.reshape(ROWS, COLUMNS, 4, 2))
        x = even + odd
    if WARPS >= 4:
        even, odd = tl.split(x.reshape(ROWS, COLUMNS, 2, 2))
        x = even + odd
    if WARPS >= 2:
        even, odd = tl.split(x)
        x = even + odd
    return x.reshape(ROWS, COLUMNS)


@triton.jit(do_not_specialize=["sequences", "slots", "width"])
def _parts_kernel(
    q, cos, sin, k_cache, v_cache, block_table, context_lens, addresses, partial, stats, scale_log2,
    sequences, slots, width, table_row, k_block, v_block, angle_token,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, PAGE_BITS: tl.constexpr, WARPS: tl.constexpr, KEYS: tl.constexpr, FAMILY: tl.constexpr,
    ROWS: tl.constexpr, SEAT: tl.constexpr, CHUNKS: tl.constexpr, LANES_FIRST: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, key head, p) leaves the parts of splits p, p + P, ... of P programs.

    Warp w has keys w * KEYS .. w * KEYS + KEYS - 1 of a split. EARLY: of the inputs only q awaits the kernel before.
    """
    SPLIT: tl.constexpr = WARPS * KEYS
    HALF: tl.constexpr = (D + 1) // 2
    TOGETHER: tl.constexpr = ROWS // SEAT if FAMILY > 1 else 1
    sequence, kv_head, program = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    # Dimensions of a load: lanes (t of 4, g of 8), warps (w), groups of 8 keys (j), ..., runs of 8 values (i). Lanes
    # come first because that is how the compiler deals a tile out: it is then what tensor cores want.
    w, j = tl.arange(0, WARPS)[:, None], tl.arange(0, KEYS // 8)[None, :]
    t, g, i = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, 8)
    row, c = tl.arange(0, ROWS), tl.arange(0, 32 * CHUNKS)
    head, heads = kv_head * GROUP + row % SEAT, tl.num_programs(1) * GROUP
    if PDL and not EARLY:
        _wait_and_release()
    # All that leads to the first keys is asked for at once; what leads to the next, while those are multiplied.
    last = tl.load(context_lens + sequence) - 1
    blocks, own, earlier = _tables(
        block_table, sequence, sequences, program, width, table_row, PAGE_BITS, WARPS, KEYS, FAMILY
    )
    lens, lens_earlier = last, last
    if FAMILY > 1:
        eldest = sequence // FAMILY * FAMILY
        members = eldest + tl.arange(0, FAMILY)
        lens = tl.load(context_lens + members, mask=members < sequences, other=0)
        others = tl.maximum(members - 1, eldest)
        lens_earlier = tl.load(context_lens + others, mask=members < sequences, other=0)
    k_cache = place(k_cache, addresses, 0) + kv_head * K_HEAD
    v_cache = place(v_cache, addresses, 1) + kv_head * V_HEAD
    for split in range(program, tl.cdiv(last, SPLIT), tl.num_programs(2)):
        count = tl.full([], 1, tl.int64)
        if FAMILY > 1:
            count = _family(own, earlier, lens, lens_earlier, sequence, split, SPLIT, FAMILY)
        page = blocks.to(tl.int64)
        blocks, own, earlier = _tables(
            block_table, sequence, sequences, split + tl.num_programs(2), width, table_row, PAGE_BITS, WARPS,
            KEYS, FAMILY,
        )  # fmt: skip
        if count > 0:
            base = split * SPLIT + w * KEYS + 8 * j  # (w, j): the first of 8 keys
            inner = base & (PAGE - 1)
            # Keys (t, g, w, j, chunk, i): key g of a group, column 32 chunk + 8 t + i of the low half, then the high.
            chunk = tl.arange(0, 2 * CHUNKS)[:, None]
            column = 8 * t[:, None, None, None, None, None] + (chunk % CHUNKS * 32 + i)
            number = g[:, None, None, None, None]
            at = (page * k_block + inner * K_TOKEN)[:, :, None, None] + number * K_TOKEN
            there = base[:, :, None, None] + number < last
            if HALF < 32 * CHUNKS or 2 * HALF > D:
                there = there & (column < HALF) & (chunk // CHUNKS * HALF + column < D)
            key = _load_dealt(k_cache + at + (chunk // CHUNKS * HALF + column), there, LANES_FIRST)
            # Values (t, g, w, j, odd, run, i): key 2 t + odd of a group, column 64 run + 8 g + i.
            column = 8 * g[:, None, None, None, None, None] + (64 * tl.arange(0, CHUNKS)[:, None] + i)
            number = 2 * t[:, None, None, None, None, None, None] + tl.arange(0, 2)[:, None, None]
            at = (page * v_block + inner * V_TOKEN)[:, :, None, None, None] + number * V_TOKEN
            there = base[:, :, None, None, None] + number < last
            if D < 64 * CHUNKS:
                there = there & (column < D)
            value = _load_dealt(v_cache + at + column, there, LANES_FIRST)
            keys = key.reshape(4, 8, WARPS, KEYS // 8, 2 * CHUNKS, 2, 4).permute(2, 4, 5, 0, 6, 3, 1)
            keys = keys.reshape(WARPS, 64 * CHUNKS, KEYS)
            values = value.permute(2, 3, 0, 4, 5, 6, 1).reshape(WARPS, KEYS, 64 * CHUNKS)
            if PDL and EARLY:
                _wait_and_release()
            for first in tl.range(0, count, TOGETHER, num_stages=1):
                member = first + row // SEAT
                inside = (member < count) & (row < TOGETHER * SEAT) & (row % SEAT < GROUP)
                owner = sequence + member
                # Queries, rotated, their columns in the keys' order. The last dimension, of one, is summed away: this
                # shares a rotation that every warp would else make, and keeps the loads together.
                q_at = q + (owner * Q_TOKEN + head * Q_HEAD)[:, None, None] + c[None, :, None]
                q_there = inside[:, None, None] & (c < HALF)[None, :, None]
                low = tl.load(q_at, mask=q_there, other=0.0)
                high = tl.load(q_at + HALF, mask=q_there & (HALF + c < D)[None, :, None], other=0.0)
                if cos is not None:
                    x, y = low.to(tl.float32), high.to(tl.float32)
                    angle_at = (owner * angle_token)[:, None, None] + c[None, :, None]
                    turns = tl.load(cos + angle_at, mask=q_there, other=0.0)
                    lifts = tl.load(sin + angle_at, mask=q_there, other=0.0)
                    low, high = turn(x, -y, turns, lifts), turn(y, x, turns, lifts)
                low, high = tl.sum(low, 2).to(value.dtype), tl.sum(high, 2).to(value.dtype)
                queries = tl.join(low, high).reshape(ROWS, CHUNKS, 4, 2, 4, 2).permute(0, 5, 1, 3, 2, 4)
                queries = queries.reshape(1, ROWS, 64 * CHUNKS).broadcast_to(WARPS, ROWS, 64 * CHUNKS)
                scores = tl.dot(queries, keys, input_precision="ieee") * scale_log2
                n = split * SPLIT + (tl.arange(0, WARPS) * KEYS)[:, None, None] + tl.arange(0, KEYS)
                scores = tl.where(n < last, scores, float("-inf"))
                m = tl.max(tl.max(scores, 2), 0)
                p = tl.exp2(scores - m[None, :, None])
                l = tl.sum(tl.sum(p, 2), 0)
                part = tl.dot(p.to(value.dtype), values, input_precision="ieee")
                part = _over_warps(part, WARPS, ROWS, 64 * CHUNKS)
                slot = (owner * heads + head) * slots + split
                tl.store(stats + slot * 2, m, mask=inside)
                tl.store(stats + slot * 2 + 1, l, mask=inside)
                x = tl.arange(0, 64 * CHUNKS)
                d = x // 64 * 64 + x % 8 * 8 + x % 64 // 8
                tl.store(
                    partial + slot[:, None] * D + d[None, :], part, mask=inside[:, None] & (d < D)[None, :]
                )
    if (
        PDL and EARLY and program == 0
    ):  # one program at least waits, so that this kernel ends after the one before
        _wait_and_release()


@triton.jit(do_not_specialize=["slots"])
def _merge_kernel(
    q, k, v, cos, sin, k_cache, v_cache, block_table, context_lens, addresses, partial, stats, out, scale_log2,
    slots, table_row, angle_token, q_token, q_head, new_k_token, new_k_head, new_v_token, new_v_head,
    k_block, k_token, k_head, v_block, v_token, v_head, out_token, out_head,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out of one (sequence, head): its parts folded in order, AHEAD of them loaded together, then the last token.

    The parts' kernel has promised that all before it is complete: only its own output awaits its end. What is stored
    here it does not read.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kv_head = head // GROUP
    d, one = tl.arange(0, BLOCK_D), tl.zeros([1], tl.int64)
    last = tl.load(context_lens + sequence) - 1
    angle_row = sequence * angle_token
    q_row = sequence * q_token + head * q_head
    query = _heads(q, cos, sin, one + q_row, one + angle_row, one == 0, D, BLOCK_D)
    m_last, last_part = _last_part(
        query, k, v, cos, sin, place(k_cache, addresses, 0) + kv_head * k_head,
        place(v_cache, addresses, 1) + kv_head * v_head, block_table + sequence * table_row, last, head % GROUP == 0,
        scale_log2, sequence * new_k_token + kv_head * new_k_head, sequence * new_v_token + kv_head * new_v_head,
        angle_row, k_block, k_token, v_block, v_token, D, PAGE, BLOCK_D,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    first = (sequence * tl.num_programs(1) + head) * slots
    parts = tl.cdiv(tl.maximum(last, 0), SPLIT)
    m, l = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    for begin in range(0, parts, AHEAD):
        loaded = ()
        for i in tl.static_range(AHEAD):
            at, there = one + (first + begin + i), one + (begin + i) < parts
            loaded = loaded + (
                (
                    tl.load(stats + 2 * at, mask=there, other=float("-inf")),
                    tl.load(stats + 2 * at + 1, mask=there, other=0.0),
                    tl.load(partial + at[:, None] * D + d, mask=there[:, None] & (d < D), other=0.0),
                ),
            )
        for i in tl.static_range(AHEAD):
            m, l, acc = _fold(m, l, acc, loaded[i][0], loaded[i][1], loaded[i][2])
    m, l, acc = _fold(m, l, acc, m_last, tl.full([1], 1.0, tl.float32), last_part)
    result = (acc / l[:, None]).to(out.dtype.element_ty)  # an empty context has one key and value, of zeros
    tl.store(out + sequence * out_token + head * out_head + d[None, :], result, mask=(d < D)[None, :])


def head_block(q):
    """The head dimension of ``q``, padded to what tiles can have."""
    return max(16, triton.next_power_of_2(q.shape[2]))


def config(q):
    """Warps of a split and keys of a warp, for queries like ``q``."""
    width = head_block(q) * q.element_size()
    return next(tiles for most, tiles in CONFIGS if width <= most)


def contiguous_rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def paged_decode(
    q, k, v, cos, sin, k_cache, v_cache, block_table, context_lens, scale, addresses, early=False
):
    """Decode; with ``k`` and ``v`` these are stored as the last of each context, else they stand there already."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q) == 0:
        return out
    q, table, lens = contiguous_rows(q), block_table.contiguous(), context_lens.contiguous()
    (tokens, heads, dim), (page, kv_heads) = q.shape, k_cache.shape[1:3]
    warps, keys = config(q)
    group, split, block_d = heads // kv_heads, warps * keys, head_block(q)
    q_strides, new_strides, angle_stride = q.stride()[:2], (0, 0, 0, 0), 0
    if k is not None:
        k, v = contiguous_rows(k), contiguous_rows(v)
        new_strides = *k.stride()[:2], *v.stride()[:2]
    if cos is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
        angle_stride = cos.stride(0)
    splits = triton.cdiv(table.shape[1] * page, split)
    programs = max(1, min(splits, triton.cdiv(PROGRAMS, tokens * kv_heads)))
    chunk = min(tokens, max(1, WORKSPACE // (4 * heads * max(1, splits) * (dim + 2))))
    partial = torch.empty(chunk * heads * splits * dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(chunk * heads * splits * 2, dtype=torch.float32, device=q.device)
    launch = dependent_launch(q)
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        some = [x if x is None or chunk == tokens else x[part] for x in (q, k, v, cos, sin, table, lens, out)]
        some_q, some_k, some_v, *angles, some_table, some_lens, some_out = some
        shared = k_cache, v_cache, some_table, some_lens, addresses, partial, stats
        with _runtime.launch_on(q):
            _parts_kernel[(len(some_lens), kv_heads, programs)](
                some_q, *angles, *shared, scale * LOG2_E, len(some_lens), splits, table.shape[1], table.stride(0),
                k_cache.stride(0), v_cache.stride(0), angle_stride, *q_strides, *k_cache.stride()[1:3],
                *v_cache.stride()[1:3], GROUP=group, D=dim, PAGE=page, PAGE_BITS=page.bit_length() - 1, WARPS=warps,
                KEYS=keys, FAMILY=FAMILY, ROWS=max(16, triton.next_power_of_2(group)),
                SEAT=max(8, triton.next_power_of_2(group)), CHUNKS=triton.next_power_of_2(triton.cdiv(dim, 64)),
                LANES_FIRST=LANES_FIRST, EARLY=early, num_warps=warps, num_stages=1, **launch,
            )  # fmt: skip
            _merge_kernel[(len(some_lens), heads)](
                some_q, some_k, some_v, *angles, *shared, some_out, scale * LOG2_E, splits, table.stride(0),
                angle_stride, *q_strides, *new_strides, *k_cache.stride()[:3], *v_cache.stride()[:3],
                *out.stride()[:2], GROUP=group, D=dim, PAGE=page, SPLIT=split, BLOCK_D=block_d, AHEAD=4,
                num_warps=1, **launch,
            )  # fmt: skip
    return out
