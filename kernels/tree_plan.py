"""Which tiles of tree attention meet: computed on the device, without a host that waits.

Query i sees key j when j <= i < key_end[j]. Forward and dq walk, for a block of PLAN_M queries, a list of the blocks
of PLAN_N keys that it can see: those that every query of the block sees whole first, the rest after them. For dk and
dv the queries of a key block are one range, [first key, largest key_end), walked once per query head of its group.
Ranges differ by orders of magnitude (a shared prefix is seen by all branches), so a long walk is cut into chunks of
equal length, whose sums another kernel adds in order.
"""

import triton
import triton.language as tl

# Programs per (key block, key head) wanted at least, so that uneven walks even out; fixed, so that sums are, too.
PROGRAMS = 512
SLOTS = 256  # pairs (key head, partial sum) that there is room for, though there be fewer key blocks
WINDOW = 32  # key blocks looked at together


@triton.jit(do_not_specialize=["T", "width"])
def _plan_queries_kernel(
    key_end, blocks, reach, T, width,
    PLAN_M: tl.constexpr, PLAN_N: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Row ``program`` of blocks (queries / PLAN_M, width): two counts, whole blocks from the left, others from the
    right; and the largest key_end of the blocks of KEYS keys that begin among these queries."""
    program = tl.program_id(0)
    first = program * PLAN_M
    last = tl.minimum(first + PLAN_M, T) - 1
    row = blocks + program.to(tl.int64) * width
    whole_count, other_count = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, last // PLAN_N + 1, WINDOW):
        block = start + tl.arange(0, WINDOW)
        n = block[:, None] * PLAN_N + tl.arange(0, PLAN_N)[None, :]
        end = tl.load(key_end + n, mask=n <= last, other=0)
        whole = tl.min(((n <= first) & (end > last)).to(tl.int32), 1)
        some = tl.max(((n <= last) & (end > tl.maximum(n, first))).to(tl.int32), 1)
        other = some - whole
        tl.store(row + 1 + whole_count + tl.cumsum(whole, 0), block, mask=whole > 0)
        tl.store(row + width - other_count - tl.cumsum(other, 0), block, mask=other > 0)
        whole_count += tl.sum(whole)
        other_count += tl.sum(other)
    tl.store(row, whole_count)
    tl.store(row + 1, other_count)
    BLOCKS: tl.constexpr = PLAN_M // KEYS
    key_block = program * BLOCKS + tl.arange(0, BLOCKS)
    n = key_block[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    end = tl.load(key_end + n, mask=n < T, other=0)
    tl.store(reach + key_block, tl.minimum(tl.max(end, 1), T), mask=key_block * KEYS < T)


@triton.jit(do_not_specialize=["key_blocks", "slots", "group", "kv_heads"])
def _plan_keys_kernel(
    reach, items, key_blocks, slots, group, kv_heads, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """items: [steps a chunk, number of items | block, chunk of each item | first slot, chunks of each block]."""
    block = tl.arange(0, BLOCK_B)
    inside = block < key_blocks
    end = tl.load(reach + block, mask=inside, other=0)
    steps = tl.where(inside, group * tl.cdiv(tl.maximum(end - block * BLOCK_N, 0), BLOCK_M), 0)
    most = tl.cdiv(tl.sum(steps.to(tl.int64)) * kv_heads, programs).to(tl.int32)
    most = tl.maximum(most, 4)
    while tl.sum(tl.where(steps > most, tl.cdiv(steps, most), 0)) > slots:
        most += most // 4 + 1
    chunks = tl.where(inside, tl.maximum(tl.cdiv(steps, most), 1), 0)
    used = tl.where(chunks > 1, chunks, 0)
    item = tl.cumsum(chunks, 0) - chunks
    tl.store(items, most)
    tl.store(items + 1, tl.sum(chunks))
    per_item, per_block = items + 2, items + 2 + 2 * (key_blocks + slots)
    tl.store(per_block + 2 * block, tl.cumsum(used, 0) - used, mask=inside)
    tl.store(per_block + 2 * block + 1, chunks, mask=inside)
    for chunk in range(0, tl.max(chunks)):
        tl.store(per_item + 2 * (item + chunk), block, mask=chunk < chunks)
        tl.store(per_item + 2 * (item + chunk) + 1, chunk, mask=chunk < chunks)


def launch_plan(key_end, blocks, items, group, kv_heads, plan, dkv):
    """Fill ``blocks`` and ``items`` (int32, sizes of :func:`plan_sizes`) from key_end (T,) int32."""
    T, (plan_m, plan_n), (block_m, block_n) = len(key_end), plan, dkv[:2]
    key_blocks = triton.cdiv(T, block_n)
    reach = key_end.new_empty(key_blocks)
    _plan_queries_kernel[(len(blocks),)](
        key_end, blocks, reach, T, blocks.shape[1],
        PLAN_M=plan_m, PLAN_N=plan_n, KEYS=block_n, WINDOW=WINDOW, num_warps=4,
    )  # fmt: skip
    _plan_keys_kernel[(1,)](
        reach, items, key_blocks, slots_of(key_blocks, kv_heads), group, kv_heads, PROGRAMS,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_B=max(16, triton.next_power_of_2(key_blocks)), num_warps=4,
    )  # fmt: skip


def slots_of(key_blocks, kv_heads):
    """Partial sums that there is room for: one float32 dk and dv, or ``SLOTS`` blocks if that is more."""
    return max(key_blocks, SLOTS // kv_heads)


def plan_sizes(T, plan, dkv, kv_heads):
    """Shape of blocks and number of items for T tokens."""
    (plan_m, plan_n), key_blocks = plan, triton.cdiv(T, dkv[1])
    items = 2 + 4 * key_blocks + 2 * slots_of(key_blocks, kv_heads)
    return (triton.cdiv(T, plan_m), 2 + triton.cdiv(T, plan_n)), items
