"""Attention over a paged key-value cache: split-KV decode, chunked prefill, and the store into the cache.

For query position p of a sequence and head h, with g = h // (H / KVH) its key head,

    out[p, h] = sum_{j <= p} softmax_j(scale * q[p, h] . k[j, g]) v[j, g]

where key j of sequence i stands in the cache at ``[block_table[i, j // block_size], j % block_size]``. The
queries of a sequence are the last positions of its context, so one op serves prefill, chunked prefill behind
a cached prefix, and decode.

Decode cuts a context into splits of ``SPLIT`` tokens anchored at position 0. One program per (sequence, key
head, split) reads each key and value once for all H / KVH query heads; a second kernel merges the splits in
order. So a sequence's result depends on neither its batch nor the width of the table. For C tokens of context
it reads 2 C KVH D elements and does 4 C H D FLOPs. Its workspace is S H ceil(max_context / SPLIT) (D + 2)
float32 values, held to ``WORKSPACE`` bytes by taking the sequences in chunks (of one at least).
Prefill walks the pages of a sequence once per (query block, head); it needs no workspace.

Scores, softmax and sums are float32 (float64 for float64 inputs, on the CPU only); probabilities are rounded
to the dtype of the values before the second product. Inference only: the outputs carry no gradient.
What unused slots hold never reaches a result, and table entries beyond a context may be anything.
A CUDA graph fixes the caches' addresses at capture; with ``addresses`` the kernels read them from the device when
they run, so that the caches may move between replays (their strides may not change).

Papers: PagedAttention, arXiv 2309.06180; FlashAttention-2, arXiv 2307.08691; Flash-Decoding, Dao et al. 2023.
"""

import torch
import triton
import triton.language as tl

from . import _runtime
from .paged_attention_cpu import paged_attention_cpu, store_kv_cpu

SPLIT = 256  # tokens; fixed, so that the order of a row's additions is fixed
WORKSPACE = 64 * 2**20  # bytes of decode workspace, unless one sequence needs more
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU_DTYPES = (*DTYPES, torch.float64)
LOG2_E = 1.4426950408889634

# Most bytes of a padded head row; decode (BLOCK_N, warps, stages); prefill (BLOCK_M, BLOCK_N, warps, stages).
# One table for all cards: each entry fits the 99 KiB of sm_86, sm_89 and sm_120.
CONFIGS = (
    (128, (64, 4, 3), (128, 64, 4, 2)),
    (256, (64, 4, 2), (64, 64, 4, 2)),
    (512, (32, 4, 2), (64, 32, 4, 1)),
    (1024, (16, 4, 2), (32, 16, 4, 1)),
)


def store_kv_ref(k, v, k_cache, v_cache, slot_mapping):
    """Specification of :func:`store_kv`, in place."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    block_size = k_cache.shape[1]
    k_cache[slots // block_size, slots % block_size] = k[kept]
    v_cache[slots // block_size, slots % block_size] = v[kept]


def paged_attention_ref(q, k_cache, v_cache, block_table, context_lens, *, cu_seqlens_q=None, scale=None):
    """Specification of :func:`paged_attention`: one sequence at a time, in the dtype of the inputs."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k_cache.shape[2]
    bounds = range(len(q) + 1) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    out = torch.zeros_like(q)
    for i, context in enumerate(context_lens.tolist()):
        start, stop = bounds[i], bounds[i + 1]
        if context == 0 or start == stop:
            continue
        position = torch.arange(context, device=q.device)
        block, offset = block_table[i][position // k_cache.shape[1]].long(), position % k_cache.shape[1]
        k = k_cache[block, offset].repeat_interleave(group, dim=1)
        v = v_cache[block, offset].repeat_interleave(group, dim=1)
        scores = scale * torch.einsum("qhd,khd->hqk", q[start:stop], k)
        scores = scores.masked_fill(position > position[start - stop :, None], -torch.inf)
        out[start:stop] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out


@triton.jit
def _place(cache, addresses, index: tl.constexpr):
    """The cache's pointer, read from ``addresses`` where these are given."""
    if addresses is None:
        return cache
    else:
        return tl.multiple_of(tl.load(addresses + index).to(cache.dtype, bitcast=True), 16)


@triton.jit
def _store_kv_kernel(
    k, v, k_cache, v_cache, slot_mapping, addresses,
    k_token, k_head, v_token, v_head,
    k_cache_block, k_cache_token, k_cache_head, v_cache_block, v_cache_token, v_cache_head,
    ROW: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    k_cache, v_cache = _place(k_cache, addresses, 0), _place(v_cache, addresses, 1)
    block, offset = slot // PAGE, slot % PAGE
    column = tl.arange(0, BLOCK)
    inside = column < ROW
    head, d = column // D, column % D
    key = tl.load(k + token * k_token + head * k_head + d, mask=inside)
    value = tl.load(v + token * v_token + head * v_head + d, mask=inside)
    k_row = k_cache + block * k_cache_block + offset * k_cache_token
    v_row = v_cache + block * v_cache_block + offset * v_cache_token
    tl.store(k_row + head * k_cache_head + d, key, mask=inside)
    tl.store(v_row + head * v_cache_head + d, value, mask=inside)


@triton.jit
def _attend(
    q, m, l, acc, position, n, context, k_cache, v_cache, table, scale_log2,
    k_block, k_token, v_block, v_token, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys ``n`` for query rows at ``position``: the online softmax's step, in base 2."""
    d = tl.arange(0, BLOCK_D)
    present = n < context
    block = tl.load(table + n // PAGE, mask=present, other=0).to(tl.int64)
    # Absent keys and values load as zeros: what an unused slot holds must not reach a product.
    mask = present[:, None] & (d < D)[None, :]
    key = tl.load(
        k_cache + (block * k_block + n % PAGE * k_token)[:, None] + d[None, :], mask=mask, other=0.0
    )
    value = tl.load(
        v_cache + (block * v_block + n % PAGE * v_token)[:, None] + d[None, :], mask=mask, other=0.0
    )
    scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale_log2
    visible = present[None, :] & (n[None, :] <= position[:, None])
    scores = tl.where(visible, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    shrink = tl.exp2(m - m_new)
    p = tl.exp2(scores - m_new[:, None])
    l = l * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
    return m_new, l, acc


@triton.jit
def _decode_kernel(
    q, k_cache, v_cache, block_table, context_lens, addresses, out, partial, maxima, sums, scale_log2, splits,
    table_row, q_token, q_head, out_token, out_head, k_block, k_token, k_head, v_block, v_token, v_head,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, MERGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_lens + sequence)
    k_cache, v_cache = _place(k_cache, addresses, 0), _place(v_cache, addresses, 1)
    start = split * SPLIT
    if MERGE:
        if start >= context:
            return
    row, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + row
    inside = (row < GROUP)[:, None] & (d < D)[None, :]
    queries = tl.load(q + sequence * q_token + head[:, None] * q_head + d[None, :], mask=inside, other=0.0)
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    position = tl.zeros([BLOCK_G], tl.int32) + (context - 1)
    for first in range(start, tl.minimum(start + SPLIT, context), BLOCK_N):
        m, l, acc = _attend(
            queries, m, l, acc, position, first + tl.arange(0, BLOCK_N), context,
            k_cache + kv_head * k_head, v_cache + kv_head * v_head, block_table + sequence * table_row,
            scale_log2, k_block, k_token, v_block, v_token, D, PAGE, BLOCK_D,
        )  # fmt: skip
    if MERGE:
        slot = (sequence * tl.num_programs(1) * GROUP + head) * splits + split
        tl.store(maxima + slot, m, mask=row < GROUP)
        tl.store(sums + slot, l, mask=row < GROUP)
        tl.store(partial + slot[:, None] * D + d[None, :], acc, mask=inside)
    else:  # one split is the whole context: what the merge of it would give, bit for bit
        result = acc / tl.where(l > 0, l, 1.0)[:, None]
        to = out + sequence * out_token + head[:, None] * out_head + d[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _merge_kernel(
    partial, maxima, sums, context_lens, out, splits, out_token, out_head,
    D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    first = (sequence * tl.num_programs(1) + head) * splits
    m, l = float("-inf"), 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for split in range(0, tl.cdiv(tl.load(context_lens + sequence), SPLIT)):
        m_split = tl.load(maxima + first + split)
        m_new = tl.maximum(m, m_split)
        shrink, grow = tl.exp2(m - m_new), tl.exp2(m_split - m_new)
        l = l * shrink + tl.load(sums + first + split) * grow
        acc = acc * shrink + tl.load(partial + (first + split) * D + d, mask=d < D, other=0.0) * grow
        m = m_new
    result = acc / tl.where(l > 0, l, 1.0)  # an empty context gives zero
    tl.store(out + sequence * out_token + head * out_head + d, result.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _prefill_kernel(
    q, k_cache, v_cache, block_table, context_lens, addresses, cu_seqlens_q, out, scale_log2, sequences, table_row,
    q_token, q_head, out_token, out_head, k_block, k_token, k_head, v_block, v_token, v_head,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(1)
    # Sequence i owns the programs from cu_seqlens_q[i] // BLOCK_M + i: an upper bound that needs no host.
    low = tl.full([], 0, tl.int32)
    high = low + (sequences - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens_q + middle) // BLOCK_M + middle <= program:
            low = middle
        else:
            high = middle - 1
    begin, end = tl.load(cu_seqlens_q + low), tl.load(cu_seqlens_q + low + 1)
    first_row = (program - begin // BLOCK_M - low) * BLOCK_M
    if first_row >= end - begin:
        return
    sequence, context = low.to(tl.int64), tl.load(context_lens + low)
    k_cache, v_cache = _place(k_cache, addresses, 0), _place(v_cache, addresses, 1)
    row, d = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    position = context - (end - begin) + row
    token = (begin + row).to(tl.int64)
    inside = (row < end - begin)[:, None] & (d < D)[None, :]
    queries = tl.load(q + token[:, None] * q_token + head * q_head + d[None, :], mask=inside, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, tl.minimum(context, context - (end - begin) + first_row + BLOCK_M), BLOCK_N):
        m, l, acc = _attend(
            queries, m, l, acc, position, first + tl.arange(0, BLOCK_N), context,
            k_cache + head // GROUP * k_head, v_cache + head // GROUP * v_head,
            block_table + sequence * table_row, scale_log2,
            k_block, k_token, v_block, v_token, D, PAGE, BLOCK_D,
        )  # fmt: skip
    result = acc / tl.where(l > 0, l, 1.0)[:, None]
    to = out + token[:, None] * out_token + head * out_head + d[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=inside)


def _store_kv_triton(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor,
    addresses: torch.Tensor | None,
) -> None:  # fmt: skip
    tokens, kv_heads, dim = k.shape
    if tokens == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    with _runtime.launch_on(k):
        _store_kv_kernel[(tokens,)](
            k, v, k_cache, v_cache, slot_mapping.contiguous(), addresses, *k.stride()[:2], *v.stride()[:2],
            *k_cache.stride()[:3], *v_cache.stride()[:3],
            ROW=kv_heads * dim, D=dim, PAGE=k_cache.shape[1], BLOCK=triton.next_power_of_2(kv_heads * dim),
            num_warps=4,
        )  # fmt: skip


def _paged_attention_triton(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    context_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None, scale: float, addresses: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    make = torch.empty if cu_seqlens_q is None else torch.zeros
    out = make(q.shape, dtype=q.dtype, device=q.device)
    if len(q) == 0:
        return out
    q = q if q.stride(-1) == 1 else q.contiguous()
    table, lens = block_table.contiguous(), context_lens.contiguous()
    (tokens, heads, dim), (page, kv_heads) = q.shape, k_cache.shape[1:3]
    block_d = max(16, triton.next_power_of_2(dim))
    decode, prefill = next(tiles for most, *tiles in CONFIGS if block_d * q.element_size() <= most)
    cache_strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    shape = {"GROUP": heads // kv_heads, "D": dim, "PAGE": page, "BLOCK_D": block_d}
    if cu_seqlens_q is not None:
        block_m, block_n, warps, stages = prefill
        with _runtime.launch_on(q):
            _prefill_kernel[(triton.cdiv(tokens, block_m) + len(lens), heads)](
                q, k_cache, v_cache, table, lens, addresses, cu_seqlens_q.contiguous(), out, scale * LOG2_E,
                len(lens), table.stride(0), *q.stride()[:2], *out.stride()[:2], *cache_strides, **shape,
                BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return out
    block_n, warps, stages = decode
    splits = max(1, triton.cdiv(table.shape[1] * page, SPLIT))
    chunk = tokens if splits == 1 else min(tokens, max(1, WORKSPACE // (4 * heads * splits * (dim + 2))))
    values = 0 if splits == 1 else chunk * heads * splits
    partial = torch.empty(values * dim, dtype=torch.float32, device=q.device)
    maxima, sums = torch.empty(2, values, dtype=torch.float32, device=q.device)
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        with _runtime.launch_on(q):
            _decode_kernel[(rows.stop - start, kv_heads, splits)](
                q[rows], k_cache, v_cache, table[rows], lens[rows], addresses, out[rows], partial, maxima, sums,
                scale * LOG2_E, splits, table.stride(0), *q.stride()[:2], *out.stride()[:2], *cache_strides,
                **shape, SPLIT=SPLIT, MERGE=splits > 1, BLOCK_N=block_n,
                BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)),
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
            if splits > 1:
                _merge_kernel[(rows.stop - start, heads)](
                    partial, maxima, sums, lens[rows], out[rows], splits, *out.stride()[:2],
                    D=dim, SPLIT=SPLIT, BLOCK_D=block_d, num_warps=1,
                )  # fmt: skip
    return out


_store_kv = torch.library.custom_op(
    f"{_runtime.LIB}::store_kv", _store_kv_triton, mutates_args=("k_cache", "v_cache"), device_types="cuda"
)
_store_kv.register_kernel("cpu")(_store_kv_triton if _runtime.INTERPRET else store_kv_cpu)
_store_kv.register_fake(lambda *inputs: None)
_paged_attention = _runtime.register(
    "paged_attention",
    triton_impl=_paged_attention_triton,
    torch_impl=paged_attention_cpu,
    fake=lambda q, *others: torch.empty(q.shape, dtype=q.dtype, device=q.device),
)


# The checks below make their messages on failure only: a decode step comes here twice a layer.
def _check_caches(x, k_cache, v_cache):
    """``x`` (T, heads, D) and the two caches must agree in head dimension, dtype and device."""
    page = k_cache.shape[1] if k_cache.ndim == 4 else 0
    if page < 16 or page & (page - 1) or v_cache.shape != k_cache.shape:
        raise ValueError(
            "expected caches of one shape (num_blocks, block_size, KVH, D), block_size a power of two >= 16, "
            f"got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(
            f"expected caches contiguous in D, got strides {k_cache.stride()} and {v_cache.stride()}"
        )
    dim, dtype, device = k_cache.shape[3], x.dtype, x.device
    if x.ndim != 3 or x.shape[2] != dim or not 1 <= dim <= 256:
        raise ValueError(
            f"expected (T, heads, D), D = {dim} of the caches, at most 256, got {tuple(x.shape)}"
        )
    allowed = CPU_DTYPES if device.type == "cpu" else DTYPES
    if dtype not in allowed or k_cache.dtype != dtype or v_cache.dtype != dtype:
        raise ValueError(
            f"expected one floating dtype, got {dtype} and caches of {k_cache.dtype}, {v_cache.dtype}"
        )
    if k_cache.device != device or v_cache.device != device:
        raise ValueError(
            f"expected one device, got {device} and caches on {k_cache.device}, {v_cache.device}"
        )


def _check_index(name, index, shape, dtype, device):
    if index.shape != shape or index.dtype != dtype or index.device != device:
        got = f"{tuple(index.shape)} {index.dtype} on {index.device}"
        raise ValueError(f"{name} must be {shape} {dtype} on {device}, got {got}")


def _check_addresses(addresses, device):
    if addresses is not None:
        if device.type == "cpu" and not _runtime.INTERPRET:
            raise ValueError("addresses are read by kernels on a GPU, got caches on the CPU")
        _check_index("addresses", addresses, (2,), torch.int64, device)


def store_kv(k, v, k_cache, v_cache, slot_mapping, *, addresses=None):
    """Write the keys and values of T tokens into the paged cache, in place.

    Args:
        k, v: (T, KVH, D), the dtype of the caches.
        k_cache, v_cache: (num_blocks, block_size, KVH, D); block_size a power of two >= 16. Written.
        slot_mapping: (T,) int64, slot = block * block_size + offset; -1 skips the token. Slots must differ.
        addresses: (2,) int64, where the caches begin when the kernel runs; None: where they are now.

    Raises:
        ValueError: a shape, dtype, device or block size is not as above.
    """
    _check_caches(k, k_cache, v_cache)
    if k.shape != v.shape or k.dtype != v.dtype or k.device != v.device or k.shape[1] != k_cache.shape[2]:
        shape = f"(T, {k_cache.shape[2]}, {k_cache.shape[3]})"
        raise ValueError(f"k and v must be {shape}, alike, got {tuple(k.shape)} and {tuple(v.shape)}")
    _check_index("slot_mapping", slot_mapping, (len(k),), torch.int64, k.device)
    _check_addresses(addresses, k.device)
    _store_kv(k, v, k_cache, v_cache, slot_mapping, addresses)


def paged_attention(
    q, k_cache, v_cache, block_table, context_lens, *, cu_seqlens_q=None, scale=None, addresses=None
):
    """Causal attention of the last tokens of S sequences over their cached keys and values. No gradient.

    Args:
        q: (T, H, D), D at most 256; float32, float16 or bfloat16 (float64 on the CPU).
        k_cache, v_cache: (num_blocks, block_size, KVH, D), the dtype of q; KVH divides H.
        block_table: (S, max_blocks) int32, the cache blocks of each sequence in order; blocks may be shared.
        context_lens: (S,) int32, keys visible to the sequence's last query, itself included; from the
            sequence's number of queries to max_blocks * block_size, or 0, which gives zeros.
        cu_seqlens_q: (S + 1,) int32 bounds of each sequence's queries in q; None is one query a sequence.
        scale: factor of the scores, 1 / sqrt(D) by default.
        addresses: (2,) int64, where the caches begin when the kernels run, a multiple of 16 bytes; None: where they
            are now. For CUDA graphs whose caches move.

    Returns:
        (T, H, D) in the dtype of q; rows at or beyond cu_seqlens_q[-1] are zero.

    Raises:
        ValueError: a shape, dtype, device, head count or block size is not as above.
    """
    _check_caches(q, k_cache, v_cache)
    (tokens, heads, dim), kv_heads, sequences = q.shape, k_cache.shape[2], len(block_table)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"key heads must divide query heads, got {kv_heads}, {heads}")
    _check_index("block_table", block_table, (sequences, block_table.shape[-1]), torch.int32, q.device)
    _check_index("context_lens", context_lens, (sequences,), torch.int32, q.device)
    if cu_seqlens_q is not None:
        _check_index("cu_seqlens_q", cu_seqlens_q, (sequences + 1,), torch.int32, q.device)
    elif tokens != sequences:
        raise ValueError(
            f"without cu_seqlens_q expected one query a sequence, got {tokens} for {sequences} sequences"
        )
    scale = dim**-0.5 if scale is None else scale
    _check_addresses(addresses, q.device)
    return _paged_attention(q, k_cache, v_cache, block_table, context_lens, cu_seqlens_q, scale, addresses)
