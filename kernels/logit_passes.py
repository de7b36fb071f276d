"""The launches behind ``linear_logprob`` on CUDA: which tiles of logits are made when, in how much memory.

Rows are taken in chunks of R and the vocabulary in chunks of C. Where the gradient to hidden is left by the forward
pass, a chunk is two matmuls: one makes logits, statistics and 2^(x - reference) in half precision, (R, C); the other
adds its product with the weight to (R, D) in float32. The reference is one number a row, so nothing is ever rescaled.
"""

import functools

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _runtime, output_head
from .logit_tiles import (
    _coefficients_kernel,
    _direction_kernel,
    _merge_kernel,
    _pack_kernel,
    _reference_kernel,
    _repair_kernel,
    _scale_rows_kernel,
    _stats_kernel,
)

LOG2E = 1.4426950408889634
WORKSPACE = 96 * 2**20  # bytes of temporary memory of a forward pass unless the caller bounds it
ROW_UNIT, COL_UNIT = 128, 256  # chunks are multiples of these, and these of every tile
SAMPLE = 64

# float32 tiles are small because their products run on the CUDA cores; 99 KB of shared memory bounds sm_86/89/120.
# programs: how many a multiprocessor is given; each takes tiles until none is left.
FLOAT32_CONFIG = {
    "BLOCK_M": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2,
    "TMA": False, "FLATTEN": False, "programs": 2,
}  # fmt: skip
LARGE_CONFIG = FLOAT32_CONFIG | {
    "BLOCK_M": 128, "BLOCK_V": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3, "programs": 1
}  # fmt: skip
SMALL_CONFIG = LARGE_CONFIG | {"BLOCK_V": 128}
TMA_CONFIG = LARGE_CONFIG | {"TMA": True, "FLATTEN": True}
HALF_CONFIG = {
    80: LARGE_CONFIG, 86: SMALL_CONFIG, 89: SMALL_CONFIG, 90: TMA_CONFIG, 100: LARGE_CONFIG, 120: SMALL_CONFIG
}  # fmt: skip


def _config(hidden, weight=None):
    """The tiles for this dtype and card; never for N. ``weight`` where its strides may rule out descriptors."""
    _runtime.check(hidden.dtype != torch.float64, "hidden is float64, which only the CPU path takes")
    if hidden.dtype == torch.float32:
        return FLOAT32_CONFIG
    arch = _runtime.arch(hidden.device)
    _runtime.check(arch >= 80, f"compute capability is {arch}, expected at least 80")
    config = HALF_CONFIG[max(known for known in HALF_CONFIG if known <= arch)]
    if config["TMA"] and not all(tensor is None or _describable(tensor) for tensor in (hidden, weight)):
        return config | {"TMA": False, "FLATTEN": False}
    return config


def _describable(tensor):
    """Whether a tensor descriptor can hold this matrix: rows contiguous and 16-byte aligned."""
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.itemsize % 16 == 0
    return aligned and tensor.stride(1) == 1


def _contiguous(hidden):
    """hidden with contiguous rows from a 16-byte boundary, so that its route never depends on where a view starts."""
    hidden = hidden.contiguous()
    return hidden.clone() if hidden.data_ptr() % 16 else hidden


def _operand(tensor, config, *block):
    return TensorDescriptor.from_tensor(tensor, [config[name] for name in block]) if config["TMA"] else tensor


def _tiling(config):
    return {key: value for key, value in config.items() if key not in ("FLATTEN", "programs")}


def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def blocks(size, step):
    """Slices of ``step`` that cover ``size``, the last one shorter."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def allocate(hidden, entropy, gradient):
    """What a forward pass returns: logprobs (N,), entropies (N,), stats (2, N), d logprob / d hidden (N, D) and its
    scales (N,); those not asked for are empty.

    The direction of bfloat16 hidden is kept on CUDA as float16 and a power of two a row: it loses 2^-12 of a value
    where the gradient's own rounding takes 2^-9, in half the memory of float32.
    """
    (N, D), wide = hidden.shape, torch.float64 if hidden.dtype == torch.float64 else torch.float32
    packed = gradient and hidden.dtype == torch.bfloat16 and hidden.device.type == "cuda"
    return (
        hidden.new_empty(N, dtype=wide),
        hidden.new_empty(N if entropy else 0, dtype=wide),
        hidden.new_empty((2, N), dtype=wide),
        hidden.new_empty((N if gradient else 0, D), dtype=torch.float16 if packed else wide),
        hidden.new_empty(N if packed else 0, dtype=wide),
    )


def forward_bytes(R, C, V, D, itemsize, *, entropy, gradient, packed, copied, block_v=COL_UNIT):
    """Bytes alive in a forward pass over chunks of R rows and C words, besides what it returns (see the formula)."""
    statistics = (3 if entropy else 2) * 4 * R * triton.cdiv(V, block_v) + 24 * R
    copy = C * D * itemsize if copied else 0  # of a weight that is 4-bit or of another dtype
    if not gradient:
        return statistics + copy
    # The target's weights of each row: gathered, then converted.
    targets = 3 * R * D * itemsize if copied else 0
    return statistics + copy + targets + R * C * itemsize + (4 * R * D if packed else 0)


@functools.lru_cache(maxsize=256)
def plan(N, V, D, itemsize, budget, processors, *, entropy, gradient, packed, copied, block_v):
    """(R, C) within ``budget`` bytes that take the least time by a count of waves; at least one pair must fit.

    The unit of time is one word or one hidden dimension of a 128 x 256 tile. A wave of logits takes D + 256 of them,
    one of the second matmul C + 1024 (its float32 output is read and written), a launch 600.
    """
    size = functools.partial(
        forward_bytes, V=V, D=D, itemsize=itemsize, entropy=entropy, gradient=gradient, packed=packed,
        copied=copied, block_v=block_v,
    )  # fmt: skip
    breadth = triton.cdiv(D, 256)

    def time(height, C):
        wave = triton.cdiv(height * triton.cdiv(C, COL_UNIT), processors) * (D + 256) + 600
        # The library cuts this product to fit the card, so that its waves are never far from full.
        wave += max(1, height * breadth / processors) * (C + 1024) if gradient else 0
        return (wave + (C * D // 2**14 if copied else 0)) * triton.cdiv(V, C)

    total = triton.cdiv(N, ROW_UNIT)
    # Equal parts, and heights at which the second matmul fills whole waves.
    heights = {triton.cdiv(total, parts) for power in range(12) for parts in (2**power, 3 * 2**power)}
    heights |= {min(total, max(1, waves * processors // breadth)) for waves in range(1, 5)}
    best = None
    for height in sorted(heights | {1}):
        fixed = size(height * ROW_UNIT, 0)
        widest = (
            min((budget - fixed) // max(1, size(height * ROW_UNIT, 1) - fixed), V + COL_UNIT - 1) // COL_UNIT
        )
        if widest < 1:
            continue
        # Also the widest chunk whose tiles fill whole waves.
        for width in (widest, max(1, height * widest // processors * processors // height)):
            C, (full, rest) = width * COL_UNIT, divmod(total, height)
            cost = full * time(height, C) + (time(rest, C) if rest else 0)
            if best is None or cost < best[0]:
                best = cost, height * ROW_UNIT, min(C, V)
    return best[1:]


def _chunks(hidden, V, config, workspace, *, gradient, packed, copied, **how):
    """(R, C) under the caller's bound (None: the default), which covers what is kept for the backward pass too."""
    (N, D), itemsize = hidden.shape, hidden.itemsize
    how |= {"gradient": gradient, "packed": packed, "copied": copied, "block_v": config["BLOCK_V"]}
    smallest = forward_bytes(ROW_UNIT, COL_UNIT, V, D, itemsize, **how)
    saved = 16 * N + (N * D * (2 if packed else 4) if gradient else 0)
    if workspace is None:
        budget = max(WORKSPACE if gradient or copied else WORKSPACE // 4, smallest)
    else:
        _runtime.check(
            workspace >= saved + smallest,
            f"workspace_bytes is {workspace}, expected at least {saved + smallest} for hidden {(N, D)} and {V} words",
        )
        budget = workspace - saved
    N = triton.cdiv(N, ROW_UNIT) * ROW_UNIT
    return plan(N, V, D, itemsize, budget, _processors(hidden.device), **how)


def forward(
    hidden: torch.Tensor, weight: torch.Tensor, scales: list[torch.Tensor], quant_block: int, first_block: int,
    bias: torch.Tensor | None, target_ids: torch.Tensor, temperature: float, softcap: float | None, entropy: bool,
    gradient: bool, workspace: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """``allocate``'s tensors, filled; stats are m and log2 s."""
    head = output_head.from_operands(weight, scales, quant_block, first_block)
    hidden, target_ids = _contiguous(hidden), target_ids.contiguous()
    bias = None if bias is None else bias.contiguous()
    (N, D), V, dtype = hidden.shape, head.shape[0], hidden.dtype
    copied = bool(scales) or weight.dtype != dtype
    config = _config(hidden, None if copied else weight)
    outputs = logprobs, entropies, stats, direction, direction_scale = allocate(hidden, entropy, gradient)
    if N == 0:
        return outputs
    packed = direction.dtype == torch.float16
    how = {"entropy": entropy, "gradient": gradient, "packed": packed, "copied": copied}
    R, C = _chunks(hidden, V, config, workspace, **how)
    partial = stats.new_empty((3 if entropy else 2, triton.cdiv(V, config["BLOCK_V"]), R))
    scale, cap = LOG2E / temperature, softcap or 0.0
    flags = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": softcap is not None}
    if gradient:
        weights = hidden.new_empty((min(N, R), triton.cdiv(C, COL_UNIT) * COL_UNIT))
        total = stats.new_empty((min(N, R), D)) if packed else None
        sample = weight  # read in place, or where the head must be converted, its SAMPLE rows
        if copied:
            words = torch.arange(SAMPLE, device=hidden.device) * V // SAMPLE
            sample = output_head.gather(head, words, dtype)

    tiling = _tiling(config) | {"FLATTEN": config["FLATTEN"], "EVEN_D": D % config["BLOCK_D"] == 0}
    row_stride = weights.stride(0) if gradient else 0
    if not copied:
        w, w_tiles = weight, _operand(weight, config, "BLOCK_V", "BLOCK_D")

    with _runtime.launch_on(hidden), torch.autocast(hidden.device.type, enabled=False):
        for rows in blocks(N, R):
            h, targets = hidden[rows], target_ids[rows]
            n, x_target = len(h), stats.new_full((len(h),), float("nan"))
            reference, out, out_tiles = None, None, None
            h_tiles = _operand(h, config, "BLOCK_M", "BLOCK_D")
            if gradient:
                sums = total[:n] if packed else direction[rows]
                out, reference = weights[:n], torch.empty_like(x_target)
                # Past the end of a chunk come zeros or values that no product reads, as far as a tile goes.
                out_tiles = _operand(out, config, "BLOCK_M", "BLOCK_V")
                target_weight = weight
                if copied:
                    target_weight = output_head.gather(head, targets.clamp(0, V - 1), dtype)
                where = {"GATHERED": copied, **flags}
                _reference_kernel[(triton.cdiv(n, 16),)](
                    h, target_weight, targets, sample, bias, reference, n, D, V, *target_weight.stride(),
                    *sample.stride(), scale, cap, **where, BLOCK_M=16, SAMPLE=SAMPLE, BLOCK_D=128, num_warps=4,
                )  # fmt: skip
            for cols in blocks(V, C):
                first_word, width = cols.start, cols.stop - cols.start
                b = None if bias is None else bias[cols]
                if copied:
                    w, first_word = output_head.rows(head, cols, dtype).to(dtype), 0
                    w_tiles = _operand(w, config, "BLOCK_V", "BLOCK_D")
                _stats_kernel[(_programs(config, n, width, hidden.device),)](
                    h_tiles, w_tiles, b, targets, reference, partial, x_target, out_tiles,
                    n, width, D, cols.start, first_word, *w.stride(), partial.stride(1), partial.stride(0),
                    row_stride, scale, cap, ENTROPY=entropy, WEIGHTS=gradient, **flags, **tiling,
                    enable_fp_fusion=False,  # whatever else a pass makes must not change how statistics are rounded
                )  # fmt: skip
                if gradient:
                    addmm_(sums, out[:, :width], w if copied else weight[cols], beta=int(cols.start > 0))
                if copied:
                    del w, w_tiles  # before the next copy is made
            _merge_kernel[(triton.cdiv(n, 16),)](
                partial, x_target, logprobs, entropies, stats, n, partial.shape[1], rows.start, partial.stride(1),
                partial.stride(0), stats.stride(0), ENTROPY=entropy, BLOCK_N=16, BLOCK_T=256, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
            if not gradient:
                continue
            m, log_s = stats[:, rows]
            _direction_kernel[(n,)](
                sums, target_weight, targets, x_target, reference, logprobs[rows], m, log_s, D, V,
                *target_weight.stride(), scale, cap, GATHERED=copied, HAS_SOFTCAP=softcap is not None, BLOCK_D=1024,
                num_warps=4,
            )  # fmt: skip
            block_d = triton.next_power_of_2(D)
            for cols in blocks(V, C if copied else V):
                part, b = output_head.rows(head, cols, dtype).to(dtype), None if bias is None else bias[cols]
                _repair_kernel[(n,)](
                    sums, h, part, b, targets, reference, partial, m, log_s, len(part), D, cols.start, part.stride(0),
                    part.stride(1), partial.stride(1), partial.stride(0), scale, cap, **flags,
                    BLOCK_V=config["BLOCK_V"], BLOCK_D=block_d, num_warps=8 if block_d > 2048 else 4,
                )  # fmt: skip
                del part
            del target_weight
            if packed:
                out = direction[rows], direction_scale[rows]
                _pack_kernel[(n,)](sums, *out, D, BLOCK_D=block_d, num_warps=4)
    return outputs


def _programs(config, N, V, device):
    """How many programs share the tiles of N rows and V words."""
    tiles = triton.cdiv(N, config["BLOCK_M"]) * triton.cdiv(V, config["BLOCK_V"])
    return min(tiles, _processors(device) * config["programs"])


def coefficients(hidden, weight, bias, target_ids, first_col, stats, upstream, temperature, softcap):
    """dz * temperature (N, V) of these rows and words, in hidden's dtype."""
    weight = weight.to(hidden.dtype)
    config, (N, D), V = _config(hidden, weight), hidden.shape, weight.shape[0]
    out = hidden.new_empty((N, V))
    with _runtime.launch_on(hidden):
        _coefficients_kernel[(triton.cdiv(N, config["BLOCK_M"]), triton.cdiv(V, config["BLOCK_V"]))](
            _operand(hidden, config, "BLOCK_M", "BLOCK_D"), _operand(weight, config, "BLOCK_V", "BLOCK_D"), bias,
            target_ids, stats, upstream, out, N, V, D, first_col, weight.stride(0), weight.stride(1),
            stats.stride(0), upstream.stride(0), LOG2E / temperature, softcap or 0.0,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, ENTROPY=len(upstream) == 2,
            EVEN_D=D % config["BLOCK_D"] == 0, **_tiling(config), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def scale_rows(
    direction: torch.Tensor, scale: torch.Tensor, upstream: torch.Tensor, rows: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """upstream * scale * direction, rounded to ``dtype`` once; row i stands at ``rows``[i] among zeros."""
    (n, D), make = direction.shape, torch.empty if rows is None else torch.zeros
    out = make((len(upstream), D), dtype=dtype, device=direction.device)
    if n:
        with _runtime.launch_on(direction):
            _scale_rows_kernel[(n,)](
                direction, scale if len(scale) else None, upstream, rows, out, D, upstream.stride(0),
                BLOCK_D=min(1024, triton.next_power_of_2(D)), num_warps=4,
            )  # fmt: skip
    return out


def addmm_(total, a, b, beta=1):
    """total = beta * total + a @ b, accumulated in the dtype of total; what beta = 0 drops may be anything.

    To be called with autocast off.
    """
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b.to(a.dtype), beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)
