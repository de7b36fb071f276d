"""The Triton kernels of tree attention: forward, dq, and dk with dv, over the tiles that ``tree_plan`` lists.

Everything is in base 2: scores are multiplied by scale * log2(e), and the saved logsumexp is a logarithm to base 2.
A query that sees nothing gives zeros; its logsumexp is +inf, so that backward's probabilities are zeros, too.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(x, stride, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, GUARD: tl.constexpr):
    """Rows 0..BLOCK of x (rows, D) with row stride ``stride``, zeros outside; without GUARD all rows exist."""
    row, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = x + row[:, None] * stride + d[None, :]
    if GUARD and D < BLOCK_D:
        return tl.load(pointers, mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)
    elif GUARD:
        return tl.load(pointers, mask=(row < rows)[:, None], other=0.0)
    elif D < BLOCK_D:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_tile(x, tile, stride, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    row, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    tl.store(x + row[:, None] * stride + d[None, :], tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _forward_blocks(
    m, l, acc, q, k, v, key_end, listed, count, i, T, scale2, k_token, v_token,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PLAN_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax's steps over ``count`` listed key blocks."""
    PARTS: tl.constexpr = PLAN_N // BLOCK_N
    for step in range(0, count * PARTS):
        first = tl.load(listed + step // PARTS) * PLAN_N + step % PARTS * BLOCK_N
        key = _tile(k + first.to(tl.int64) * k_token, k_token, T - first, D, BLOCK_N, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee")
        if MASKED:
            n = first + tl.arange(0, BLOCK_N)
            end = tl.load(key_end + n, mask=n < T, other=0)
            seen = (n[None, :] <= i[:, None]) & (i[:, None] < end[None, :])
            scores = tl.where(seen, scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, 1) * scale2)
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        else:
            m_new = tl.maximum(m, tl.max(scores, 1) * scale2)
            shift = m_new
        p = tl.exp2(scores * scale2 - shift[:, None])
        shrink = tl.exp2(m - shift)
        l = l * shrink + tl.sum(p, 1)
        value = _tile(v + first.to(tl.int64) * v_token, v_token, T - first, D, BLOCK_N, BLOCK_D, MASKED)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        m = m_new
    return m, l, acc


@triton.jit(do_not_specialize=["T", "width"])
def _forward_kernel(
    q, k, v, key_end, blocks, out, lse, T, width, scale2,
    q_token, q_head, k_token, k_head, v_token, v_head,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PLAN_M: tl.constexpr, PLAN_N: tl.constexpr,
):  # fmt: skip
    head, H = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    # The last queries of a sequence see the most keys: they start first.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    start = first.to(tl.int64)
    i = first + tl.arange(0, BLOCK_M)
    queries = _tile(q + head * q_head + start * q_token, q_token, T - first, D, BLOCK_M, BLOCK_D, True)
    row = blocks + (start // PLAN_M) * width
    whole, others = tl.load(row), tl.load(row + 1)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m, l, acc = _forward_blocks(
        m, l, acc, queries, k, v, key_end, row + 2, whole, i, T, scale2, k_token, v_token,
        D, BLOCK_D, BLOCK_N, PLAN_N, False,
    )  # fmt: skip
    m, l, acc = _forward_blocks(
        m, l, acc, queries, k, v, key_end, row + width - others, others, i, T, scale2, k_token, v_token,
        D, BLOCK_D, BLOCK_N, PLAN_N, True,
    )  # fmt: skip
    saw = l > 0
    l = tl.where(saw, l, 1.0)
    tl.store(lse + head * T + i, tl.where(saw, m + tl.log2(l), float("inf")), mask=i < T)
    _store_tile(out + (start * H + head) * D, acc / l[:, None], H * D, T - first, D, BLOCK_M, BLOCK_D)


@triton.jit
def _dq_blocks(
    dq, q, dout, lse, delta, k, v, key_end, listed, count, i, T, scale2, k_token, v_token,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PLAN_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = PLAN_N // BLOCK_N
    for step in range(0, count * PARTS):
        first = tl.load(listed + step // PARTS) * PLAN_N + step % PARTS * BLOCK_N
        key = _tile(k + first.to(tl.int64) * k_token, k_token, T - first, D, BLOCK_N, BLOCK_D, MASKED)
        value = _tile(v + first.to(tl.int64) * v_token, v_token, T - first, D, BLOCK_N, BLOCK_D, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(key), input_precision="ieee") * scale2 - lse[:, None])
        if MASKED:
            n = first + tl.arange(0, BLOCK_N)
            end = tl.load(key_end + n, mask=n < T, other=0)
            p = tl.where((n[None, :] <= i[:, None]) & (i[:, None] < end[None, :]), p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(value), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["T", "width"])
def _dq_kernel(
    q, k, v, key_end, blocks, out, lse, dout, delta, dq, T, width, scale, scale2,
    q_token, q_head, k_token, k_head, v_token, v_head,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PLAN_M: tl.constexpr, PLAN_N: tl.constexpr,
):  # fmt: skip
    """dq, and delta = sum_d out * dout, which dk and dv need next."""
    head, H = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    start = first.to(tl.int64)
    i = first + tl.arange(0, BLOCK_M)
    dense = (start * H + head) * D
    queries = _tile(q + head * q_head + start * q_token, q_token, T - first, D, BLOCK_M, BLOCK_D, True)
    upstream = _tile(dout + dense, H * D, T - first, D, BLOCK_M, BLOCK_D, True)
    result = _tile(out + dense, H * D, T - first, D, BLOCK_M, BLOCK_D, True)
    products = tl.sum(result.to(tl.float32) * upstream.to(tl.float32), 1)
    tl.store(delta + head * T + i, products, mask=i < T)
    log_sum = tl.load(lse + head * T + i, mask=i < T, other=float("inf"))
    row = blocks + (start // PLAN_M) * width
    whole, others = tl.load(row), tl.load(row + 1)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _dq_blocks(
        acc, queries, upstream, log_sum, products, k, v, key_end, row + 2, whole, i, T, scale2, k_token, v_token,
        D, BLOCK_D, BLOCK_N, PLAN_N, False,
    )  # fmt: skip
    acc = _dq_blocks(
        acc, queries, upstream, log_sum, products, k, v, key_end, row + width - others, others, i, T, scale2,
        k_token, v_token, D, BLOCK_D, BLOCK_N, PLAN_N, True,
    )  # fmt: skip
    _store_tile(dq + dense, acc * scale, H * D, T - first, D, BLOCK_M, BLOCK_D)


@triton.jit
def _dkv_steps(
    dk, dv, key, value, end, n, q, dout, lse, delta, begin, stop, per_head, low, skipped, first_key, T, scale2,
    q_token, q_head, dout_token,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Steps ``begin`` to ``stop`` of a walk over (query head, query block), without blocks low..low + skipped."""
    for step in range(begin, stop):
        head = (step // per_head).to(tl.int64)
        block = step % per_head
        block = tl.where(block < low, block, block + skipped)
        first = first_key + block * BLOCK_M
        start, rows = first.to(tl.int64), T - first
        queries = _tile(q + head * q_head + start * q_token, q_token, rows, D, BLOCK_M, BLOCK_D, MASKED)
        upstream = _tile(dout + head * D + start * dout_token, dout_token, rows, D, BLOCK_M, BLOCK_D, MASKED)
        i = first + tl.arange(0, BLOCK_M)
        if MASKED:
            log_sum = tl.load(lse + head * T + i, mask=i < T, other=float("inf"))
            products = tl.load(delta + head * T + i, mask=i < T, other=0.0)
        else:
            log_sum = tl.load(lse + head * T + i)
            products = tl.load(delta + head * T + i)
        p = tl.exp2(tl.dot(key, tl.trans(queries), input_precision="ieee") * scale2 - log_sum[None, :])
        if MASKED:
            p = tl.where((n[:, None] <= i[None, :]) & (i[None, :] < end[:, None]), p, 0.0)
        dv = tl.dot(p.to(upstream.dtype), upstream, dv, input_precision="ieee")
        ds = p * (tl.dot(value, tl.trans(upstream), input_precision="ieee") - products[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["T", "key_blocks", "slot_count"])
def _dkv_kernel(
    q, k, v, key_end, items, lse, dout, delta, grads, slots, T, key_blocks, slot_count, scale, scale2,
    q_token, q_head, k_token, k_head, v_token, v_head,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A chunk of a key block's walk, to grads (2, T, KVH, D) or slots (blocks, KVH, 2, BLOCK_N, D)."""
    kv_head, KVH, item = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1)
    most = tl.load(items)
    if item >= tl.load(items + 1):
        return
    block, chunk = tl.load(items + 2 + 2 * item), tl.load(items + 3 + 2 * item)
    first = block * BLOCK_N
    start = first.to(tl.int64)
    n = first + tl.arange(0, BLOCK_N)
    end = tl.load(key_end + n, mask=n < T, other=0)
    key = _tile(k + kv_head * k_head + start * k_token, k_token, T - first, D, BLOCK_N, BLOCK_D, True)
    value = _tile(v + kv_head * v_head + start * v_token, v_token, T - first, D, BLOCK_N, BLOCK_D, True)
    DIAGONAL: tl.constexpr = (BLOCK_N + BLOCK_M - 2) // BLOCK_M
    walk = tl.cdiv(tl.maximum(tl.minimum(tl.max(end), T) - first, 0), BLOCK_M)
    low = tl.minimum(walk, DIAGONAL)
    whole = tl.maximum((tl.minimum(tl.min(end), T) - first) // BLOCK_M - low, 0)
    begin, stop = chunk * most, tl.minimum((chunk + 1) * most, GROUP * walk)
    seam = GROUP * whole
    H = KVH * GROUP
    q += kv_head * GROUP * q_head
    dout += kv_head * GROUP * D
    lse += kv_head * GROUP * T
    delta += kv_head * GROUP * T
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk, dv = _dkv_steps(
        dk, dv, key, value, end, n, q, dout, lse, delta, begin, tl.minimum(stop, seam), whole, 0, low, first, T,
        scale2, q_token, q_head, H * D, D, BLOCK_D, BLOCK_M, False,
    )  # fmt: skip
    dk, dv = _dkv_steps(
        dk, dv, key, value, end, n, q, dout, lse, delta, tl.maximum(begin, seam) - seam, stop - seam, walk - whole,
        low, whole, first, T, scale2, q_token, q_head, H * D, D, BLOCK_D, BLOCK_M, True,
    )  # fmt: skip
    dk *= scale
    per_block = items + 2 + 2 * (key_blocks + slot_count) + 2 * block
    if tl.load(per_block + 1) == 1:
        to = grads + (start * KVH + kv_head) * D
        _store_tile(to, dk, KVH * D, T - first, D, BLOCK_N, BLOCK_D)
        _store_tile(to + KVH * D * T.to(tl.int64), dv, KVH * D, T - first, D, BLOCK_N, BLOCK_D)
    else:
        slot = (tl.load(per_block) + chunk).to(tl.int64)
        part = slots + (slot * KVH + kv_head) * (2 * BLOCK_N * D)
        _store_tile(part, dk, D, BLOCK_N, D, BLOCK_N, BLOCK_D)
        _store_tile(part + BLOCK_N * D, dv, D, BLOCK_N, D, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["T", "key_blocks", "slot_count"])
def _merge_kernel(
    items, slots, grads, T, key_blocks, slot_count,
    D: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the chunks of a key block in order, ROWS keys a program, and rounds the sum once."""
    kv_head, KVH, which = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(2)
    PARTS: tl.constexpr = BLOCK_N // ROWS
    block, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    per_block = items + 2 + 2 * (key_blocks + slot_count) + 2 * block
    chunks = tl.load(per_block + 1)
    if chunks == 1:
        return
    slot = tl.load(per_block).to(tl.int64)
    first = block * BLOCK_N + part * ROWS
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for chunk in range(0, chunks):
        at = ((((slot + chunk) * KVH + kv_head) * 2 + which) * BLOCK_N + part * ROWS) * D
        total += _tile(slots + at, D, ROWS, D, ROWS, BLOCK_D, True)
    to = grads + ((which * T.to(tl.int64) + first) * KVH + kv_head) * D
    _store_tile(to, total, KVH * D, T - first, D, ROWS, BLOCK_D)
