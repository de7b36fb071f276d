"""A linear layer with low-rank adapters on up to 512 rows, in two to four launches and with A and B read live.

    h = x A^T                          x (M, K), A (R, K), h (M, R): the ranks of all adapters that share x
    y = x W^T + bias, and y[:, part p] += scaling * h_p B_p^T       B (rows, r): the rows of all parts in turn

Up to 16 rows of x on packed 4-bit codes, ``ranks`` leaves partial sums of h over parts of K, and the base product
ends with the rest (``packed_matmul``). From there to 256 rows on Hopper the base product of a small W makes the
ranks, too (``tiled_matmul``), and ``add_update`` ends: it adds up the base's own partial sums, bias and update. Both
are two launches. A large W (``hopper_matmul``) takes three: ``ranks`` follows the base product at once, on what
multiprocessors that leaves. Elsewhere up to 64 rows are three or four: ``ranks``, the base product, perhaps on W
dequantised for this call, and ``add_update``. More rows are for ``add_update`` alone: h and the base product are a
library's. Either way what is stored is y, or what follows y in a decoder layer: see ``few_rows``. A and B are read
where they lie, in their own dtype (by a library a float32 A is rounded first, by a launch): an optimiser step needs
no copy, and a captured graph stays valid.

Bytes beside the base's: A once for each 32 to 128 rows, B once for each 16 to 64, S M R float32 partial sums of h
written, and read by every program that updates; y again where ``add_update`` runs. FLOPs: 2 M (K R + N r). Memory:
the partial sums, S <= 12 or the parts of the base (by a library: h, and W), and with ``add_update`` the base's y or
partial sums.

Precision: A and B are rounded to x's dtype, sums are float32 in a fixed order, h is rounded to x's dtype once; bias
and update are added in float32, to the base's float32 sums or to its rounded y. What follows y starts from the
rounded y, as if it were an operation of its own. A row's result depends on no other row between two meeting points: M
= 16, 32, 64 and 256, and those of the base; by a library as far as that keeps to one algorithm.
"""

import torch
import triton
import triton.language as tl

from . import _runtime
from .code_words import aligned
from .dependent_launch import prefetch
from .hopper_matmul import HopperConfig, hopper_products
from .matmul_4bit import _matmul_triton, packed_config, product_config
from .packed_matmul import FEW_PROGRAMS, Config, Update, packed_products, part_of, weight_operand, x_operand
from .quantization import kernel_format
from .tiled_matmul import TileConfig, tiled_products

MAX_ROWS = 512  # more rows than that are a library's work
OWN_ROWS = 64  # up to so many, the base product is ours
FEW_ROWS = 16  # for so many, operands of the products go straight to registers
# num_warps of ``ranks``, the elements of K that a warp takes in turn, the most parts of K, and the turns that a
# program takes at least where many programs read the sums.
DOWN = (4, 64, 12, 3)
# For more rows: BLOCK_K, num_warps, num_stages, the blocks of K that a program takes at least, and the most parts.
TILED_DOWN = (128, 4, 3, 4, 6)
# Ranks of a program for more than ``OWN_ROWS`` rows, where those beside a product have little room; 16 for fewer.
WIDE_DOWN = 64
WIDE_N = 4096  # from so many outputs on, the second of two configurations of the update
# BLOCK_M, BLOCK_N, num_warps and the most registers of the update by the most rows. So many registers let all
# programs run at once; they suffice for WIDE_RANK ranks. Rows are the dot's left operand, below 64 by mma.sync; from
# 64 on Hopper takes WGMMA, here outside of any loop and awaited at once (why: ``hopper_matmul``).
UP = {
    FEW_ROWS: ((16, 16, 2, None), (16, 16, 2, None)),
    32: ((16, 32, 4, 128), (32, 32, 4, None)),
    OWN_ROWS: ((16, 32, 4, 128), (64, 64, 8, 128)),
    MAX_ROWS: ((32, 64, 8, 128), (64, 64, 8, 128)),
}
WIDE_RANK = 64  # beyond, more than 32 rows take more registers than there are
# From so many values of K on, 8 warps instead of 4 share a row of W in a product that is not split.
LONG_K = 4096


@triton.jit
def _load_chunk(a_rows, x_rows, k, x_k, element, K, CHUNK: tl.constexpr):
    """CHUNK elements of K, 16 at a time; zeros past the end."""
    loaded = ()
    for c in tl.static_range(0, CHUNK, 16):
        # four values a lane: what ``weight_operand`` expects of it
        at = tl.max_contiguous(element + (k + c), (1, 4))
        x_at = tl.max_contiguous(element + (x_k + c), (1, 4))
        weight = tl.load(a_rows + at, mask=at < K, other=0.0)
        value = tl.load(x_rows + x_at, mask=x_at < K, other=0.0)
        loaded = loaded + ((weight, value),)
    return loaded


@triton.jit
def _down_kernel(
    x, a, partial, M, K, R, steps,
    PDL: tl.constexpr, WARPS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """partial (S, M, R) float32: 16 ranks of x (M, K) @ a (R, K)^T, ``steps`` turns of all warps over K a program."""
    index, x_index = tl.arange(0, 16 * WARPS)[:, None], tl.arange(0, 8 * WARPS * COLUMNS)[:, None]
    warp, x_warp, element = index // 8 % WARPS, x_index // 8 % WARPS, tl.arange(0, 16)[None, :]
    split = tl.program_id(2)
    rank0, m0 = tl.program_id(0) * 16, tl.program_id(1) * (8 * COLUMNS)
    rank = tl.minimum(rank0 + index // (8 * WARPS) * 8 + index % 8, R - 1)
    a_rows = a + rank.to(tl.int64) * K
    m = tl.minimum(m0 + x_index // (8 * WARPS) * 8 + x_index % 8, M - 1)
    x_rows = x + m.to(tl.int64) * K
    k, x_k = (split * steps * WARPS + warp) * CHUNK, (split * steps * WARPS + x_warp) * CHUNK
    if PDL:
        for step in range(steps):
            for c in tl.static_range(0, CHUNK, 32):
                prefetch(a_rows + tl.minimum(k + step * (WARPS * CHUNK) + c, K - 1))
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((WARPS, 16, 8 * COLUMNS), tl.float32)
    ahead = _load_chunk(a_rows, x_rows, k, x_k, element, K, CHUNK)
    for _ in range(steps):
        current = ahead
        k += WARPS * CHUNK
        x_k += WARPS * CHUNK
        ahead = _load_chunk(a_rows, x_rows, k, x_k, element, K, CHUNK)
        for c in tl.static_range(CHUNK // 16):
            weight, value = current[c]
            operand = x_operand(value, WARPS, COLUMNS)
            weight = weight_operand(weight.to(value.dtype), WARPS)
            acc = tl.dot(weight, operand, acc, input_precision="ieee")
    rank, column = rank0 + tl.arange(0, 16)[:, None], m0 + tl.arange(0, 8 * COLUMNS)[None, :]
    target = partial + (split.to(tl.int64) * M + column) * R + rank
    tl.store(target, tl.sum(acc, 0), mask=(rank < R) & (column < M))


@triton.jit
def _tiled_down_kernel(
    x, a, partial, M, K, R, steps,
    PDL: tl.constexpr, BESIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same for more rows, ``steps`` blocks of K a program, through shared memory.

    BESIDE: the kernel before has promised that x is complete; its own end is waited for last.
    """
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split, rank = tl.program_id(2), tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if PDL:
        if not BESIDE:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for step in range(split * steps, split * steps + steps):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x_mask = (row < M)[:, None] & (k < K)[None, :]
        tile = tl.load(x + row[:, None] * K + k[None, :], mask=x_mask, other=0.0)
        a_mask = (rank < R)[:, None] & (k < K)[None, :]
        weight = tl.load(a + rank.to(tl.int64)[:, None] * K + k[None, :], mask=a_mask, other=0.0)
        acc = tl.dot(tile, tl.trans(weight.to(tile.dtype)), acc, input_precision="ieee")
    out = partial + (split.to(tl.int64) * M + row[:, None]) * R + rank[None, :]
    tl.store(out, acc, mask=(row < M)[:, None] & (rank < R)[None, :])
    if PDL and BESIDE:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _adapter_rows(b, columns, n0, r, RANK: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of B (BLOCK_N, RANK) for the outputs from n0 on, rounded, and the part of each, -1 where it has none."""
    rank = tl.arange(0, RANK)
    part, row = part_of(n0 + tl.arange(0, BLOCK_N), columns)
    at = b + row.to(tl.int64)[:, None] * r + rank[None, :]
    weight = tl.load(at, mask=(part >= 0)[:, None] & (rank < r)[None, :], other=0.0)
    return weight.to(DTYPE), part


@triton.jit
def _base_of(base, bias, row, n0, M, N, BASE: tl.constexpr, BLOCK_N: tl.constexpr):
    n = n0 + tl.arange(0, BLOCK_N)
    at, mask = base + row[:, None] * N + n[None, :], (row < M)[:, None] & (n < N)[None, :]
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, BASE):
        y += tl.load(at + tl.cast(split, tl.int64) * M * N, mask=mask, other=0.0)
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _with_part(y, h, weight, part, p, n0, start, stop, scaling, BLOCK_N: tl.constexpr):
    """y with part p's share of the outputs from n0 on; h (BLOCK_M, RANK) are its ranks."""
    if (n0 < stop) & (n0 + BLOCK_N > start):
        own = tl.where((part == p)[:, None], weight, 0.0).to(weight.dtype)
        y += scaling * tl.dot(h, tl.trans(own), input_precision="ieee")
    return y


@triton.jit
def _up_kernel(
    base, h, b, bias, residual, out, scaling, columns, M, N, R, r,
    BASE: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of ``out``: base (BASE, M, N) summed, + bias + scaling * h_p @ b_p^T on each part's columns.

    ``columns`` is (start, stop) of each part in turn, h (SPLITS, M, R) partial sums. EARLY: the kernel before has
    promised that b is complete.
    """
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0, rank = tl.program_id(0) * BLOCK_N, tl.arange(0, RANK)
    DTYPE: tl.constexpr = out.dtype.element_ty
    width = N
    if GATED:
        width = N // 2
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
    weight, part = _adapter_rows(b, columns, n0, r, RANK, BLOCK_N, DTYPE)
    up_weight, up_part = weight, part
    if GATED:
        up_weight, up_part = _adapter_rows(b, columns, n0 + width, r, RANK, BLOCK_N, DTYPE)
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y = _base_of(base, bias, row, n0, M, N, BASE, BLOCK_N)
    up = y
    if GATED:
        up = _base_of(base, bias, row, n0 + width, M, N, BASE, BLOCK_N)
    for p in tl.static_range(len(columns) // 2):
        start, stop = columns[2 * p], columns[2 * p + 1]
        h_at = h + row[:, None] * R + (p * r + rank)[None, :]
        h_mask = (row < M)[:, None] & (rank < r)[None, :]
        value = tl.zeros((BLOCK_M, RANK), tl.float32)
        for split in tl.static_range(SPLITS):
            value += tl.load(h_at + tl.cast(split, tl.int64) * M * R, mask=h_mask, other=0.0)
        value = value.to(DTYPE)
        y = _with_part(y, value, weight, part, p, n0, start, stop, scaling, BLOCK_N)
        if GATED:
            up = _with_part(up, value, up_weight, up_part, p, n0 + width, start, stop, scaling, BLOCK_N)
    y = y.to(DTYPE)
    if GATED:
        gate = y.to(tl.float32)
        y = (gate * tl.sigmoid(gate) * up.to(DTYPE).to(tl.float32)).to(DTYPE)
    n = n0 + tl.arange(0, BLOCK_N)
    target, mask = row[:, None] * width + n[None, :], (row < M)[:, None] & (n < width)[None, :]
    if residual is not None:
        y = (y.to(tl.float32) + tl.load(residual + target, mask=mask, other=0.0).to(tl.float32)).to(DTYPE)
    tl.store(out + target, y, mask=mask)


def _shares(x, a, many_readers):
    """Into how many parts K is split, steps of a part, and where M > 16 the blocks of K and of ranks."""
    (M, K), R = x.shape, len(a)
    block_k = block_r = None
    if M <= FEW_ROWS:
        warps, chunk, most, least = DOWN
        turns = triton.cdiv(K, chunk * warps)
        steps = max(triton.cdiv(turns, most), least if many_readers else 1)
    else:
        block_k, _, _, least, most = TILED_DOWN
        block_r = 16
        if M > OWN_ROWS:
            block_r = min(WIDE_DOWN, max(16, triton.next_power_of_2(R)))
            if a.dtype == torch.float32:  # its tiles are to leave room for other programs, too
                block_k //= 2
        turns = triton.cdiv(K, block_k)
        steps = max(triton.cdiv(turns, most), min(least, turns))
    return triton.cdiv(turns, steps), steps, block_k, block_r


def rank_sums(x, a, many_readers=False):
    """Room for what ``ranks`` makes."""
    return torch.empty(_shares(x, a, many_readers)[0], len(x), len(a), dtype=torch.float32, device=x.device)


def ranks(x, a, pdl, many_readers=False, beside=None):
    """Partial sums (S, M, R) float32 of x (M, K) @ a (R, K)^T.

    With ``pdl`` the next launch may read x at once. beside: ``rank_sums`` made before the last launch, which has
    promised that x is complete; these programs, for more than 16 rows, take what multiprocessors that one leaves.
    """
    (M, K), R = x.shape, len(a)
    _, steps, block_k, block_r = _shares(x, a, many_readers)
    partial = rank_sums(x, a, many_readers) if beside is None else beside
    if M <= FEW_ROWS:
        warps, chunk, *_ = DOWN
        columns = triton.cdiv(M, 8)
        _down_kernel[(triton.cdiv(R, 16), 1, len(partial))](
            x, a, partial, M, K, R, steps, PDL=pdl, WARPS=warps, COLUMNS=columns, CHUNK=chunk, num_warps=warps,
            num_stages=1, launch_pdl=pdl,
        )  # fmt: skip
    else:
        _, warps, stages, *_ = TILED_DOWN
        _tiled_down_kernel[(triton.cdiv(R, block_r), triton.cdiv(M, 32), len(partial))](
            x, a, partial, M, K, R, steps, PDL=pdl, BESIDE=beside is not None, BLOCK_M=32, BLOCK_K=block_k,
            BLOCK_R=block_r, num_warps=warps, num_stages=stages, launch_pdl=pdl,
        )  # fmt: skip
    return partial


def add_update(base, bias, update, dtype, pdl, early=False):
    """What ``update`` makes of the base's y (M, N), or of its partial sums (S, M, N), and a bias. early: when the
    launch before lets this one start, all that came before the base and its ranks is complete, b among it."""
    (splits, M, R), r, N = update.h.shape, update.b.shape[1], base.shape[-1]
    width = N // 2 if update.gated else N
    out = torch.empty(M, width, dtype=dtype, device=base.device)
    block_m, block_n, warps, registers = UP[next(rows for rows in UP if rows >= M)][width >= WIDE_N]
    if r > WIDE_RANK:
        block_m, registers = min(block_m, 32), None
    _up_kernel[(triton.cdiv(width, block_n), triton.cdiv(M, block_m))](
        base, update.h, update.b, bias, update.residual, out, update.scaling, update.columns, M, N, R, r,
        BASE=base.shape[0] if base.ndim == 3 else 1, SPLITS=splits, RANK=max(16, triton.next_power_of_2(r)),
        BLOCK_M=block_m, BLOCK_N=block_n, GATED=update.gated, PDL=pdl, EARLY=early, num_warps=warps, launch_pdl=pdl,
        maxnreg=registers,
    )  # fmt: skip
    return out


def few_rows(
    x, weight, lora_a, lora_b, columns, scaling, bias, quant_block, first_block, gated=False, residual=None
):
    """``lora_linear`` on 1 to ``MAX_ROWS`` rows; then, on request, what follows it in a decoder layer.

    x (M, K); weight [W] or [codes, *scales]; lora_a (P r, K) and lora_b (rows, r): the parts' own in turn; columns:
    start and stop of each part in y; all contiguous. gated: silu(y[:, : N / 2]) * y[:, N / 2 :] instead of y.
    residual (M, N): residual + y.
    """
    arch, x, words = _runtime.arch(x.device), aligned(x), weight[0]
    format, config = None, None
    if quant_block and words.dtype == torch.int32 and x.dtype != torch.float32:
        format = kernel_format(weight[1:])
        if len(x) <= FEW_ROWS:
            config = packed_config(arch, len(x), format)  # adds the update in the same launch
        else:
            config = product_config(arch, len(x), words, format)
    own = len(x) <= OWN_ROWS or config is not None
    pdl = own and arch >= 90  # between a library's kernels it gains nothing
    assembly = not _runtime.INTERPRET
    operands = x, words, weight[1:], bias, first_block, format
    of_update = lora_b, scaling, tuple(columns), gated, residual
    with _runtime.launch_on(x):
        if isinstance(config, TileConfig):
            base, h = tiled_products(*operands, config, assembly, a=lora_a)
        elif isinstance(config, HopperConfig):
            h = rank_sums(x, lora_a)  # ahead: what is freed while the product runs must not become theirs
            base = hopper_products(*operands, config)
            ranks(x, lora_a, pdl, beside=h)
        else:
            if own:
                h = ranks(x, lora_a, pdl, len(words) >= 2 * WIDE_N)
            else:
                h = torch.mm(x, lora_a.to(x.dtype).t())[None]
            if isinstance(config, Config) and not config.over_n:
                warps = 8 if x.shape[1] >= LONG_K and len(words) <= 16 * FEW_PROGRAMS else 4
                whole = Config(False, warps, 1, config.columns, 1, pdl)
                return packed_products(*operands, whole, assembly, update=Update(h, *of_update), late=pdl)
            if isinstance(config, Config):
                base = packed_products(*operands, config, assembly)
            elif quant_block:
                base = _matmul_triton(x, words, weight[1:], bias, quant_block, first_block)
            else:
                base = torch.nn.functional.linear(x, words, bias)
        # Hopper's products, and ranks beside them, let the update start behind the products' wait.
        early = pdl and isinstance(config, (TileConfig, HopperConfig))
        bias = bias if base.ndim == 3 else None
        return add_update(base, bias, Update(h, *of_update), x.dtype, pdl, early)
