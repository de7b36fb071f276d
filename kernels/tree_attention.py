"""Attention over a packed tree of tokens, with gradients: training and scoring with shared prefixes.

T tokens stand in preorder, and query i sees key j when j <= i < key_end[j], key_end[j] being the index just past the
last descendant of j. For head h and its key head g = h // (H / KVH),

    out[i, h] = sum_j p[i, h, j] v[j, g],    p[i, h] = softmax over the visible j of scale * q[i, h] . k[j, g]

    dv[j, g] = sum_{h, i} p[i, h, j] dout[i, h]
    ds[i, h, j] = p[i, h, j] (dout[i, h] . v[j, g] - dout[i, h] . out[i, h])
    dq[i, h] = scale sum_j ds[i, h, j] k[j, g],    dk[j, g] = scale sum_{h, i} ds[i, h, j] q[i, h]

Packed sequences are the special case in which key_end is the end of each token's sequence. The rule alone is what
counts: any key_end in 0..T is allowed, and a query that sees nothing gives zeros.

With P visible pairs (tiles that hide every pair are skipped) forward does 4 P H D FLOPs and backward 14 P H D: dq and
dk, dv each recompute the probabilities. Saved for backward: the arguments, out, and H T float32 (the logsumexp).
Extra memory, in bytes, for tiles of the configuration's sizes: the plan, 4 ceil(T / PLAN_M) (2 + ceil(T / PLAN_N))
and 4 (2 + 4 B + 2 S) for B = ceil(T / BLOCK_N) blocks of BLOCK_N keys and S = max(B, 256 // KVH) slots; in backward
4 H T for dout . out, and 8 S BLOCK_N KVH D for sums of dk and dv in parts.

Scores, softmax and sums are float32; the probabilities and ds are rounded to the inputs' dtype before their second
product, and every result is rounded once. No atomics: a call repeats bit for bit. Tiles stand at multiples of their
size in the packed order, so where a sequence starts can move the last bits of its result. The CPU computes in
float64, where the order of sums no longer shows in float32: training agrees with decoding. It makes ``CPU_SCORES``
bytes of scores at a time, without the keys that no query of a chunk sees.

Papers: FlashAttention-2, arXiv 2307.08691.
"""

import torch
import triton

from . import _runtime
from .dispatch import route
from .tree_plan import launch_plan, plan_sizes, slots_of
from .tree_tiles import _dkv_kernel, _dq_kernel, _forward_kernel, _merge_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU_SCORES = 2**24  # bytes of scores at a time
CPU_QUERIES = 256
MERGE_ROWS = 16
LOG2_E = 1.4426950408889634

# By most columns of a padded head: the plan's tile (queries, keys), which the tiles of forward and dq divide; then
# (BLOCK_M, BLOCK_N, warps, stages) of forward, dq, and dk with dv. What is fastest on sm_90 fits the 99 KiB of
# sm_86, sm_89 and sm_120, so one table serves all cards.
HALF = {
    64: ((64, 128), (64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
    128: ((64, 64), (64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 3)),
    256: ((64, 32), (64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)),
}
FLOAT = {  # float32 has no tensor cores here: small tiles keep its unrolled products short
    64: ((64, 32), (64, 32, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1)),
    128: ((32, 32), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    256: ((32, 16), (32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}


def _config(dim, dtype):
    """Padded head dimension and its tiles."""
    block_d = max(16, triton.next_power_of_2(dim))
    return block_d, (FLOAT if dtype.itemsize == 4 else HALF)[max(64, block_d)]


def tree_attention_ref(q, k, v, key_end, scale=None):
    """Specification of :func:`tree_attention`, in the dtype of the inputs."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    index = torch.arange(len(q), device=q.device)
    seen = (index[None, :] <= index[:, None]) & (index[:, None] < key_end[None, :])
    scores = scale * torch.einsum("qhd,khd->hqk", q, k)
    p = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~seen, 0)
    return torch.einsum("hqk,khd->qhd", p, v)


def _tree_plan_triton(
    key_end: torch.Tensor, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    key_end = key_end.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
    plan, _, _, dkv = _config(dim, dtype)[1]
    shape, size = plan_sizes(len(key_end), plan, dkv, kv_heads)
    blocks, items = key_end.new_empty(shape), key_end.new_empty(size)
    if len(key_end):
        with _runtime.launch_on(key_end):
            launch_plan(key_end, blocks, items, heads // kv_heads, kv_heads, plan, dkv)
    return [key_end, blocks, items]


def _tree_plan_torch(key_end, heads, kv_heads, dim, dtype):
    return [key_end.clone(), *(key_end.new_empty(0, dtype=torch.int32) for _ in range(2))]


def _tree_plan_fake(key_end, heads, kv_heads, dim, dtype):
    if key_end.device.type == "cpu" and not _runtime.INTERPRET:
        return _tree_plan_torch(key_end, heads, kv_heads, dim, dtype)
    plan, _, _, dkv = _config(dim, dtype)[1]
    shape, size = plan_sizes(len(key_end), plan, dkv, kv_heads)
    return [key_end.new_empty(s, dtype=torch.int32) for s in (key_end.shape, shape, size)]


def _rows(x):
    """x with contiguous heads, and rows near enough for 32-bit offsets inside a tile."""
    return x if x.stride(2) == 1 and x.stride(0) < 2**23 else x.contiguous()


def _forward_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_end: torch.Tensor, blocks: torch.Tensor, scale: float
) -> list[torch.Tensor]:  # fmt: skip
    (T, H, D), KVH = q.shape, k.shape[1]
    out, lse = _forward_fake(q, k, v, key_end, blocks, scale)
    if not q.numel():
        return [out, lse]
    q, k, v = _rows(q), _rows(k), _rows(v)
    block_d, ((plan_m, plan_n), (block_m, block_n, warps, stages), *_) = _config(D, q.dtype)
    with _runtime.launch_on(q):
        _forward_kernel[(H, triton.cdiv(T, block_m))](
            q, k, v, key_end, blocks, out, lse, T, blocks.shape[1], scale * LOG2_E,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            GROUP=H // KVH, D=D, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, PLAN_M=plan_m, PLAN_N=plan_n,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return [out, lse]


def _backward_triton(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_end: torch.Tensor,
    blocks: torch.Tensor, items: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float,
) -> list[torch.Tensor]:  # fmt: skip
    (T, H, D), KVH = q.shape, k.shape[1]
    dq, grads = _backward_fake(dout, q, k)
    if not q.numel():
        return [dq, grads]
    q, k, v, dout = _rows(q), _rows(k), _rows(v), dout.contiguous()
    block_d, (plan, _, (dq_m, dq_n, dq_warps, dq_stages), dkv) = _config(D, q.dtype)
    block_m, block_n, warps, stages = dkv
    key_blocks, scale2 = triton.cdiv(T, block_n), scale * LOG2_E
    delta = torch.empty_like(lse)
    slot_count = slots_of(key_blocks, KVH)
    slots = torch.empty(slot_count, KVH, 2, block_n, D, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    with _runtime.launch_on(q):
        _dq_kernel[(H, triton.cdiv(T, dq_m))](
            q, k, v, key_end, blocks, out, lse, dout, delta, dq, T, blocks.shape[1], scale, scale2, *strides,
            GROUP=H // KVH, D=D, BLOCK_M=dq_m, BLOCK_N=dq_n, BLOCK_D=block_d, PLAN_M=plan[0], PLAN_N=plan[1],
            num_warps=dq_warps, num_stages=dq_stages,
        )  # fmt: skip
        _dkv_kernel[(KVH, key_blocks + slot_count)](
            q, k, v, key_end, items, lse, dout, delta, grads, slots, T, key_blocks, slot_count, scale, scale2,
            *strides, GROUP=H // KVH, D=D, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        _merge_kernel[(KVH, key_blocks * (block_n // MERGE_ROWS), 2)](
            items, slots, grads, T, key_blocks, slot_count,
            D=D, BLOCK_N=block_n, ROWS=MERGE_ROWS, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return [dq, grads]


def _cpu_chunks(q, k, v, key_end, scale):
    """For each chunk of queries: its slice, scaled scores (KVH, G, queries, keys), its keys, and their k and v."""
    (T, H, _), KVH = q.shape, k.shape[1]
    chunk = max(1, min(CPU_QUERIES, CPU_SCORES // max(1, 8 * H * T)))
    index = torch.arange(T)
    for start in range(0, T, chunk):
        rows = slice(start, min(start + chunk, T))
        keys = (key_end[: rows.stop] > start).nonzero()[:, 0]
        some_k, some_v = (x[keys].double().movedim(1, 0)[:, None] for x in (k, v))
        scores = _grouped(q[rows], KVH) @ some_k.mT * scale
        i = index[rows, None]
        scores.masked_fill_((keys > i) | (i >= key_end[keys]), -torch.inf)
        yield rows, scores, keys, some_k, some_v


def _grouped(x, kv_heads):
    """(T, H, D) to (KVH, G, T, D) in float64."""
    return x.double().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _ungrouped(x, dtype):
    return x.permute(2, 0, 1, 3).flatten(1, 2).to(dtype)


@torch.no_grad()
def _forward_torch(q, k, v, key_end, blocks, scale):
    out, lse = _forward_fake(q, k, v, key_end, blocks, scale)
    for rows, scores, _, _, some_v in _cpu_chunks(q, k, v, key_end, scale):
        log_sum = scores.logsumexp(-1)
        log_sum.masked_fill_(log_sum == -torch.inf, torch.inf)
        out[rows] = _ungrouped((scores - log_sum[..., None]).exp() @ some_v, q.dtype)
        lse[:, rows] = log_sum.flatten(0, 1)
    return [out, lse]


@torch.no_grad()
def _backward_torch(dout, q, k, v, key_end, blocks, items, out, lse, scale):
    KVH = k.shape[1]
    dq = torch.empty(q.shape, dtype=q.dtype)
    grads = torch.zeros(2, *k.shape, dtype=torch.float64)
    for rows, scores, keys, some_k, some_v in _cpu_chunks(q, k, v, key_end, scale):
        p = scores.sub_(lse[:, rows].unflatten(0, (KVH, -1))[..., None]).exp_()
        queries, upstream = _grouped(q[rows], KVH), _grouped(dout[rows], KVH)
        grads[1].index_add_(0, keys, (p.mT @ upstream).sum(1).movedim(0, 1))
        ds = upstream @ some_v.mT
        ds = p.mul_(ds - (p * ds).sum(-1, keepdim=True)).mul_(scale)
        dq[rows] = _ungrouped(ds @ some_k, q.dtype)
        grads[0].index_add_(0, keys, (ds.mT @ queries).sum(1).movedim(0, 1))
    return [dq, grads.to(q.dtype)]


def _forward_fake(q, k, v, key_end, blocks, scale):
    plain = q.device.type == "cpu" and not _runtime.INTERPRET
    lse = q.new_empty(q.shape[1], len(q), dtype=torch.float64 if plain else torch.float32)
    return [torch.empty(q.shape, dtype=q.dtype, device=q.device), lse]


def _backward_fake(dout, q, k, *others):
    new = lambda *shape: torch.empty(*shape, dtype=q.dtype, device=q.device)
    return [new(*q.shape), new(2, *k.shape)]


_plan_op = _runtime.register(
    "tree_plan", triton_impl=_tree_plan_triton, torch_impl=_tree_plan_torch, fake=_tree_plan_fake
)
_forward_op = _runtime.register(
    "tree_attention", triton_impl=_forward_triton, torch_impl=_forward_torch, fake=_forward_fake
)
_backward_op = _runtime.register(
    "tree_attention_bwd", triton_impl=_backward_triton, torch_impl=_backward_torch, fake=_backward_fake
)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_end, blocks, items, scale):
        forward = route(_forward_op, _forward_triton, _forward_torch, q.device)
        out, lse = forward(q, k, v, key_end, blocks, scale)
        ctx.save_for_backward(q, k, v, key_end, blocks, items, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, *others = ctx.saved_tensors
        backward = route(_backward_op, _backward_triton, _backward_torch, q.device)
        dq, grads = backward(dout, q, *others, ctx.scale)
        return dq, grads[0], grads[1], None, None, None, None


# Messages are made on failure only: a forward pass comes here once a layer.
def _check(q, k, v, key_end):
    if q.ndim != 3 or not 1 <= q.shape[2] <= 256 or q.shape[1] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (T, H, D) with D from 1 to 256")
    T, H, D = q.shape
    if k.shape != v.shape or k.ndim != 3 or k.shape[::2] != (T, D) or k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(
            f"k and v have shapes {tuple(k.shape)} and {tuple(v.shape)}, expected ({T}, KVH, {D}), KVH dividing {H}"
        )
    allowed = (*DTYPES, torch.float64) if q.device.type == "cpu" and not _runtime.INTERPRET else DTYPES
    if q.dtype not in allowed or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, expected one of {allowed}")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}, expected one device")
    _check_key_end(key_end, T, q.device)


def _check_key_end(key_end, T, device):
    if key_end.shape != (T,) or key_end.dtype not in (torch.int32, torch.int64) or key_end.device != device:
        got = f"{tuple(key_end.shape)} {key_end.dtype} on {key_end.device}"
        raise ValueError(f"key_end is {got}, expected ({T},) int32 or int64 on {device}")


def tree_plan(q, k, key_end):
    """What :func:`tree_attention` derives from key_end: pass it as ``plan`` to calls of equal shapes and key_end.

    Args:
        q: (T, H, D) and k: (T, KVH, D), of which only shapes, dtype and device count.
        key_end: as for :func:`tree_attention`.

    Returns:
        list of integer tensors: a copy of key_end; the tiles that each block of queries sees; the walks of the
        blocks of keys. Made without waiting for the device.

    Raises:
        ValueError: key_end is not (T,) integers on q's device; where values can be looked at, not within 0..T.
    """
    _check_key_end(key_end, len(q), q.device)
    compiling = torch.compiler.is_compiling()
    if (q.device.type == "cpu" or _runtime.CHECK) and not compiling and len(key_end):
        least, most = key_end.min().item(), key_end.max().item()
        if least < 0 or most > len(q):
            raise ValueError(f"key_end is within {least}..{most}, expected 0..{len(q)}")
    make = route(_plan_op, _tree_plan_triton, _tree_plan_torch, q.device)
    return make(key_end, q.shape[1], k.shape[1], q.shape[2], q.dtype)


def tree_attention(q, k, v, key_end, scale=None, *, plan=None):
    """Causal attention over a packed tree (or packed sequences) of tokens, with gradients to q, k and v.

    Args:
        q: (T, H, D), D at most 256; float32, float16 or bfloat16 (float64 on the CPU). Any strides.
        k, v: (T, KVH, D), q's dtype; KVH divides H. Any strides.
        key_end: (T,) int64 or int32: query i sees key j when j <= i < key_end[j].
        scale: positive factor of the scores, 1 / sqrt(D) by default.
        plan: of :func:`tree_plan` for these shapes and this key_end, made here when None.

    Returns:
        (T, H, D) in q's dtype.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.
    """
    _check(q, k, v, key_end)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"the scale is {scale}, expected a positive number")
    plan = tree_plan(q, k, key_end) if plan is None else plan
    if len(plan[0]) != len(q):
        raise ValueError(f"the plan is for {len(plan[0])} tokens, expected one for {len(q)}")
    return _TreeAttention.apply(q, k, v, *plan, scale)
