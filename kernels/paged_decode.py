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

Where a call has work for several rounds of a full card (``shares``), sequences 2 i and 2 i + 1 are compared on the
device: a full split for which their tables name the same blocks is read once for both, by their programs in turn. Two
have room in one product; a further product would take as long as another program's, whose reads the cache serves. The
arithmetic of a row is the same, bit for bit.

A step waits for a chain of loads: length and table, keys, queries. Where the caller vouches for all but q, k, v and
angles (``early``; ``append_attention`` says when it may) the chain runs up to the keys while the kernel that makes q
still ends, and only then waits; the merge waits for nothing but the parts.

Caches may hold int8 codes (``kv_store``): they are multiplied as they are, in q's dtype, which holds them exactly.
The keys' scales multiply the scores, the values' the probabilities, in float32.

For C tokens of context: 2 C KVH D elements read (codes: and 2 C KVH scales), 4 C H D FLOPs. Workspace: S H splits
(D + 2) float32 values, splits = ceil(tokens of the table's width / SPLIT), held to ``WORKSPACE`` bytes by taking the
sequences in chunks (of one at least).
"""

import torch
import triton
import triton.language as tl

from . import _runtime
from .dependent_launch import dependent_launch
from .kv_store import place, scale_strides
from .paged_merge import _merge_kernel
from .rotary import turn

PROGRAMS = 528  # programs that fill a card
EARLY_ROWS = 512  # more queries come from a library's kernel, which lets nothing start before its end
MERGE_WARPS = 8  # of a program of the merge, which has a warp for each two query heads
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
def _tables(
    table, sequence, sequences, split, width, table_row,
    PAGE_BITS: tl.constexpr, WARPS: tl.constexpr, KEYS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Blocks of a split's keys, 8 keys each (WARPS, KEYS // 8); with SHARE also a page each, of the sequence and of
    its neighbour. What stands beyond a context may be anything.
    """
    PAGE: tl.constexpr = 1 << PAGE_BITS
    SPLIT: tl.constexpr = WARPS * KEYS
    PAGES: tl.constexpr = SPLIT // PAGE if SPLIT > PAGE else 1
    at = split * (SPLIT // 8) + tl.arange(0, WARPS)[:, None] * (KEYS // 8) + tl.arange(0, KEYS // 8)[None, :]
    at = at >> (PAGE_BITS - 3)
    blocks = tl.load(table + sequence * table_row + at, mask=at < width, other=0)
    own, other = blocks, blocks
    if SHARE:
        at = split * SPLIT // PAGE + tl.arange(0, PAGES)
        own = tl.load(table + sequence * table_row + at, mask=at < width, other=0)
        there = (at < width) & ((sequence ^ 1) < sequences)
        other = tl.load(table + (sequence ^ 1) * table_row + at, mask=there, other=0)
    return blocks, own, other


@triton.jit
def _load_queries(
    q, cos, sin, owner, head, inside, angle_token,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Low and high halves of query rows and their angles, each (ROWS, 32 CHUNKS, 1)."""
    HALF: tl.constexpr = (D + 1) // 2
    c = tl.arange(0, 32 * CHUNKS)[None, :, None]
    at = q + (owner * Q_TOKEN + head * Q_HEAD)[:, None, None] + c
    there = inside[:, None, None] & (c < HALF)
    low = tl.load(at, mask=there, other=0.0)
    high = tl.load(at + HALF, mask=there & (HALF + c < D), other=0.0)
    turns, lifts = low, high
    if cos is not None:
        at = (owner * angle_token)[:, None, None] + c
        turns, lifts = tl.load(cos + at, mask=there, other=0.0), tl.load(sin + at, mask=there, other=0.0)
    return low, high, turns, lifts


@triton.jit
def _rotated(loaded, ROTATE: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, DTYPE: tl.constexpr):
    """Queries (1, ROWS, 64 CHUNKS), their columns in the keys' order, of what ``_load_queries`` gave."""
    low, high = loaded[0], loaded[1]
    if ROTATE:
        x, y = low.to(tl.float32), high.to(tl.float32)
        low, high = turn(x, -y, loaded[2], loaded[3]), turn(y, x, loaded[2], loaded[3])
    # Sums of one: every warp would else rotate what one rotation can share, and each load would wait for the last.
    low, high = tl.sum(low, 2).to(DTYPE), tl.sum(high, 2).to(DTYPE)
    queries = tl.join(low, high).reshape(ROWS, CHUNKS, 4, 2, 4, 2).permute(0, 5, 1, 3, 2, 4)
    return queries.reshape(1, ROWS, 64 * CHUNKS)


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
def _load_values(
    v_cache, page, inner, base, last, v_block, V_TOKEN: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr,
    WARPS: tl.constexpr, KEYS: tl.constexpr, LANES_FIRST: tl.constexpr,
):  # fmt: skip
    """Values (WARPS, KEYS, 64 CHUNKS) of the groups of 8 keys from ``base`` (WARPS, KEYS // 8) on."""
    t, g, i = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, 8)
    # Dimensions (t, g, w, j, odd, run, i): key 2 t + odd of a group, column 64 run + 8 g + i.
    column = 8 * g[:, None, None, None, None, None] + (64 * tl.arange(0, CHUNKS)[:, None] + i)
    number = 2 * t[:, None, None, None, None, None, None] + tl.arange(0, 2)[:, None, None]
    at = (page * v_block + inner * V_TOKEN)[:, :, None, None, None] + number * V_TOKEN
    there = base[:, :, None, None, None] + number < last
    if D < 64 * CHUNKS:
        there = there & (column < D)
    value = _load_dealt(v_cache + at + column, there, LANES_FIRST)
    return value.permute(2, 3, 0, 4, 5, 6, 1).reshape(WARPS, KEYS, 64 * CHUNKS)


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
    q, cos, sin, k_cache, v_cache, k_scales, v_scales, block_table, context_lens, addresses, partial, stats,
    scale_log2, sequences, slots, width, table_row, k_block, v_block, scale_block, scale_token, scale_head,
    angle_token,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, PAGE_BITS: tl.constexpr, WARPS: tl.constexpr, KEYS: tl.constexpr, SHARE: tl.constexpr,
    ROWS: tl.constexpr, SEAT: tl.constexpr, CHUNKS: tl.constexpr, LANES_FIRST: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, key head, p) leaves the parts of splits p, p + P, ... of P programs.

    Warp w has keys w * KEYS .. w * KEYS + KEYS - 1 of a split. EARLY: of the inputs only q awaits the kernel before.
    """
    SPLIT: tl.constexpr = WARPS * KEYS
    HALF: tl.constexpr = (D + 1) // 2
    sequence, kv_head, program = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    # Dimensions of a load: lanes (t of 4, g of 8), warps (w), groups of 8 keys (j), ..., runs of 8 values (i). Lanes
    # come first because that is how the compiler deals a tile out: it is then what tensor cores want.
    w, j = tl.arange(0, WARPS)[:, None], tl.arange(0, KEYS // 8)[None, :]
    t, g, i = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, 8)
    row = tl.arange(0, ROWS)
    head, heads = kv_head * GROUP + row % SEAT, tl.num_programs(1) * GROUP
    if PDL and not EARLY:
        _wait_and_release()
    # All that leads to the first keys is asked for at once; what leads to the next, while those are multiplied.
    last = tl.load(context_lens + sequence) - 1
    blocks, own, other = _tables(
        block_table, sequence, sequences, program, width, table_row, PAGE_BITS, WARPS, KEYS, SHARE
    )
    both = last
    if SHARE:
        neighbour = sequence ^ 1
        both = tl.minimum(last, tl.load(context_lens + neighbour, mask=neighbour < sequences, other=0) - 1)
    k_cache = place(k_cache, addresses, 0) + kv_head * K_HEAD
    v_cache = place(v_cache, addresses, 1) + kv_head * V_HEAD
    if k_scales is not None:
        k_scales = place(k_scales, addresses, 2) + kv_head * scale_head
        v_scales = place(v_scales, addresses, 3) + kv_head * scale_head
    for split in range(program, tl.cdiv(last, SPLIT), tl.num_programs(2)):
        # Of a pair's programs that have the same splits one takes the even rounds, the other the odd.
        owner, inside, mine = sequence + 0 * row, row < GROUP, True
        if SHARE:
            shared = (both >= (split + 1) * SPLIT) & (tl.max((own != other).to(tl.int32), 0) == 0)
            owner = tl.where(shared, (sequence >> 1 << 1) + row // SEAT, sequence)
            inside = (row % SEAT < GROUP) & (shared | (row < SEAT))
            mine = (shared == 0) | ((program + split // tl.num_programs(2)) % 2 == sequence % 2)
        page = blocks.to(tl.int64)
        blocks, own, other = _tables(
            block_table, sequence, sequences, split + tl.num_programs(2), width, table_row, PAGE_BITS, WARPS,
            KEYS, SHARE,
        )  # fmt: skip
        if mine:
            # Queries come ahead of the keys, which take their time, or when they may be read.
            if not EARLY:
                rows = _load_queries(
                    q, cos, sin, owner, head, inside, angle_token, Q_TOKEN, Q_HEAD, D, CHUNKS
                )
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
            keys = key.reshape(4, 8, WARPS, KEYS // 8, 2 * CHUNKS, 2, 4).permute(2, 4, 5, 0, 6, 3, 1)
            keys = keys.reshape(WARPS, 64 * CHUNKS, KEYS)
            values = _load_values(
                v_cache, page, inner, base, last, v_block, V_TOKEN, D, CHUNKS, WARPS, KEYS, LANES_FIRST
            )
            if k_scales is not None:
                at = (page * scale_block + inner * scale_token)[:, :, None] + g * scale_token
                there = base[:, :, None] + g < last
                k_scale = tl.load(k_scales + at, mask=there, other=0.0).reshape(WARPS, 1, KEYS)
                v_scale = tl.load(v_scales + at, mask=there, other=0.0).reshape(WARPS, 1, KEYS)
                # The largest of a warp is taken out: small ones would leave float16's range.
                largest = tl.max(v_scale, 2)[:, :, None]
                v_scale = v_scale / tl.where(largest > 0, largest, 1.0)
            if PDL and EARLY:
                _wait_and_release()
            keys, values = keys.to(q.dtype.element_ty), values.to(q.dtype.element_ty)
            if EARLY:
                rows = _load_queries(
                    q, cos, sin, owner, head, inside, angle_token, Q_TOKEN, Q_HEAD, D, CHUNKS
                )
            queries = _rotated(rows, cos is not None, ROWS, CHUNKS, keys.dtype)
            queries = queries.broadcast_to(WARPS, ROWS, 64 * CHUNKS)
            scores = tl.dot(queries, keys, input_precision="ieee") * scale_log2
            if k_scales is not None:
                scores *= k_scale
            n = split * SPLIT + (tl.arange(0, WARPS) * KEYS)[:, None, None] + tl.arange(0, KEYS)
            scores = tl.where(n < last, scores, float("-inf"))
            m = tl.max(tl.max(scores, 2), 0)
            p = tl.exp2(scores - m[None, :, None])
            l = tl.sum(tl.sum(p, 2), 0)
            if k_scales is not None:
                p *= v_scale
            part = tl.dot(p.to(keys.dtype), values, input_precision="ieee")
            if k_scales is not None:
                part *= largest
            part = _over_warps(part, WARPS, ROWS, 64 * CHUNKS)
            slot = (owner * heads + head) * slots + split
            tl.store(stats + slot * 2, m, mask=inside)
            tl.store(stats + slot * 2 + 1, l, mask=inside)
            x = tl.arange(0, 64 * CHUNKS)
            d = x // 64 * 64 + x % 8 * 8 + x % 64 // 8
            tl.store(partial + slot[:, None] * D + d[None, :], part, mask=inside[:, None] & (d < D)[None, :])
    if PDL and EARLY and program == 0:  # somebody must wait, so that this kernel ends after the one before
        _wait_and_release()


def shares(pairs, splits):
    """Whether ``pairs`` of a sequence and a key head, ``splits`` each, are worth comparing: they are where reading
    less saves rounds of programs, and not where all of them run at once anyway.
    """
    return 2 * pairs >= PROGRAMS or pairs * splits >= 4 * PROGRAMS


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
    q, k, v, cos, sin, k_cache, v_cache, k_scales, v_scales, block_table, context_lens, scale, addresses, early=False
):  # fmt: skip
    """Decode; with ``k`` and ``v`` these are stored as the last of each context, else they stand there already.

    early: no input but q, k, v, cos and sin is written by a kernel that may still run when this one starts.
    """
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
    rows = triton.next_power_of_2(group)
    tile, seat = (max(least, rows) for least in (16, 8))
    programs = max(1, min(splits, triton.cdiv(PROGRAMS, tokens * kv_heads)))
    chunk = min(tokens, max(1, WORKSPACE // (4 * heads * max(1, splits) * (dim + 2))))
    partial = torch.empty(chunk * heads * splits * dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(chunk * heads * splits * 2, dtype=torch.float32, device=q.device)
    launch = dependent_launch(q)
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        some = [x if x is None or chunk == tokens else x[part] for x in (q, k, v, cos, sin, table, lens, out)]
        some_q, some_k, some_v, *angles, some_table, some_lens, some_out = some
        shared = k_cache, v_cache, k_scales, v_scales, some_table, some_lens, addresses, partial, stats
        with _runtime.launch_on(q):
            _parts_kernel[(len(some_lens), kv_heads, programs)](
                some_q, *angles, *shared, scale * LOG2_E, len(some_lens), splits, table.shape[1], table.stride(0),
                k_cache.stride(0), v_cache.stride(0), *scale_strides(k_scales), angle_stride, *q_strides,
                *k_cache.stride()[1:3], *v_cache.stride()[1:3],
                GROUP=group, D=dim, PAGE=page, PAGE_BITS=page.bit_length() - 1, WARPS=warps,
                KEYS=keys, SHARE=2 * seat <= tile and shares(tokens * kv_heads, splits), ROWS=tile, SEAT=seat,
                CHUNKS=triton.next_power_of_2(triton.cdiv(dim, 64)),
                LANES_FIRST=LANES_FIRST, EARLY=early and tokens <= EARLY_ROWS,
                num_warps=warps, num_stages=1, **launch,
            )  # fmt: skip
            _merge_kernel[(len(some_lens), kv_heads)](
                some_q, some_k, some_v, *angles, *shared, some_out, scale * LOG2_E, splits, table.stride(0),
                angle_stride, *q_strides, *new_strides, *k_cache.stride()[:3], *v_cache.stride()[:3],
                *scale_strides(k_scales), *out.stride()[:2], GROUP=group, ROWS=rows, D=dim, PAGE=page, SPLIT=split,
                BLOCK_D=block_d, AHEAD=4, num_warps=max(1, min(MERGE_WARPS, rows // 2)), **launch,
            )  # fmt: skip
    return out
