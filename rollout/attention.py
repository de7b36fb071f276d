"""What a layer attends to: a packed tree of tokens (scoring, training) or the paged KV cache (prefill, decode).

The transformer calls ``attend(layer, q, k, v, cos, sin)`` and knows nothing else about attention, so the very same
modules serve every phase. Shapes: q (T, H, D); k, v (T, KVH, D), before the rotary embedding, whose angles are cos
and sin (T, D / 2) float32; the result (T, H, D).
"""

from ..kernels import append_attention, paged_attention, rotary, store_kv, tree_attention, tree_plan


class TreeAttention:
    """Attention inside a packed tree in preorder: query i sees key j when j <= i < key_end[j].

    A chain of tokens is the special case in which every key_end is the end of its sequence, so one rule serves
    packed sequences and shared prefixes. The plan of the tiles is made once and serves every layer and backward.
    """

    def __init__(self, key_end):
        """key_end (T,) int64: the preorder index just past the last descendant of each token."""
        self.key_end = key_end
        self.plan = None

    def plan_for(self, q, k):
        """The plan of the tiles for the shapes of q and k, made on first use."""
        if self.plan is None:
            self.plan = tree_plan(q, k, self.key_end)
        return self.plan

    def __call__(self, layer, q, k, v, cos, sin):
        q, k = rotary(q, k, cos, sin)
        return tree_attention(q, k, v, self.key_end, plan=self.plan_for(q, k))


class PagedAttention:
    """Attention over the paged KV cache: stores the new keys and values, then reads through the block tables.

    All tokens of a call are stored before any is read, so sequences of one call may share new blocks.

    Decode vouches for tables, lengths and earlier tokens (``settled``): they are older than the step, and ``embed``,
    with which it begins, starts when they are complete.
    """

    def __init__(self, cache, slot_mapping, source, block_table, context_lens, cu_seqlens_q=None):
        """cache: a ``KVCache``; slot_mapping (L,) int64: where keys and values go, and source (L,) int64: the token
        that they come from, None for the first L tokens in order; block_table (S, blocks) and context_lens (S,)
        int32; cu_seqlens_q (S+1,) int32 for prefill, None when every sequence brings one token (decode). In decode
        slot_mapping may be None: each token goes where its own context ends."""
        self.cache = cache
        self.slot_mapping = slot_mapping
        self.source = source if source is not None or slot_mapping is None else slice(len(slot_mapping))
        self.block_table = block_table
        self.context_lens = context_lens
        self.cu_seqlens_q = cu_seqlens_q

    def __call__(self, layer, q, k, v, cos, sin):
        caches, scales = self.cache.layer(layer), self.cache.scales(layer)
        addresses = None if self.cache.addresses is None else self.cache.addresses[layer]
        if self.slot_mapping is None:
            return append_attention(
                q, k, v, *caches, self.block_table, self.context_lens,
                addresses=addresses, rotation=(cos, sin), settled=True, scales=scales,
            )  # fmt: skip
        q, k = rotary(q, k, cos, sin)
        new = k[self.source], v[self.source]
        store_kv(*new, *caches, self.slot_mapping, addresses=addresses, scales=scales)
        return paged_attention(
            q, *caches, self.block_table, self.context_lens,
            cu_seqlens_q=self.cu_seqlens_q, addresses=addresses, scales=scales,
        )  # fmt: skip
