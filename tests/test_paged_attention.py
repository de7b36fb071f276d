"""Paged attention and the store into its cache, against plain attention over each sequence's own keys."""

import importlib
import math
import os
from unittest import mock

import pytest
import torch
from cross_compile import assert_compiles, every_card
from hypothesis import given, settings
from hypothesis import strategies as st
from nanogrpo.kernels import append_attention, rotary, store_kv
from nanogrpo.kernels.kv_store import _store_kv_triton, quantize_rows_ref, store_kv_ref
from nanogrpo.kernels.paged_attention import paged_attention, paged_attention_ref
from numerics import EPS, assert_no_worse_than

decode = importlib.import_module("nanogrpo.kernels.paged_decode")
module = importlib.import_module("nanogrpo.kernels.paged_attention")  # the package exports its function
cpu_module = importlib.import_module("nanogrpo.kernels.paged_attention_cpu")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])
# Half dtypes round the probabilities and the output once each; float32 scores of magnitude <= 8 round to 4 ulp.
FLOOR = {dtype: EPS[dtype] * (4 if dtype == torch.float32 else 1) for dtype in DTYPES}
FLOOR[torch.bfloat16] = EPS[torch.bfloat16]
# The interpreter takes milliseconds a program, and these tests launch hundreds.
fewer = settings(max_examples=4) if INTERPRET else lambda test: test


def paged(contexts, kv_heads, dim, *, dtype, page=16, spare=1, device="cpu", seed=0):
    """Caches that hold NaN wherever no key stands, and a table that holds -1 wherever no block is owned."""
    generator = torch.Generator().manual_seed(seed)
    width = -(-max(contexts, default=0) // page) + spare
    table = torch.randperm(len(contexts) * width, generator=generator).view(-1, width)
    caches = [torch.full((table.numel() + 1, page, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2)]
    for row, context in zip(table, contexts, strict=True):
        position = torch.arange(context)
        slots = row[position // page] * page + position % page
        store_kv_ref(*torch.randn(2, context, kv_heads, dim, generator=generator).to(dtype), *caches, slots)
        row[-(-context // page) :] = -1
    lens = torch.tensor(contexts, dtype=torch.int32)
    return [x.to(device) for x in (*caches, table.int(), lens)]


def eight_bit(k_cache, v_cache, *others):
    """The same as int8 codes, with scales that are NaN wherever no key stands."""
    (k_codes, k_scale), (v_codes, v_scale) = map(quantize_rows_ref, (k_cache, v_cache))
    for scale, cache in ((k_scale, k_cache), (v_scale, v_cache)):
        scale[cache.isnan().any(-1)] = torch.nan
    return (k_codes, v_codes, *others), (k_scale, v_scale)


def queries(counts, heads, dim, *, dtype, device="cpu", seed=1):
    q = torch.randn(sum(counts), heads, dim, generator=torch.Generator().manual_seed(seed))
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0).int()
    return q.to(device, dtype), cu_seqlens.to(device)


def assert_correct(q, k_cache, v_cache, table, lens, **options):
    """With scales in ``options`` the caches are codes, and the truth is attention over what these stand for."""
    ours = paged_attention(q, k_cache, v_cache, table, lens, **options)
    assert ours.dtype == q.dtype
    plain = paged_attention_ref(q, k_cache, v_cache, table, lens, **options)
    truth = paged_attention_ref(q.double(), k_cache.double(), v_cache.double(), table, lens, **options)
    assert_no_worse_than(ours, plain, truth, floor=FLOOR[q.dtype])
    return ours


def assert_same(ours, expected):
    """Bit for bit, but where the interpreter multiplies with numpy, which rounds a row by its place in a tile."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=4 * EPS[ours.dtype] if INTERPRET else 0)


@st.composite
def batches(draw):
    """Contexts of 0 to 290 tokens (over one split), each with its number of trailing queries."""
    contexts = draw(
        st.lists(st.sampled_from([0, 1, 15, 16, 17, 64, 129, 256, 257, 290]), min_size=1, max_size=5)
    )
    counts = [draw(st.integers(0, min(context, 140))) for context in contexts]
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 1), (1, 17)]))
    dim = draw(st.sampled_from([16, 24, 64, 96, 128]))
    page, dtype = draw(st.sampled_from([16, 32, 512])), draw(st.sampled_from(DTYPES))
    return contexts, counts, kv_heads, group, dim, page, dtype, draw(st.integers(0, 2**31))


@given(batches(), st.booleans())
def test_decode_matches_reference(batch, codes):
    contexts, _, kv_heads, group, dim, page, dtype, seed = batch
    cache, scales = paged(contexts, kv_heads, dim, dtype=dtype, page=page, seed=seed), None
    q, _ = queries([1] * len(contexts), kv_heads * group, dim, dtype=dtype, seed=seed + 1)
    if codes:
        cache, scales = eight_bit(*cache)
    out = assert_correct(q, *cache, scales=scales)
    assert (out[cache[3] == 0] == 0).all()


def last_slots(table, lens, page):
    last = lens.long() - 1
    block = table.gather(1, (last.clamp(min=0) // page)[:, None])[:, 0].long()
    return torch.where(last < 0, -1, block * page + last % page)


def assert_append_is_store_and_attention(cache, heads, *, dtype, rotated, codes=False, scale=None, seed=0):
    *caches, table, lens = cache
    (page, kv_heads, dim), S, device = caches[0].shape[1:], len(lens), lens.device
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator).to(device)
    qkv = draw(heads + 2 * kv_heads, S, dim).to(dtype).transpose(0, 1)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    angles = 3 * draw(dim // 2, S).T
    rotation = (angles.cos(), angles.sin()) if rotated else None
    turned = rotary(q, k, *rotation) if rotated else (q, k)
    if codes:
        caches = [x for pair in eight_bit(*caches) for x in pair]
    stored, appended = [x.clone() for x in caches], [x.clone() for x in caches]
    store_kv(turned[1], v, *stored[:2], last_slots(table, lens, page), scales=tuple(stored[2:]) or None)
    expected = assert_correct(
        turned[0], *stored[:2], table, lens, scale=scale, scales=tuple(stored[2:]) or None
    )
    options = {"scale": scale, "rotation": rotation, "scales": tuple(appended[2:]) or None}
    for settled in (False, True):  # torch's own kernels, those of the comparison, come in between
        ours = append_attention(q, k, v, *appended[:2], table, lens, settled=settled, **options)
        for a, b in zip((ours, *appended), (expected, *stored), strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@fewer
@given(batches(), st.sampled_from([None, 0.3]), st.booleans(), st.booleans())
def test_append_equals_rotation_store_and_decode(batch, scale, rotated, codes):
    contexts, _, kv_heads, group, dim, page, dtype, seed = batch
    cache = paged(contexts, kv_heads, dim, dtype=dtype, page=page, seed=seed)
    assert_append_is_store_and_attention(
        cache, kv_heads * group, dtype=dtype, rotated=rotated, codes=codes, scale=scale, seed=seed
    )


@given(batches(), st.sampled_from([None, 0.3]), st.booleans())
def test_prefill_matches_reference(batch, scale, codes):
    contexts, counts, kv_heads, group, dim, page, dtype, seed = batch
    cache, scales = paged(contexts, kv_heads, dim, dtype=dtype, page=page, seed=seed), None
    q, cu_seqlens = queries(counts, kv_heads * group, dim, dtype=dtype, seed=seed + 1)
    if codes:
        cache, scales = eight_bit(*cache)
    assert_correct(q, *cache, cu_seqlens_q=cu_seqlens, scale=scale, scales=scales)


@given(batches(), st.booleans())
def test_store_kv_writes_its_slots_and_no_other(batch, codes):
    contexts, _, kv_heads, _, dim, page, dtype, seed = batch
    generator, tokens = torch.Generator().manual_seed(seed), sum(contexts) % 67
    ours = [torch.randn(8, page, kv_heads, dim, generator=generator).to(dtype) for _ in range(2)]
    if codes:
        ours = [x for pair in eight_bit(*ours) for x in pair]
    expected = [cache.clone() for cache in ours]
    k, v = torch.randn(2, kv_heads, tokens, dim, generator=generator).to(dtype).transpose(1, 2)
    slots = torch.randperm(8 * page, generator=generator)[:tokens]
    slots[::3] = -1
    store_kv(k, v, *ours[:2], slots, scales=tuple(ours[2:]) or None)
    store_kv_ref(k, v, *expected[:2], slots, tuple(expected[2:]) or None)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@given(st.sampled_from(DTYPES), st.sampled_from([1e-30, 1e-4, 1.0, 300.0]), st.integers(0, 2**31))
def test_codes_are_within_the_stated_error(dtype, size, seed):
    """|x' - x| <= max|x| / 254 of its row, beside float32's rounding of the scale and of the quotient."""
    generator = torch.Generator().manual_seed(seed)
    x = (size * torch.randn(5, 3, 24, generator=generator)).to(dtype)
    x[0, 0] = 0  # a row without a scale
    codes, scale = torch.zeros(1, 16, 3, 24, dtype=torch.int8), torch.full((1, 16, 3), torch.nan)
    store_kv(x, x, codes, codes.clone(), torch.arange(5), scales=(scale, scale.clone()))
    decoded = scale[0, :5, :, None].double() * codes[0, :5].double()
    most = x.double().abs().amax(-1, keepdim=True)
    assert ((decoded - x.double()).abs() <= most * (1 / 254 + 2**-20)).all()
    assert codes[0, :5].abs().amax(-1)[most[..., 0] > 0].eq(127).all(), "a row uses the whole range"
    # ... and none narrower than stated: some value lies near the middle between two codes.
    worst = ((decoded - x.double()).abs() / most.clamp(min=1e-300)).max()
    assert most.max() == 0 or worst > 0.9 / 254


def test_decode_of_a_position_agrees_with_its_prefill_row(device):
    k_cache, v_cache, table, lens = paged([290], 2, 32, dtype=torch.float32, device=device)
    q, cu_seqlens = queries([290], 6, 32, dtype=torch.float32, device=device)
    rows = paged_attention(q, k_cache, v_cache, table, lens, cu_seqlens_q=cu_seqlens)
    positions = torch.tensor([0, 1, 15, 16, 100, 255, 256, 289], device=device)
    decoded = paged_attention(
        q[positions], k_cache, v_cache, table.expand(len(positions), -1), positions.int() + 1
    )
    # Both sum the same float32 terms in different orders.
    torch.testing.assert_close(decoded, rows[positions], rtol=0, atol=16 * EPS[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_are_exact(dtype, device):
    """A scale of log 2 makes every weight a power of two, so all is exact but the last division and rounding."""
    contexts, counts, dim = [300, 70], [150, 70], 64
    k_cache, v_cache, table, lens = paged(contexts, 1, dim, dtype=dtype, device=device)
    k_cache, v_cache = k_cache.round().clamp(-1, 1), v_cache.round()
    k_cache[..., 4:] = 0  # scores from -4 to 4
    q, cu_seqlens = queries(counts, 3, dim, dtype=dtype, device=device)
    q = q.round().clamp(-1, 1)
    for rows, options in ((q, {"cu_seqlens_q": cu_seqlens}), (q[:2], {})):
        cache = k_cache, v_cache, table, lens
        ours = paged_attention(rows, *cache, scale=math.log(2), **options)
        double = rows.double(), k_cache.double(), v_cache.double(), table, lens
        truth = paged_attention_ref(*double, scale=math.log(2), **options)
        torch.testing.assert_close(ours.double(), truth, rtol=EPS[dtype], atol=1e-6)


def test_chunked_prefill_agrees_with_one_prefill(device):
    cache = paged([200], 1, 32, dtype=torch.float32, device=device)
    q, cu_seqlens = queries([200], 2, 32, dtype=torch.float32, device=device)
    whole = paged_attention(q, *cache, cu_seqlens_q=cu_seqlens)
    for start, stop in [(0, 64), (64, 65), (65, 200)]:
        bounds = torch.tensor([0, stop - start], dtype=torch.int32, device=device)
        context = torch.tensor([stop], dtype=torch.int32, device=device)
        part = paged_attention(q[start:stop], *cache[:3], context, cu_seqlens_q=bounds)
        torch.testing.assert_close(part, whole[start:stop], rtol=0, atol=16 * EPS[torch.float32])


def test_sequences_may_share_blocks(device):
    k_cache, v_cache, table, _ = paged([64, 64], 1, 16, dtype=torch.float32, device=device)
    shared = table.clone()
    shared[1, :2] = shared[0, :2]
    copied_k, copied_v = k_cache.clone(), v_cache.clone()
    copied_k[table[1, :2]], copied_v[table[1, :2]] = k_cache[table[0, :2]], v_cache[table[0, :2]]
    lens = torch.tensor([64, 50], dtype=torch.int32, device=device)
    q, _ = queries([1, 1], 2, 16, dtype=torch.float32, device=device)
    expected = paged_attention(q, copied_k, copied_v, table, lens)
    assert torch.equal(paged_attention(q, k_cache, v_cache, shared, lens), expected)


def test_a_row_depends_on_nothing_else_in_the_batch(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("torch's CPU attention blocks its sums by the padded length: equal to rounding only")
    contexts = [300, 3, 257, 0, 256]
    k_cache, v_cache, table, lens = paged(contexts, 2, 16, dtype=torch.float32, spare=20, device=device)
    q, _ = queries([1] * 5, 4, 16, dtype=torch.float32, device=device)
    together = paged_attention(q, k_cache, v_cache, table, lens)
    for i, context in enumerate(contexts):
        narrow = table[i : i + 1, : max(1, -(-context // 16))]
        alone = paged_attention(q[i : i + 1], k_cache, v_cache, narrow, lens[i : i + 1])
        assert torch.equal(alone[0], together[i])
    with mock.patch.object(decode, "WORKSPACE", 1):
        assert torch.equal(paged_attention(q, k_cache, v_cache, table, lens), together)
    for programs in (1, 30, 10**6):  # one program a head, some that share its splits, one a split
        with mock.patch.object(decode, "PROGRAMS", programs):
            assert torch.equal(paged_attention(q, k_cache, v_cache, table, lens), together)


@pytest.mark.parametrize("chunks", [{"CPU_CHUNK": 20000}, {"CPU_CHUNK": 1}, {"CPU_QUERIES": 7}])
def test_cpu_chunks_change_nothing(chunks):
    contexts = [70, 0, 33, 64, 1, 16]
    cache = paged(contexts, 2, 16, dtype=torch.float32)
    counts = [40, 0, 33, 1, 1, 9]
    with mock.patch.multiple(cpu_module, **chunks):
        q, cu_seqlens = queries(counts, 4, 16, dtype=torch.float32)
        assert_correct(q, *cache, cu_seqlens_q=cu_seqlens)
        assert_correct(queries([1] * 6, 4, 16, dtype=torch.float32)[0], *cache)


@fewer
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 6]), st.sampled_from([0, 8, 16, 18])), min_size=1, max_size=2),
    st.sampled_from([(1, 1), (2, 3), (1, 9)]), st.sampled_from(DTYPES), st.integers(0, 2**31),
)  # fmt: skip
def test_sharing_the_reading_of_blocks_changes_no_bit(groups, heads, dtype, seed):
    """Groups of (members, shared blocks) with contexts of 1 to 20 blocks: read together, apart, and from copies."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [members for members, _ in groups]
    contexts = torch.randint(1, 20 * 16, (sum(sizes),), generator=generator).tolist()
    *caches, table, lens = paged(contexts, heads[0], 16, dtype=dtype, seed=seed)
    begin = 0
    for members, shared in groups:
        # Whoever has fewer blocks than are shared shares what it has.
        longest = max(range(begin, begin + members), key=lambda i: contexts[i])
        for i in range(begin, begin + members):
            count = min(shared, (contexts[i] - 1) // 16)
            table[i, :count] = table[longest, :count]
        begin += members
    copies = [torch.full((table.numel() + 1, *cache.shape[1:]), torch.nan, dtype=dtype) for cache in caches]
    apart = torch.arange(table.numel(), dtype=torch.int32).view_as(table)
    for i, context in enumerate(contexts):
        count = -(-context // 16)
        for copy, cache in zip(copies, caches, strict=True):
            copy[apart[i, :count]] = cache[table[i, :count]]
    q, _ = queries([1] * len(contexts), heads[0] * heads[1], 16, dtype=dtype, seed=seed)
    expected = assert_correct(q, *copies, apart, lens)
    for shared, programs in ((False, 1), (True, 1), (True, 8), (True, 10**6)):
        with mock.patch.multiple(decode, shares=lambda *_, shared=shared: shared, PROGRAMS=programs):
            assert_same(paged_attention(q, *caches, table, lens), expected)


@pytest.mark.skipif(not INTERPRET, reason="interprets the kernels; test_gpu_sharing_... runs them")
@pytest.mark.parametrize("kv_heads, group", [(2, 3), (1, 9)])
def test_pairs_share_full_splits_in_the_same_blocks(kv_heads, group):
    """Pairs that share one split or two, one block less, or one token less; a last sequence without a neighbour."""
    contexts = [300, 260, 270, 258, 257, 256, 400, 400, 129, 128, 300]
    *caches, table, lens = paged(contexts, kv_heads, 16, dtype=torch.float32, spare=3)
    for i, other, count in ((1, 0, 16), (2, 1, 16), (3, 2, 8), (5, 4, 15), (7, 6, 16), (9, 8, 8), (10, 9, 7)):
        table[i, :count] = table[other, :count]
    table[7, 3] = table[10, 9]  # one block of another sequence
    q, _ = queries([1] * len(contexts), kv_heads * group, 16, dtype=torch.float32)
    with mock.patch.object(decode, "shares", lambda *_: False):
        expected = assert_correct(q, *caches, table, lens)
    for programs in (1, 3 * kv_heads * len(contexts), 10**6):
        with mock.patch.multiple(decode, shares=lambda *_: True, PROGRAMS=programs):
            assert_same(paged_attention(q, *caches, table, lens), expected)


@pytest.mark.parametrize("sequences, tokens, worth", [
    (8, 256, False), (8, 4096, False), (64, 256, False), (64, 1024, False), (64, 2304, True), (256, 256, True),
])  # fmt: skip
def test_pairs_are_compared_where_the_card_is_full_anyway(sequences, tokens, worth):
    assert decode.shares(2 * sequences, tokens // 128) is worth


def test_caches_may_move(device):
    """With ``addresses`` the kernels find the caches where these say, whatever the tensors point at."""
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("the CPU path takes tensors as they are")
    for spare in (0, 20):
        k_cache, v_cache, table, lens = paged(
            [40, 18], 2, 16, dtype=torch.float32, spare=spare, device=device
        )
        addresses = torch.tensor([k_cache.data_ptr(), v_cache.data_ptr()], device=device)
        stale = torch.full_like(k_cache, torch.nan), torch.full_like(v_cache, torch.nan)
        rows = torch.randn(2, 2, 16, device=device)
        slots = table[:, 0].long() * 16 + 3
        store_kv(rows, rows, *stale, slots, addresses=addresses)
        assert torch.equal(k_cache.flatten(0, 1)[slots], rows) and stale[0].isnan().all()
        short = torch.tensor([30, 0], dtype=torch.int32, device=device)
        append_attention(rows, 2 * rows, rows, *stale, table, short, addresses=addresses)
        assert torch.equal(k_cache[table[0, 1], 13], 2 * rows[0]) and stale[0].isnan().all()
        q, cu_seqlens = queries([2, 3], 4, 16, dtype=torch.float32, device=device)
        for some, bounds in ((q[:2], None), (q, cu_seqlens)):
            expected = paged_attention(some, k_cache, v_cache, table, lens, cu_seqlens_q=bounds)
            moved = paged_attention(some, *stale, table, lens, cu_seqlens_q=bounds, addresses=addresses)
            assert torch.equal(moved, expected)


def test_no_sequence_and_no_query(device):
    k_cache, v_cache, table, lens = paged([20, 5], 1, 16, dtype=torch.float32, device=device)
    q, cu_seqlens = queries([0, 0], 2, 16, dtype=torch.float32, device=device)
    assert paged_attention(q, k_cache, v_cache, table, lens, cu_seqlens_q=cu_seqlens).shape == (0, 2, 16)
    assert paged_attention(q, k_cache, v_cache, table[:0], lens[:0]).shape == (0, 2, 16)
    rows, _ = queries([1, 1], 2, 16, dtype=torch.float32, device=device)
    assert (paged_attention(rows, k_cache, v_cache, table[:, :0], torch.zeros_like(lens)) == 0).all()
    before = k_cache.clone()
    store_kv(q[:, :1], q[:, :1], k_cache, v_cache, torch.empty(0, dtype=torch.int64, device=device))
    assert torch.equal(k_cache.nan_to_num(7.0), before.nan_to_num(7.0))


def test_rows_beyond_the_last_query_are_zero(device):
    cache = paged([20], 1, 16, dtype=torch.float32, device=device)
    q, cu_seqlens = queries([4], 2, 16, dtype=torch.float32, device=device)
    padded = torch.cat([q, q])
    out = paged_attention(padded, *cache, cu_seqlens_q=cu_seqlens)
    assert torch.equal(out[:4], paged_attention(q, *cache, cu_seqlens_q=cu_seqlens)) and (out[4:] == 0).all()


def test_non_contiguous_inputs(device):
    k_cache, v_cache, table, lens = paged([40, 18], 2, 16, dtype=torch.float32, device=device)
    strided = torch.stack([k_cache, v_cache], 1)  # (num_blocks, 2, block_size, KVH, D)
    slices = table.T.contiguous().T, lens.repeat_interleave(2)[::2]
    cu_seqlens = torch.tensor([0, 9, 1, 9, 2], dtype=torch.int32, device=device)[::2]
    q = torch.randn(2, 4, 32, device=device)[..., ::2]
    for bounds in (None, cu_seqlens):
        ours = paged_attention(q, strided[:, 0], strided[:, 1], *slices, cu_seqlens_q=bounds)
        expected = paged_attention(q.contiguous(), k_cache, v_cache, table, lens, cu_seqlens_q=bounds)
        # Torch's CPU attention takes another path for strided queries; ours is equal bit for bit.
        torch.testing.assert_close(ours, expected, rtol=0, atol=8 * EPS[torch.float32])
    k, v = torch.randn(2, 3, 2, 32, device=device)[..., ::2]
    slots = torch.tensor([0, 9, 33, 9, 34, 9], device=device)[::2]
    store_kv(k, v, strided[:, 0], strided[:, 1], slots)
    store_kv(k.contiguous(), v.contiguous(), k_cache, v_cache, slots.contiguous())
    assert torch.equal(strided.nan_to_num(7.0), torch.stack([k_cache, v_cache], 1).nan_to_num(7.0))


GOOD = {
    "q": torch.zeros(2, 4, 16),
    "k_cache": torch.zeros(3, 16, 2, 16),
    "v_cache": torch.zeros(3, 16, 2, 16),
    "block_table": torch.zeros(2, 1, dtype=torch.int32),
    "context_lens": torch.ones(2, dtype=torch.int32),
}


CODES = {name: torch.zeros(3, 16, 2, 16, dtype=torch.int8) for name in ("k_cache", "v_cache")}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": torch.zeros(2, 3, 16)}, "key heads must divide query heads, got 2, 3"),
        ({"q": torch.zeros(2, 4, 32)}, "D = 16"),
        ({"q": torch.zeros(2, 4, 16, dtype=torch.float16)}, "one floating dtype"),
        ({"q": torch.zeros(4, 16)}, r"expected \(T, heads, D\)"),
        ({"q": torch.zeros(3, 4, 16)}, "one query a sequence, got 3 for 2"),
        ({"v_cache": torch.zeros(4, 16, 2, 16)}, "caches of one shape"),
        (
            {"k_cache": torch.zeros(3, 24, 2, 16), "v_cache": torch.zeros(3, 24, 2, 16)},
            "power of two >= 16, got .3, 24, 2, 16.",
        ),
        (
            {"k_cache": torch.zeros(3, 16, 2, 16, dtype=torch.int8)},
            "torch.int8 with scales, got .* caches of torch.int8",
        ),
        ({"scales": (torch.zeros(3, 16, 2),) * 2}, "got torch.float32 and caches of .* with scales"),
        (
            CODES | {"scales": (torch.zeros(3, 16, 2), torch.zeros(3, 2, 16))},
            r"scales must be .*3, 16, 2.*float32",
        ),
        (CODES | {"scales": (torch.zeros(3, 16, 2), torch.zeros(3, 2, 16).mT)}, "scales lie differently"),
        ({"k_cache": torch.zeros(3, 16, 2, 32)[..., ::2]}, "caches contiguous in D, got strides .*2. and"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int64)}, "block_table must be .* torch.int32"),
        ({"block_table": torch.zeros(2, dtype=torch.int32)}, "block_table must be"),
        ({"context_lens": torch.ones(3, dtype=torch.int32)}, r"context_lens must be \(2,\)"),
        ({"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}, r"cu_seqlens_q must be \(3,\)"),
        ({"addresses": torch.zeros(3, dtype=torch.int64)}, "addresses (must be .2,.|are read by kernels)"),
    ],
)
def test_wrong_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**(GOOD | changes))


def test_wrong_append_raises():
    good = {name: value for name, value in GOOD.items() if name != "q"}
    new, angles = torch.zeros(2, 2, 16), torch.zeros(2, 8)
    for rotation in ((angles[:1], angles), (angles, angles.double()), (angles, torch.zeros(2, 16))):
        with pytest.raises(ValueError, match=r"must be \(2, 8\) torch.float32"):
            append_attention(GOOD["q"], new, new, **good, rotation=rotation)
    odd = [torch.zeros(3, 16, 2, 15) for _ in range(2)], torch.zeros(2, 2, 15)
    with pytest.raises(ValueError, match="even head dimension, got 15"):
        append_attention(
            torch.zeros(2, 4, 15), odd[1], odd[1], *odd[0], good["block_table"], good["context_lens"],
            rotation=(angles, angles),
        )  # fmt: skip
    for k in (torch.zeros(2, 1, 16), torch.zeros(3, 2, 16), torch.zeros(2, 2, 16, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"k and v must be \(2, 2, 16\) torch.float32"):
            append_attention(GOOD["q"], k, torch.zeros(2, 2, 16), **good)


@pytest.mark.parametrize(
    "k, slots, message",
    [
        (torch.zeros(2, 1, 16), torch.zeros(2, dtype=torch.int64), "k and v must be"),
        (torch.zeros(2, 2, 16), torch.zeros(2, dtype=torch.int32), "slot_mapping must be"),
        (torch.zeros(2, 2, 16), torch.zeros(3, dtype=torch.int64), "slot_mapping must be"),
    ],
)
def test_wrong_store_raises(k, slots, message):
    with pytest.raises(ValueError, match=message):
        store_kv(k, torch.zeros(2, 2, 16), GOOD["k_cache"], GOOD["v_cache"], slots)


@pytest.mark.parametrize("codes", [False, True])
def test_operators_pass_opcheck(device, codes):
    k_cache, v_cache, table, lens = paged([20, 5], 1, 16, dtype=torch.float32, device=device)
    caches, scales = (k_cache.nan_to_num(), v_cache.nan_to_num()), (None, None)  # opcheck compares with ==
    if codes:
        caches, scales = eight_bit(*caches)
    q, cu_seqlens = queries([3, 5], 2, 16, dtype=torch.float32, device=device)
    check, ops = torch.library.opcheck, torch.ops.nanogrpo
    for bounds in (cu_seqlens, None):
        rows = q if bounds is not None else q[:2]
        check(ops.paged_attention, (rows, *caches, table, lens, bounds, 0.25, None, *scales))
    new, lens = q[:2, :1], lens - 1
    angles = torch.randn(2, 2, 8, device=device)
    check(ops.append_attention, (q[:2], new, new, *caches, table, lens, 0.25, None, *angles, False, *scales))
    slots = torch.tensor([1, -1], device=device)
    check(ops.store_kv, (q[:2, :1], q[2:4, :1], *caches, slots, None, *scales))


@pytest.mark.skipif(INTERPRET, reason="torch.compile does not trace the interpreter")
def test_compiles_to_one_graph(device):
    k_cache, v_cache, table, lens = paged([20, 5], 1, 16, dtype=torch.float32, device=device)
    q, _ = queries([1, 1], 2, 16, dtype=torch.float32, device=device)
    slots = torch.tensor([table[0, 1].item() * 16 + 3, table[1, 0].item() * 16 + 4]).to(device)

    def step(q, k_cache, v_cache):
        store_kv(q[:, :1], q[:, 1:], k_cache, v_cache, slots)
        return paged_attention(q, k_cache, v_cache, table, lens)

    expected = step(q, k_cache.clone(), v_cache.clone())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k_cache, v_cache), expected, rtol=0, atol=0)


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("dim, codes", [(64, False), (96, False), (256, False), (128, True)])
def test_kernels_compile_for_every_card(cc, dim, codes):
    """One head dimension for each row of CONFIGS that 16-bit queries take."""
    assert_all_compile(cc, dim, torch.bfloat16, codes)


@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("dim", [128, 256])
def test_float32_kernels_fit_the_smallest_card(dim):
    assert_all_compile(86, dim, torch.float32, codes=dim == 256)


def assert_all_compile(cc, dim, dtype, codes):
    """Decode, ``settled`` decode with and without sharing, prefill and the store."""
    *caches, table, lens = paged([300, 5], 2, dim, dtype=dtype)
    q, cu_seqlens = queries([3, 5], 6, dim, dtype=dtype)
    addresses, angles = torch.zeros(4, dtype=torch.int64), torch.ones(2, dim // 2)
    caches, scales = eight_bit(*caches) if codes else (caches, (None, None))
    new = q[:2], q[:2, :2], q[2:4, :2]

    def launch():
        module._paged_attention_triton(q[:2], *caches, table, lens, None, 0.1, addresses, *scales)
        for rotation, shared in (((None, None), False), ((angles, angles), False), ((angles, angles), True)):
            with mock.patch.object(decode, "shares", lambda *_, shared=shared: shared):
                module._append_attention_triton(
                    *new, *caches, table, lens, 0.1, addresses, *rotation, True, *scales
                )
        module._paged_attention_triton(q, *caches, table, lens, cu_seqlens, 0.1, addresses, *scales)
        _store_kv_triton(q[:2, :2], q[:2, 2:4], *caches, torch.tensor([1, 2]), addresses, *scales)

    assert_compiles(launch, cc, ["_parts_kernel", "_merge_kernel", "_prefill_kernel", "_store_kv_kernel"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(9, 3, 64), (12, 2, 128), (32, 8, 128), (8, 4, 256)])
def test_gpu_shapes(dtype, heads, kv_heads, dim):
    contexts = [2048, 1, 0, 700, 1025, *range(3, 600, 41)]
    cache = paged(contexts, kv_heads, dim, dtype=dtype, device="cuda")
    assert_correct(queries([1] * len(contexts), heads, dim, dtype=dtype, device="cuda")[0], *cache)
    counts = [min(context, 333) for context in contexts]
    q, cu_seqlens = queries(counts, heads, dim, dtype=dtype, device="cuda")
    assert_correct(q, *cache, cu_seqlens_q=cu_seqlens)
    for rotated, codes in ((False, False), (True, False), (True, True)):
        assert_append_is_store_and_attention(cache, heads, dtype=dtype, rotated=rotated, codes=codes)
    cache, scales = eight_bit(*cache)
    assert_correct(q, *cache, cu_seqlens_q=cu_seqlens, scales=scales)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, heads, kv_heads, dim", [
    (torch.bfloat16, 12, 2, 128), (torch.float16, 9, 3, 64), (torch.float32, 4, 4, 96), (torch.bfloat16, 8, 4, 256),
])  # fmt: skip
def test_gpu_rows_depend_on_nothing_else(dtype, heads, kv_heads, dim):
    contexts = [2048, 1, 0, 700, 1025, 2, *range(3, 600, 41)]
    k_cache, v_cache, table, lens = paged(contexts, kv_heads, dim, dtype=dtype, device="cuda")
    q = queries([1] * len(contexts), heads, dim, dtype=dtype, device="cuda")[0]
    together = paged_attention(q, k_cache, v_cache, table, lens)
    for programs in (1, 100, 10**6):
        with mock.patch.object(decode, "PROGRAMS", programs):
            assert torch.equal(paged_attention(q, k_cache, v_cache, table, lens), together)
    for i, context in enumerate(contexts):
        narrow = table[i : i + 1, : max(1, -(-context // 16))]
        assert torch.equal(
            paged_attention(q[i : i + 1], k_cache, v_cache, narrow, lens[i : i + 1])[0], together[i]
        )


@pytest.mark.gpu
@pytest.mark.parametrize("heads, kv_heads, dim", [(12, 2, 128), (9, 3, 64), (8, 4, 256), (32, 2, 128)])
def test_gpu_sharing_the_reading_of_blocks_changes_no_bit(heads, kv_heads, dim):
    """Groups of 8, 1, 3 and 20 with 40 blocks in common, whose members end inside and behind them."""
    generator, sizes = torch.Generator().manual_seed(0), (8, 1, 3, 20)
    contexts = torch.randint(300, 900, (sum(sizes),), generator=generator).tolist()
    *caches, table, lens = paged(contexts, kv_heads, dim, dtype=torch.bfloat16, device="cuda")
    begin = 0
    for members in sizes:
        longest = max(range(begin, begin + members), key=lambda i: contexts[i])
        for i in range(begin, begin + members):
            count = min(40, (contexts[i] - 1) // 16)
            table[i, :count] = table[longest, :count]
        begin += members
    q = queries([1] * len(contexts), heads, dim, dtype=torch.bfloat16, device="cuda")[0]
    with mock.patch.object(decode, "shares", lambda *_: False):
        expected = assert_correct(q, *caches, table, lens)
    for programs in (1, 300, 10**6):
        with mock.patch.multiple(decode, shares=lambda *_: True, PROGRAMS=programs):
            assert torch.equal(paged_attention(q, *caches, table, lens), expected)


@pytest.mark.gpu
def test_gpu_workspace_is_as_stated():
    contexts = [2048] * 64
    k_cache, v_cache, table, lens = paged(contexts, 2, 128, dtype=torch.bfloat16, spare=0, device="cuda")
    q, _ = queries([1] * 64, 12, 128, dtype=torch.bfloat16, device="cuda")
    splits = 2048 // math.prod(decode.config(q))
    stated = 4 * 64 * 12 * splits * (128 + 2)
    paged_attention(q, k_cache, v_cache, table, lens)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = paged_attention(q, k_cache, v_cache, table, lens)
    assert torch.cuda.max_memory_allocated() - before <= stated + out.nbytes + 4096


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits():
    blocks = 2**31 // (16 * 8 * 128) + 2
    cache = torch.zeros(blocks, 16, 8, 128, dtype=torch.bfloat16, device="cuda")
    rows, last = torch.randn(16, 8, 128, device="cuda").bfloat16(), blocks - 1
    store_kv(rows, rows, cache, cache, torch.arange(last * 16, blocks * 16, device="cuda"))
    assert torch.equal(cache[last], rows)
    table = torch.tensor([[last]], dtype=torch.int32, device="cuda")
    q, cu_seqlens = queries([16], 8, 128, dtype=torch.bfloat16, device="cuda")
    lens = torch.tensor([16], dtype=torch.int32, device="cuda")
    small, first = cache[last:].clone(), torch.zeros_like(table)
    for some, options in ((q, {"cu_seqlens_q": cu_seqlens}), (q[:1], {})):
        expected = paged_attention(some, small, small, first, lens, **options)
        assert torch.equal(paged_attention(some, cache, cache, table, lens, **options), expected)
