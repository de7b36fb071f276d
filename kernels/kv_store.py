"""The store into a paged key-value cache, and what all operations on the cache share.

Token t of k and v (T, KVH, D) goes to slot ``slot_mapping[t]`` = block * block_size + offset of the caches
(num_blocks, block_size, KVH, D); a negative slot skips the token. Reads and writes 2 T KVH D elements each.

Caches may hold 8-bit codes, with ``scales``, a float32 for each row of D values:

    scale = max|x| / 127        code = floor(x / scale + 1/2)        x' = scale * code

so that |x' - x| <= scale / 2 = max|x| / 254, and a token takes D + 4 bytes a head instead of 2 D. Rows whose scale is
below 1e-35 are zeros. Codes are multiplied as they are, and scales enter in float32: no value is rounded once more.

A CUDA graph fixes the caches' addresses at capture; with ``addresses`` the kernels read them from the device when
they run, so that the caches may move between replays (their strides may not change).
"""

import torch
import triton
import triton.language as tl

from . import _runtime
from .dependent_launch import dependent_launch, wait_for_inputs
from .paged_attention_cpu import quantize_rows_ref, store_kv_cpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU_DTYPES = (*DTYPES, torch.float64)


def store_kv_ref(k, v, k_cache, v_cache, slot_mapping, scales=None):
    """Specification of :func:`store_kv`, in place."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    at = slots // k_cache.shape[1], slots % k_cache.shape[1]
    for i, (new, cache) in enumerate(((k[kept], k_cache), (v[kept], v_cache))):
        if scales is None:
            cache[at] = new
        else:
            cache[at], scales[i][at] = quantize_rows_ref(new)


@triton.jit
def place(cache, addresses, index: tl.constexpr):
    """The cache's pointer, read from ``addresses`` where these are given."""
    if addresses is None:
        return cache
    else:
        return tl.multiple_of(tl.load(addresses + index).to(cache.dtype, bitcast=True), 16)


@triton.jit
def quantized(x):
    """Codes int8 and scales (rows,) float32 of rows (rows, BLOCK_D)."""
    x = x.to(tl.float32)
    scale = tl.max(tl.abs(x), 1) * (1 / 127)
    scale = tl.where(scale > 1e-35, scale, 0.0)
    divisor = tl.where(scale > 0, scale, float("inf"))[:, None]
    return tl.floor(tl.div_rn(x, tl.broadcast_to(divisor, x.shape)) + 0.5).to(tl.int8), scale


@triton.jit
def _store_kv_kernel(
    k, v, k_cache, v_cache, slot_mapping, addresses, k_scales, v_scales,
    k_token, k_head, v_token, v_head, k_cache_block, k_cache_token, k_cache_head,
    v_cache_block, v_cache_token, v_cache_head, scale_block, scale_token, scale_head,
    KVH: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    k_cache, v_cache = place(k_cache, addresses, 0), place(v_cache, addresses, 1)
    block, offset = slot // PAGE, slot % PAGE
    head, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (head < KVH) & (d < D)
    key = tl.load(k + token * k_token + head * k_head + d, mask=inside, other=0.0)
    value = tl.load(v + token * v_token + head * v_head + d, mask=inside, other=0.0)
    if k_scales is not None:
        key, k_scale = quantized(key)
        value, v_scale = quantized(value)
        row = tl.arange(0, BLOCK_H)
        at = block * scale_block + offset * scale_token + row * scale_head
        tl.store(place(k_scales, addresses, 2) + at, k_scale, mask=row < KVH)
        tl.store(place(v_scales, addresses, 3) + at, v_scale, mask=row < KVH)
    k_row = k_cache + block * k_cache_block + offset * k_cache_token
    v_row = v_cache + block * v_cache_block + offset * v_cache_token
    tl.store(k_row + head * k_cache_head + d, key, mask=inside)
    tl.store(v_row + head * v_cache_head + d, value, mask=inside)


def scale_strides(scales):
    return (0, 0, 0) if scales is None else scales.stride()


def _store_kv_triton(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor,
    addresses: torch.Tensor | None, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None,
) -> None:  # fmt: skip
    tokens, kv_heads, dim = k.shape
    if tokens == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    with _runtime.launch_on(k):
        _store_kv_kernel[(tokens,)](
            k, v, k_cache, v_cache, slot_mapping.contiguous(), addresses, k_scales, v_scales,
            *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            *scale_strides(k_scales), KVH=kv_heads, D=dim, PAGE=k_cache.shape[1],
            BLOCK_H=triton.next_power_of_2(kv_heads), BLOCK_D=triton.next_power_of_2(dim),
            num_warps=4, **dependent_launch(k),
        )  # fmt: skip


_store_kv = torch.library.custom_op(
    f"{_runtime.LIB}::store_kv", _store_kv_triton,
    mutates_args=("k_cache", "v_cache", "k_scales", "v_scales"), device_types="cuda",
)  # fmt: skip
_store_kv.register_kernel("cpu")(_store_kv_triton if _runtime.INTERPRET else store_kv_cpu)
_store_kv.register_fake(lambda *inputs: None)


# The checks below make their messages on failure only: a decode step comes here twice a layer.
def check_caches(x, k_cache, v_cache, scales=None):
    """``x`` (T, heads, D) and the caches must agree in head dimension, dtype and device; int8 ones have scales."""
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
    stored = dtype if scales is None else torch.int8
    if dtype not in allowed or k_cache.dtype != stored or v_cache.dtype != stored:
        raise ValueError(
            "expected one floating dtype, or caches of torch.int8 with scales, got "
            f"{dtype} and caches of {k_cache.dtype}, {v_cache.dtype}{'' if scales is None else ' with scales'}"
        )
    for scale in scales or ():
        check_index("each of the scales", scale, k_cache.shape[:3], torch.float32, device)
    if scales is not None and scales[0].stride() != scales[1].stride():
        raise ValueError(f"scales lie differently: strides {scales[0].stride()}, {scales[1].stride()}")
    if k_cache.device != device or v_cache.device != device:
        raise ValueError(
            f"expected one device, got {device} and caches on {k_cache.device}, {v_cache.device}"
        )


def check_index(name, index, shape, dtype, device):
    if index.shape != shape or index.dtype != dtype or index.device != device:
        got = f"{tuple(index.shape)} {index.dtype} on {index.device}"
        raise ValueError(f"{name} must be {shape} {dtype} on {device}, got {got}")


def check_addresses(addresses, device, scales=None):
    if addresses is not None:
        if device.type == "cpu" and not _runtime.INTERPRET:
            raise ValueError("addresses are read by kernels on a GPU, got caches on the CPU")
        check_index("addresses", addresses, (2 if scales is None else 4,), torch.int64, device)


def store_kv(k, v, k_cache, v_cache, slot_mapping, *, addresses=None, scales=None):
    """Write the keys and values of T tokens into the paged cache, in place.

    Args:
        k, v: (T, KVH, D), the dtype of the caches, or any where these are int8.
        k_cache, v_cache: (num_blocks, block_size, KVH, D); block_size a power of two >= 16. Written.
        slot_mapping: (T,) int64, slot = block * block_size + offset; -1 skips the token. Slots must differ.
        addresses: (2,) int64, where the caches begin when the kernel runs, with scales (4,), then where these do;
            None: where they are now.
        scales: for caches of int8 codes, a pair like the caches, each (num_blocks, block_size, KVH) float32. Written.

    Raises:
        ValueError: a shape, dtype, device or block size is not as above.
    """
    check_caches(k, k_cache, v_cache, scales)
    if k.shape != v.shape or k.dtype != v.dtype or k.device != v.device or k.shape[1] != k_cache.shape[2]:
        shape = f"(T, {k_cache.shape[2]}, {k_cache.shape[3]})"
        raise ValueError(f"k and v must be {shape}, alike, got {tuple(k.shape)} and {tuple(v.shape)}")
    check_index("slot_mapping", slot_mapping, (len(k),), torch.int64, k.device)
    check_addresses(addresses, k.device, scales)
    _store_kv(k, v, k_cache, v_cache, slot_mapping, addresses, *(scales or (None, None)))
