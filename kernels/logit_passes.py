"""The launches behind ``linear_logprob`` on CUDA: which tiles of logits are made when, in how much memory.

Rows are taken in chunks of R and the vocabulary in chunks of C. Where the gradient to hidden is left by the forward
pass, a chunk is two matmuls: one makes logits, statistics and 2^(x - reference) in half precision, (R, C); the other
adds its product with the weight to (R, D) in float32. The reference is one number a row, so nothing is ever rescaled.
"""

import functools
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _runtime, output_head
from .kept_rows import KeptRows
from .logit_plan import COL_UNIT, ROW_UNIT, forward_bytes, plan, width_of
from .logit_tiles import (
    _coefficients_kernel,
    _direction_kernel,
    _merge_kernel,
    _reference_kernel,
    _scale_rows_kernel,
    _stats_kernel,
)

LOG2E = 1.4426950408889634
# Bytes of temporary memory of a forward pass unless the caller bounds it; also with what it leaves for backward.
WORKSPACE, WITH_SAVED = 96 * 2**20, 152 * 2**20
SAMPLE = 64

# float32 tiles are small because their products run on the CUDA cores; 99 KB of shared memory bounds sm_86/89/120.
# programs: how many a multiprocessor is given; each takes tiles until none is left.
FLOAT32_CONFIG = {
    "BLOCK_M": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2,
    "TMA": False, "programs": 2,
}  # fmt: skip
LARGE_CONFIG = FLOAT32_CONFIG | {
    "BLOCK_M": 128, "BLOCK_V": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3, "programs": 1
}  # fmt: skip
SMALL_CONFIG = LARGE_CONFIG | {"BLOCK_V": 128}
TMA_CONFIG = LARGE_CONFIG | {"TMA": True}
# Where no factor of the second matmul waits in shared memory, that holds a stage more; it changes no sum.
VALUE_STAGES = 4
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
        return config | {"TMA": False}
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
    return {key: value for key, value in config.items() if key != "programs"}


def blocks(size, step, start=0):
    """Slices of ``step`` from ``start`` on that cover ``size``, the last one shorter."""
    return [slice(first, min(first + step, size)) for first in range(start, size, step)]


def _packs(hidden, gradient):
    return gradient and hidden.dtype == torch.bfloat16 and hidden.device.type == "cuda"


def allocate(hidden, N, entropy, gradient):
    """What a forward pass over N rows returns: logprobs (N,), entropies (N,), stats (2, N), d logprob / d hidden
    (N, D) and its scales (N,); those not asked for are empty.

    The direction of bfloat16 hidden is kept on CUDA as float16 and a power of two a row: it loses 2^-12 of a value
    where the gradient's own rounding takes 2^-9, in half the memory of float32.
    """
    D, wide = hidden.shape[1], torch.float64 if hidden.dtype == torch.float64 else torch.float32
    packed = _packs(hidden, gradient)
    return (
        hidden.new_empty(N, dtype=wide),
        hidden.new_empty(N if entropy else 0, dtype=wide),
        hidden.new_empty((2, N), dtype=wide),
        hidden.new_empty((N if gradient else 0, D), dtype=torch.float16 if packed else wide),
        hidden.new_empty(N if packed else 0, dtype=wide),
    )


def _chunks(hidden, V, config, workspace, *, gradient, packed, copied, **how):
    """(R, C) under the caller's bound (None: the default), which covers what is kept for the backward pass too."""
    (N, D), itemsize = hidden.shape, hidden.itemsize
    how |= {"gradient": gradient, "packed": packed, "copied": copied, "block_v": config["BLOCK_V"]}
    smallest = forward_bytes(ROW_UNIT, COL_UNIT, V, D, itemsize, **how)
    saved = 16 * N + (N * D * (2 if packed else 4) if gradient else 0)
    if workspace is None:
        usual = max(WORKSPACE, WITH_SAVED - saved) if gradient else WORKSPACE if copied else WORKSPACE // 4
        budget = max(usual, smallest)
    else:
        _runtime.check(
            workspace >= saved + smallest,
            f"workspace_bytes is {workspace}, expected at least {saved + smallest} for hidden {(N, D)} and {V} words",
        )
        budget = workspace - saved
    N = triton.cdiv(N, ROW_UNIT) * ROW_UNIT
    return plan(N, V, D, itemsize, budget, _runtime.processors(hidden.device), **how)


def forward(
    hidden: torch.Tensor, weight: torch.Tensor, scales: list[torch.Tensor], quant_block: int, first_block: int,
    bias: torch.Tensor | None, target_ids: torch.Tensor, temperature: float, softcap: float | None, entropy: bool,
    gradient: bool, workspace: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """``allocate``'s tensors, filled; stats are m and log2 s."""
    head = output_head.from_operands(weight, scales, quant_block, first_block)
    how = temperature, softcap, entropy, gradient, workspace
    return _forward(hidden, weight, head, bias, target_ids, *how)[0]


def forward_kept(
    hidden, weight, scales, quant_block, first_block, bias, target_ids, mask, temperature, softcap, entropy, gradient,
    workspace,
):  # fmt: skip
    """``forward`` of the rows where mask (N,) is True, and their indices (N',); logprobs and entropies (N,) of all, 0
    elsewhere.

    The device has the first chunk to do while the host learns N'; only then are the results allocated.
    """
    head = output_head.from_operands(weight, scales, quant_block, first_block)
    how = temperature, softcap, entropy, gradient, workspace
    return _forward(hidden, weight, head, bias, target_ids, *how, mask)


class _Begun(NamedTuple):
    """A chunk of rows whose first words are done."""

    hidden: torch.Tensor
    tiles: object  # hidden as the kernels take it
    target_ids: torch.Tensor
    x_target: torch.Tensor
    reference: torch.Tensor | None
    target_weight: torch.Tensor | None
    kept: torch.Tensor | None  # how many rows there are, where the host did not know

    def first(self, n):
        """Only ``n`` rows of it, now that the host knows; kernels still read their number."""
        return self._replace(hidden=self.hidden[:n])


def _forward(
    hidden, weight, head, bias, target_ids, temperature, softcap, entropy, gradient, workspace, mask=None
):
    hidden, target_ids = _contiguous(hidden), target_ids.contiguous()
    bias = None if bias is None else bias.contiguous()
    (N, D), V, dtype = hidden.shape, head.shape[0], hidden.dtype
    copied = head is not weight or weight.dtype != dtype
    config = _config(hidden, None if copied else weight)
    packed = _packs(hidden, gradient)
    if N == 0:
        return allocate(hidden, N, entropy, gradient), target_ids
    how = {"entropy": entropy, "gradient": gradient, "packed": packed, "copied": copied}
    R, C = _chunks(hidden, V, config, workspace, **how)
    height, processors = min(N, R), _runtime.processors(hidden.device)
    new = functools.partial(hidden.new_empty, dtype=torch.float32)
    partial = new((3 if entropy else 2, triton.cdiv(V, config["BLOCK_V"]), R))
    scale, cap = LOG2E / temperature, softcap or 0.0
    flags = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": softcap is not None}
    if gradient:
        weights = hidden.new_empty(height * triton.cdiv(C, COL_UNIT) * COL_UNIT)
        total = new((height, D)) if packed else None
        sample = weight  # read in place, or where the head must be converted, its SAMPLE rows
        if copied:
            words = torch.arange(SAMPLE, device=hidden.device) * V // SAMPLE
            sample = output_head.gather(head, words, dtype)

    tiling = _tiling(config) | {"EVEN_D": D % config["BLOCK_D"] == 0}
    if config["TMA"] and not gradient:
        tiling["num_stages"] = VALUE_STAGES
    if not copied:
        w_tiles = _operand(weight, config, "BLOCK_V", "BLOCK_D")

    def begin(h, targets, kept=None):
        """The reference of these rows, of which ``kept`` holds the number where the host does not know it yet."""
        n, x_target = len(h), new(len(h))
        h_tiles, reference, target_weight = _operand(h, config, "BLOCK_M", "BLOCK_D"), None, None
        if gradient:
            reference, target_weight = torch.empty_like(x_target), weight
            if copied:
                target_weight = output_head.gather(head, targets.clamp(0, V - 1), dtype)
            _reference_kernel[(triton.cdiv(n, 16),)](
                h, target_weight, targets, sample, bias, reference, kept, n, D, V, *target_weight.stride(),
                *sample.stride(), scale, cap, GATHERED=copied, **flags, BLOCK_M=16, SAMPLE=SAMPLE, BLOCK_D=128,
                STAGES=2 if hidden.itemsize == 4 else 3, num_warps=4,
            )  # fmt: skip
        return _Begun(h, h_tiles, targets, x_target, reference, target_weight, kept)

    # Views take the host as long as launches do: each is made once.
    @functools.cache
    def factor_of(n, width):
        """Room for the second matmul's left factor (n, width): itself, as the kernels take it, and its row stride."""
        stride = triton.cdiv(width, COL_UNIT) * COL_UNIT
        out = weights[: n * stride].view(n, stride)
        # Past the end of a chunk come zeros or values that no product reads, as far as a tile goes.
        return out[:, :width], _operand(out, config, "BLOCK_M", "BLOCK_V"), stride

    @functools.cache
    def words_of(start, stop):
        return weight[start:stop]

    def statistics(chunk, cols):
        """Logits of ``cols``; what the second matmul takes of them: 2^(x - reference) and the words' weights."""
        n, first_word, width = len(chunk.hidden), cols.start, cols.stop - cols.start
        w, tiles, b = weight, None if copied else w_tiles, None if bias is None else bias[cols]
        if copied:
            w, first_word = output_head.rows(head, cols, dtype).to(dtype), 0
            tiles = _operand(w, config, "BLOCK_V", "BLOCK_D")
        out, out_tiles, stride_out = factor_of(n, width) if gradient else (None, None, 0)
        _stats_kernel[(_programs(config, n, width, processors),)](
            chunk.tiles, tiles, b, chunk.target_ids, chunk.reference, partial, chunk.x_target, out_tiles, chunk.kept,
            n, width, D, cols.start, first_word, *w.stride(), partial.stride(1), partial.stride(0),
            stride_out, scale, cap, ENTROPY=entropy, WEIGHTS=gradient, **flags, **tiling,
            enable_fp_fusion=False,  # whatever else a pass makes must not change how statistics are rounded
        )  # fmt: skip
        return (out, w if copied else words_of(cols.start, cols.stop)) if gradient else None

    def finish(chunk, rows, sums):
        """Sums over all words to d logprob / d hidden, packed or in place."""
        n, targets, target_weight = len(sums), chunk.target_ids, chunk.target_weight
        out = (direction[rows], direction_scale[rows]) if packed else (None, None)
        block_d = triton.next_power_of_2(D)
        places = (None, logprobs[rows]) if kept is None else (kept.rows[rows], logprobs)
        parts = columns if copied else [slice(0, V)]
        for cols in parts:
            w, b = output_head.rows(head, cols, dtype).to(dtype), None if bias is None else bias[cols]
            _direction_kernel[(n,)](
                sums, *(out if cols is parts[-1] else (None, None)), chunk.hidden, w, b, target_weight, targets,
                chunk.x_target, chunk.reference, partial, *places, *stats[:, rows], D, V, len(w), cols.start,
                *target_weight.stride(), *w.stride(), partial.stride(1), partial.stride(0), scale, cap,
                GATHERED=copied, **flags, FIRST=cols is parts[0], BLOCK_V=config["BLOCK_V"], BLOCK_D=block_d,
                num_warps=8 if block_d > 2048 else 4,
            )  # fmt: skip
            del w

    with _runtime.launch_on(hidden), torch.autocast(hidden.device.type, enabled=False):
        columns, kept, begun, ahead = blocks(V, C), None, None, None
        if mask is not None:
            kept = KeptRows(mask, R, ROW_UNIT)
            begun = begin(*kept.gather(hidden, target_ids, slice(0, height), known=False), kept.counts)
            ahead = (statistics(begun, columns[0]),)
            scattered = [hidden.new_zeros(N, dtype=torch.float32) for _ in range(2 if entropy else 1)]
            N, R = kept.wait()
            left = triton.cdiv(V - columns[0].stop, COL_UNIT)
            if gradient and N and left:  # fewer rows at a time leave space for more words
                widest = min(left, weights.numel() // min(N, R) // COL_UNIT)
                facts = {"D": D, "processors": processors, "gradient": True, "copied": copied}
                width = width_of(triton.cdiv(min(N, R), ROW_UNIT), widest, left, **facts) * COL_UNIT
                columns = columns[:1] + blocks(V, width, C)
        logprobs, entropies, stats, direction, direction_scale = allocate(hidden, N, entropy, gradient)
        if kept is not None:
            logprobs, entropies = scattered if entropy else (*scattered, entropies)
        for rows in blocks(N, R):
            if kept is None:
                begun = begin(hidden[rows], target_ids[rows])
            elif begun is None:
                begun = begin(*kept.gather(hidden, target_ids, rows))
            n = rows.stop - rows.start
            chunk, begun = begun.first(n), None
            if gradient:
                sums = total[:n] if packed else direction[rows]
            for cols in columns:
                (factors,) = (statistics(chunk, cols),) if ahead is None else ahead
                ahead = None
                if gradient:
                    weights_of_rows = factors[0] if len(factors[0]) == n else factors[0][:n]
                    addmm_(sums, weights_of_rows, factors[1], beta=int(cols.start > 0))
                del factors  # before the next copy of words is made
            _merge_kernel[(triton.cdiv(n, 8),)](
                partial, chunk.x_target, chunk.target_ids, None if kept is None else kept.rows, logprobs, entropies,
                stats, n, V, partial.shape[1], rows.start, partial.stride(1), partial.stride(0), stats.stride(0),
                ENTROPY=entropy, BLOCK_N=8, BLOCK_T=1024, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
            if gradient:
                finish(chunk, rows, sums)
            del chunk  # before the next one is gathered
    outputs = logprobs, entropies, stats, direction, direction_scale
    return outputs, None if kept is None else kept.rows[:N]


def _programs(config, N, V, processors):
    """How many programs share the tiles of N rows and V words."""
    tiles = triton.cdiv(N, config["BLOCK_M"]) * triton.cdiv(V, config["BLOCK_V"])
    return min(tiles, processors * config["programs"])


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
