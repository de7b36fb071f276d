"""Attention over a paged key-value cache: decode, with or without the store of its keys, and prefill.

For query position p of a sequence and head h, with g = h // (H / KVH) its key head,

    out[p, h] = sum_{j <= p} softmax_j(scale * q[p, h] . k[j, g]) v[j, g]

where key j of sequence i stands in the cache at ``[block_table[i, j // block_size], j % block_size]``. The
queries of a sequence are the last positions of its context, so one op serves prefill, chunked prefill behind
a cached prefix, and decode.

Decode is ``paged_decode``, whose file says how it splits a context. ``append_attention`` is decode that brings the
queries, keys and values of the last tokens as the projections made them: it rotates queries and keys, stores keys
and values, and attends, in two launches.
Prefill walks the pages of a sequence once per (query block, head); it needs no workspace.

Scores, softmax and sums are float32 (float64 for float64 inputs, on the CPU only); probabilities are rounded
to the dtype of the values before the second product. Inference only: the outputs carry no gradient.
What unused slots hold never reaches a result, and table entries beyond a context may be anything.

Caches may hold 8-bit codes with a scale a row (``kv_store`` says how, and with what error): products take the codes
as they are, scores and probabilities their scales.

Papers: PagedAttention, arXiv 2309.06180; FlashAttention-2, arXiv 2307.08691; Flash-Decoding, Dao et al. 2023.
"""

import torch
import triton
import triton.language as tl

from . import _runtime
from .kv_store import check_addresses, check_caches, check_index, place, scale_strides
from .paged_attention_cpu import append_attention_cpu, paged_attention_cpu
from .paged_decode import LOG2_E, contiguous_rows, head_block, paged_decode
from .rotary import rotary_ref

# Most bytes of a padded head row; BLOCK_M, BLOCK_N, warps and stages of prefill. One table for all cards: each entry
# fits the 99 KiB of sm_86, sm_89 and sm_120.
CONFIGS = ((128, (128, 64, 4, 2)), (256, (64, 64, 4, 2)), (512, (64, 32, 4, 1)), (1024, (32, 16, 4, 1)))


def paged_attention_ref(
    q, k_cache, v_cache, block_table, context_lens, *, cu_seqlens_q=None, scale=None, scales=None
):
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
        k, v = k_cache[block, offset].to(q.dtype), v_cache[block, offset].to(q.dtype)
        if scales is not None:
            k, v = (
                x * own[block, offset][..., None].to(q.dtype) for x, own in zip((k, v), scales, strict=True)
            )
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = scale * torch.einsum("qhd,khd->hqk", q[start:stop], k)
        scores = scores.masked_fill(position > position[start - stop :, None], -torch.inf)
        out[start:stop] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out


@triton.jit
def _attend(
    q, m, l, acc, position, n, context, k_cache, v_cache, k_scales, v_scales, table, scale_log2,
    k_block, k_token, v_block, v_token, scale_block, scale_token, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision="ieee") * scale_log2
    if k_scales is not None:
        at = block * scale_block + n % PAGE * scale_token
        scores *= tl.load(k_scales + at, mask=present, other=0.0)[None, :]
        v_scale = tl.load(v_scales + at, mask=present, other=0.0)
    visible = present[None, :] & (n[None, :] <= position[:, None])
    scores = tl.where(visible, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    shrink = tl.exp2(m - m_new)
    p = tl.exp2(scores - m_new[:, None])
    l = l * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if k_scales is None:
        acc += tl.dot(p.to(value.dtype), value, input_precision="ieee")
    else:  # the largest scale is taken out: small ones would leave float16's range
        largest = tl.max(v_scale, 0)
        p *= v_scale[None, :] / tl.where(largest > 0, largest, 1.0)
        acc += tl.dot(p.to(q.dtype), value.to(q.dtype), input_precision="ieee") * largest
    return m_new, l, acc


@triton.jit
def _prefill_kernel(
    q, k_cache, v_cache, k_scales, v_scales, block_table, context_lens, addresses, cu_seqlens_q, out, scale_log2,
    sequences, table_row, q_token, q_head, out_token, out_head, k_block, k_token, k_head, v_block, v_token, v_head,
    scale_block, scale_token, scale_head,
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
    k_cache, v_cache = place(k_cache, addresses, 0), place(v_cache, addresses, 1)
    if k_scales is not None:
        k_scales = place(k_scales, addresses, 2) + head // GROUP * scale_head
        v_scales = place(v_scales, addresses, 3) + head // GROUP * scale_head
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
            k_cache + head // GROUP * k_head, v_cache + head // GROUP * v_head, k_scales, v_scales,
            block_table + sequence * table_row, scale_log2,
            k_block, k_token, v_block, v_token, scale_block, scale_token, D, PAGE, BLOCK_D,
        )  # fmt: skip
    result = acc / tl.where(l > 0, l, 1.0)[:, None]
    to = out + token[:, None] * out_token + head * out_head + d[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=inside)


def _paged_attention_triton(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    context_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None, scale: float, addresses: torch.Tensor | None,
    k_scales: torch.Tensor | None, v_scales: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    scales = k_scales, v_scales
    if cu_seqlens_q is None:
        none = (None,) * 4
        return paged_decode(q, *none, k_cache, v_cache, *scales, block_table, context_lens, scale, addresses)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if len(q) == 0:
        return out
    q, table, lens = contiguous_rows(q), block_table.contiguous(), context_lens.contiguous()
    (tokens, heads, dim), (page, kv_heads) = q.shape, k_cache.shape[1:3]
    block_d = head_block(q)
    block_m, block_n, warps, stages = next(
        tiles for most, tiles in CONFIGS if block_d * q.element_size() <= most
    )
    with _runtime.launch_on(q):
        _prefill_kernel[(triton.cdiv(tokens, block_m) + len(lens), heads)](
            q, k_cache, v_cache, *scales, table, lens, addresses, cu_seqlens_q.contiguous(), out, scale * LOG2_E,
            len(lens), table.stride(0), *q.stride()[:2], *out.stride()[:2], *k_cache.stride()[:3],
            *v_cache.stride()[:3], *scale_strides(k_scales), GROUP=heads // kv_heads, D=dim, PAGE=page,
            BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def _append_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    block_table: torch.Tensor, context_lens: torch.Tensor, scale: float, addresses: torch.Tensor | None,
    cos: torch.Tensor | None, sin: torch.Tensor | None, settled: bool, k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return paged_decode(
        q, k, v, cos, sin, k_cache, v_cache, k_scales, v_scales, block_table, context_lens, scale, addresses, settled
    )  # fmt: skip


def _append_attention_torch(
    q, k, v, k_cache, v_cache, block_table, context_lens, scale, addresses, cos, sin, settled, *scales
):
    if cos is not None:
        q, k = rotary_ref(q, k, cos, sin)
    return append_attention_cpu(
        q, k, v, k_cache, v_cache, block_table, context_lens, scale, addresses, *scales
    )


_paged_attention = _runtime.register(
    "paged_attention",
    triton_impl=_paged_attention_triton,
    torch_impl=paged_attention_cpu,
    fake=lambda q, *others: torch.empty(q.shape, dtype=q.dtype, device=q.device),
)
_append_attention = torch.library.custom_op(
    f"{_runtime.LIB}::append_attention",
    _append_attention_triton,
    mutates_args=("k_cache", "v_cache", "k_scales", "v_scales"),
    device_types="cuda",
)
_append_attention.register_kernel("cpu")(
    _append_attention_triton if _runtime.INTERPRET else _append_attention_torch
)
_append_attention.register_fake(lambda q, *others: torch.empty(q.shape, dtype=q.dtype, device=q.device))


def _check(q, k_cache, v_cache, scales, block_table, context_lens, addresses, one_query):
    check_caches(q, k_cache, v_cache, scales)
    (tokens, heads, _), kv_heads, sequences = q.shape, k_cache.shape[2], len(block_table)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"key heads must divide query heads, got {kv_heads}, {heads}")
    check_index("block_table", block_table, (sequences, block_table.shape[-1]), torch.int32, q.device)
    check_index("context_lens", context_lens, (sequences,), torch.int32, q.device)
    check_addresses(addresses, q.device, scales)
    if one_query and tokens != sequences:
        raise ValueError(
            f"without cu_seqlens_q expected one query a sequence, got {tokens} for {sequences} sequences"
        )


def append_attention(
    q, k, v, k_cache, v_cache, block_table, context_lens, *, scale=None, addresses=None, rotation=None,
    settled=False, scales=None,
):  # fmt: skip
    """Store the key and value of one new token a sequence, and let its query attend to the whole context.

    The same, bit for bit, as ``rotary`` (where there is a rotation), ``store_kv`` into the last slot of each context
    and ``paged_attention``, in one pass. No gradient.

    Args:
        q: (S, H, D); k, v: (S, KVH, D), of its dtype: the last token of each sequence.
        k_cache, v_cache, block_table, context_lens, scale, addresses, scales: as in ``paged_attention``; the context
            counts the new token, and a context of 0 stores nothing. Last slots must differ. Caches and scales are
            written.
        rotation: (cos, sin) of the tokens' angles, each (S, D / 2) float32, by which q and k are rotated first, as
            by ``rotary``; None: they are what they are.
        settled: the caller's word that since tables, lengths and the caches' earlier tokens were written, a kernel
            was launched without programmatic dependence (torch launches its own so). Where kernels may start
            early, these are then read while the kernel that makes q, k and v still ends. Changes no result.

    Returns:
        (S, H, D) in the dtype of q.

    Raises:
        ValueError: a shape, dtype, device, head count or block size is not as above.
    """
    _check(q, k_cache, v_cache, scales, block_table, context_lens, addresses, True)
    expected = (len(q), *k_cache.shape[2:])
    if k.shape != expected or v.shape != expected or not k.dtype == v.dtype == q.dtype:
        raise ValueError(
            f"k and v must be {expected} {q.dtype}, got {tuple(k.shape)} {k.dtype} and {tuple(v.shape)} {v.dtype}"
        )
    cos, sin = (None, None) if rotation is None else rotation
    if rotation is not None:
        if q.shape[-1] % 2:
            raise ValueError(f"a rotation needs an even head dimension, got {q.shape[-1]}")
        for name, angles in (("cos", cos), ("sin", sin)):
            check_index(name, angles, (len(q), q.shape[-1] // 2), torch.float32, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _append_attention(
        q, k, v, k_cache, v_cache, block_table, context_lens, scale, addresses, cos, sin, settled,
        *(scales or (None, None)),
    )  # fmt: skip


def paged_attention(
    q, k_cache, v_cache, block_table, context_lens, *, cu_seqlens_q=None, scale=None, addresses=None, scales=None
):  # fmt: skip
    """Causal attention of the last tokens of S sequences over their cached keys and values. No gradient.

    Args:
        q: (T, H, D), D at most 256; float32, float16 or bfloat16 (float64 on the CPU).
        k_cache, v_cache: (num_blocks, block_size, KVH, D), the dtype of q, or int8 codes; KVH divides H.
        block_table: (S, max_blocks) int32, the cache blocks of each sequence in order; blocks may be shared.
        context_lens: (S,) int32, keys visible to the sequence's last query, itself included; from the
            sequence's number of queries to max_blocks * block_size, or 0, which gives zeros.
        cu_seqlens_q: (S + 1,) int32 bounds of each sequence's queries in q; None is one query a sequence.
        scale: factor of the scores, 1 / sqrt(D) by default.
        addresses: (2,) int64, where the caches begin when the kernels run, a multiple of 16 bytes; None: where they
            are now. For CUDA graphs whose caches move. With scales (4,): then where these begin.
        scales: of int8 caches, a pair of (num_blocks, block_size, KVH) float32; see ``store_kv``.

    Returns:
        (T, H, D) in the dtype of q; rows at or beyond cu_seqlens_q[-1] are zero.

    Raises:
        ValueError: a shape, dtype, device, head count or block size is not as above.
    """
    _check(q, k_cache, v_cache, scales, block_table, context_lens, addresses, cu_seqlens_q is None)
    if cu_seqlens_q is not None:
        check_index("cu_seqlens_q", cu_seqlens_q, (len(block_table) + 1,), torch.int32, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    others = block_table, context_lens, cu_seqlens_q, scale, addresses, *(scales or (None, None))
    return _paged_attention(q, k_cache, v_cache, *others)
