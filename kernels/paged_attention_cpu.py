"""The CPU path of ``paged_attention``, ``append_attention`` and ``store_kv``, whose files say what they compute.

Decode gathers ``CPU_CHUNK`` bytes of keys at a time, sequences of like length together.
"""

import torch
import torch.nn.functional as F
import triton

CPU_CHUNK = 2**20  # bytes of keys gathered at a time: keys, values and scores stay in a core's cache
CPU_QUERIES = 1024  # query rows a call of torch's attention, which bounds its mask


@torch.no_grad()
def store_kv_cpu(k, v, k_cache, v_cache, slot_mapping, addresses, k_scales, v_scales):
    if len(slot_mapping) and slot_mapping.min() < 0:
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    at = slot_mapping // k_cache.shape[1], slot_mapping % k_cache.shape[1]
    for new, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
        if scales is not None:
            new, scale = quantize_rows_ref(new)
            scales.index_put_(at, scale)
        cache.index_put_(at, new)


def quantize_rows_ref(x):
    """Codes (..., D) int8 and scales (...) float32 of x (..., D)."""
    scale = x.float().abs().amax(-1) * (1 / 127)
    scale = scale.where(scale > 1e-35, 0)
    codes = (x.float() / scale.where(scale > 0, torch.inf)[..., None] + 0.5).floor()
    return codes.to(torch.int8), scale


def _blocks(cache, scales, blocks, dtype):
    """Blocks of a cache, decoded where it holds codes: in float32, or wider where ``dtype`` is."""
    found = cache.index_select(0, blocks)
    if scales is None:
        return found
    dtype = torch.promote_types(dtype, torch.float32)
    return found.to(dtype) * scales.index_select(0, blocks)[..., None].to(dtype)


def _sdpa(q, k, v, visible, causal, scale):
    """torch's attention; float32 in float64, where the order of sums no longer shows in the rounded result."""
    wide = torch.float64 if q.dtype == torch.float32 else torch.promote_types(q.dtype, k.dtype)
    attended = F.scaled_dot_product_attention(
        q.to(wide), k.to(wide), v.to(wide), visible, is_causal=causal, scale=scale, enable_gqa=True
    )
    return attended.to(q.dtype)


@torch.no_grad()
def paged_attention_cpu(
    q, k_cache, v_cache, block_table, context_lens, cu_seqlens_q, scale, addresses, k_scales, v_scales
):  # fmt: skip
    caches = (k_cache, k_scales), (v_cache, v_scales)
    if cu_seqlens_q is None:
        return _decode_torch(q, caches, block_table, context_lens, scale)
    out = torch.zeros(q.shape, dtype=q.dtype)
    bounds = cu_seqlens_q.tolist()
    for i, context in enumerate(context_lens.tolist()):
        begin, end = bounds[i], bounds[i + 1]
        if context == 0 or begin == end:
            continue
        pages = block_table[i, : triton.cdiv(context, k_cache.shape[1])]
        k, v = (_blocks(*cache, pages, q.dtype).flatten(0, 1).transpose(0, 1) for cache in caches)
        for start in range(begin, end, CPU_QUERIES):
            stop = min(start + CPU_QUERIES, end)
            seen, rows = context - end + stop, stop - start
            # torch's causal mask starts at the first key, so a chunk behind a prefix brings its own.
            behind = 1 < rows < seen
            visible = torch.ones(rows, seen, dtype=torch.bool).tril_(seen - rows) if behind else None
            queries = q[start:stop].transpose(0, 1)[None]
            keys, values = k[None, :, :seen], v[None, :, :seen]
            attended = _sdpa(queries, keys, values, visible, rows == seen, scale)
            out[start:stop] = attended[0].transpose(0, 1)
    return out


@torch.no_grad()
def append_attention_cpu(
    q, k, v, k_cache, v_cache, block_table, context_lens, scale, addresses, k_scales, v_scales
):
    last, page = context_lens.long() - 1, k_cache.shape[1]
    block = block_table.gather(1, (last.clamp(min=0) // page)[:, None])[:, 0].long()
    slots = torch.where(last < 0, -1, block * page + last % page)
    store_kv_cpu(k, v, k_cache, v_cache, slots, None, k_scales, v_scales)
    return _decode_torch(q, ((k_cache, k_scales), (v_cache, v_scales)), block_table, context_lens, scale)


def _decode_torch(q, caches, block_table, context_lens, scale):
    page, kv_heads, dim = caches[0][0].shape[1:]
    out = torch.zeros(q.shape, dtype=q.dtype)
    lens, order = context_lens.sort()  # neighbours in length are gathered together: little padding
    host_lens, token_bytes = lens.tolist(), kv_heads * dim * q.element_size()
    empty, end = host_lens.count(0), len(host_lens)
    while end > empty:
        longest = host_lens[end - 1]
        pages = triton.cdiv(longest, page)
        begin = max(empty, end - max(1, CPU_CHUNK // (pages * page * token_bytes)))
        rows, shortest, visible = order[begin:end], host_lens[begin], None
        blocks = block_table[rows, :pages]
        if shortest < longest:
            visible = torch.arange(pages * page) < lens[begin:end, None]
            blocks = blocks.where(visible[:, ::page], 0)
        k, v = (
            _blocks(*cache, blocks.flatten(), q.dtype).view(end - begin, -1, kv_heads, dim)[:, :longest]
            for cache in caches
        )
        if visible is not None:
            for x in (k, v):
                x[:, shortest:].masked_fill_(~visible[:, shortest:longest, None, None], 0)
            visible = visible[:, None, None, :longest]
        queries, keys, values = q[rows].unflatten(1, (kv_heads, -1)), k.transpose(1, 2), v.transpose(1, 2)
        attended = _sdpa(queries, keys, values, visible, False, scale)
        out[rows] = attended.flatten(1, 2)
        end = begin
    return out
