"""4-bit weights, NormalFloat (``nf4``) and affine integers (``int4``): to codes and back, bit for bit.

    nf4    w = code_book[code] * absmax     codes, scales and values of bitsandbytes 0.50
    int4   w = scale * code + minimum       codes, scales and values of GGUF's Q4_1

(Double quantisation follows bitsandbytes on the CPU; its CUDA code picks the neighbouring 8-bit scale in rare ties.)
``dequantize_4bit`` reads N*K/2 bytes of codes and the scales, writes N*K values, and takes no other memory on CUDA
(on the CPU: a few tiles of ``CPU_TILE`` values and, for double quant, the N*K/quant_block scales in float32).
Values are computed in float32, each operation rounded once, then rounded to the output dtype. No gradients: the
weights are frozen.

Papers: QLoRA, Dettmers et al. 2023, arXiv 2305.14314; 8-bit block-wise maps, Dettmers et al. 2022, arXiv 2110.02861.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import _runtime
from .code_words import WORDS, aligned, block_scale, code_table, decode_words, packed_tile, weight_tile
from .dispatch import route
from .packed_codes import NF4_CODE, unpack
from .quantized_weight import DTYPES, INT4_BLOCK, NESTED_BLOCK, QuantizedWeight, check_layout, decode_absmax

BLOCK_R = 32  # rows of 256 values a program of the CUDA kernel, on every card: it only streams
WHOLE = 2**24  # values of a weight that are dense at once, however wide it is
CPU_TILE = 1 << 18  # float32 values: 1 MB, about one core's L2 cache


def quantize_4bit(weight, format="nf4", block_size=64, double_quant=False, *, name="weight"):
    """Quantise ``weight`` (N, K), float32, float16 or bfloat16, on its own device.

    Args:
        format: "nf4", equal to bitsandbytes bit for bit, or "int4", equal to GGUF's Q4_1.
        block_size: nf4: weights that share one absmax, a power of two from 32 to 4096. int4's block is 32, which
            both 32 and the default ask for.
        double_quant: nf4 only: the absmax, less their mean, in 8 bits in blocks of 256.
        name: what errors call the weight: a checkpoint's tensor name.

    Raises:
        ValueError: unless K is a multiple of the block (nothing is padded) and every value is finite (int4: within
            float16's range).
    """
    _runtime.check(weight.dtype in DTYPES, f"{name} is {weight.dtype}, expected one of {DTYPES}")
    if format == "int4":
        _runtime.check(not double_quant, "double_quant is for nf4: int4's scales are float16 already")
        block_size = INT4_BLOCK if block_size == 64 else block_size
    check_layout(tuple(weight.shape), format, block_size, name)
    weight = weight.detach().contiguous()
    quantize = _quantize_nf4 if format == "nf4" else _quantize_int4
    step = max(1, 16 * CPU_TILE // weight.shape[1])
    parts = [quantize(part, block_size, name) for part in weight.split(step)]
    merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if format == "nf4":
        merged["code_book"] = torch.tensor(NF4_CODE, device=weight.device)
        if double_quant:
            merged |= _quantize_absmax(merged["scale"])
    described = {"shape": weight.shape, "format": format, "quant_block": block_size, "dtype": weight.dtype}
    return QuantizedWeight(**merged, **described)


def _quantize_nf4(weight, block, name):
    N, K = weight.shape
    values = weight.float().reshape(N, K // block, block)
    absmax = values.abs().amax(-1)
    _runtime.check(bool(absmax.isfinite().all()), f"{name} has infinite or NaN values, expected finite ones")
    code = torch.tensor(NF4_CODE, device=weight.device)
    scaled = (values * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(-1)).clamp(-1, 1)
    nearest = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)
    nearest = nearest.to(torch.uint8).reshape(N, K)
    return {"codes": nearest[:, ::2] << 4 | nearest[:, 1::2], "scale": absmax}


def _quantize_int4(weight, block, name):
    N, K = weight.shape
    values = weight.float().reshape(N, K // block, block)
    low, high = values.amin(-1), values.amax(-1)
    # Divided by a tensor: by a number, CUDA would multiply by its rounded reciprocal.
    step = (high - low) / low.new_tensor(15.0)
    scale, minimum = step.half(), low.half()
    _runtime.check(
        bool((scale.isfinite() & minimum.isfinite()).all()),
        f"{name} has values that are NaN or outside float16's range",
    )
    inverse = torch.where(step == 0, 0, 1 / step)
    codes = ((values - low.unsqueeze(-1)) * inverse.unsqueeze(-1) + 0.5).trunc().nan_to_num().clamp(0, 15)
    first, second = codes.to(torch.uint8).chunk(2, dim=-1)
    return {"codes": (first | second << 4).reshape(N, K // 2), "scale": scale, "minimum": minimum}


def _quantize_absmax(absmax):
    """8-bit codes of the absmax (N, blocks): nearest in the dynamic map, found on a grid of 2^16 points."""
    flat = absmax.reshape(-1)
    offset = flat.mean() if len(flat) else flat.new_zeros(())
    groups = triton.cdiv(len(flat), NESTED_BLOCK)
    centred = F.pad(flat - offset, (0, groups * NESTED_BLOCK - len(flat))).view(groups, NESTED_BLOCK)
    nested_scale = centred.abs().amax(-1)
    code = _dynamic_map().to(absmax.device)
    grid = -1 + 2 * torch.arange(65536, device=absmax.device, dtype=torch.float32) / 65535
    above = torch.searchsorted(code, grid).clamp(max=255)
    below = (above - 1).clamp(min=0)
    nearest = torch.where(code[above] - grid < grid - code[below], above, below).to(torch.uint8)
    scaled = (centred * (1 / nested_scale).unsqueeze(-1)).clamp(-1, 1)
    codes = nearest[((scaled + 1) * 32767.5 + 0.5).nan_to_num().int()]
    codes[nested_scale == 0] = 0
    return {
        "scale": codes.reshape(-1)[: len(flat)].reshape(absmax.shape).contiguous(),
        "nested_scale": nested_scale,
        "nested_code": code,
        "nested_offset": offset,
    }


def _dynamic_map():
    """The signed 8-bit dynamic type (256,): seven decades, each with twice the points of the one below."""
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        points = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += [points, -points]
    return torch.cat(values).sort().values


def dequantize_4bit_ref(q, dtype=None):
    """What ``dequantize_4bit`` computes: (N, K) in ``dtype``, any floating type, by default that of ``q``."""
    N, K = q.shape
    codes = q.unpacked().codes.view(N, K // q.quant_block, q.quant_block // 2)
    low, high = (codes & 15).int(), (codes >> 4).int()
    if q.format == "nf4":
        values = q.code_book[torch.stack((high, low), -1).flatten(-2)] * q.absmax().unsqueeze(-1)
    else:
        values = torch.cat((low, high), -1) * q.scale.float().unsqueeze(-1) + q.minimum.float().unsqueeze(-1)
    return values.view(N, K).to(dtype or q.dtype)


# ``pitch``, the words of a row of the tile, is a number that the compiler must not know: see ``gemv_kernel``.
@triton.jit(do_not_specialize=["pitch"])
def _dequantize_kernel(
    codes, scales, out, words, pitch, first_block,
    QUANT_BLOCK: tl.constexpr, FORMAT: tl.constexpr, BLOCK_R: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """BLOCK_R * WORDS words of codes (int32), wherever in the weight they stand, to their eight values each."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    lane = tl.arange(0, WORDS)
    word = row[:, None] * pitch + lane[None, :]
    mask = word < words
    table = code_table(scales[1], BLOCK_R, FORMAT)
    block = (
        row[:, None] * WORDS // (QUANT_BLOCK // 8) + tl.max_contiguous(lane // (QUANT_BLOCK // 8), 2)[None, :]
    )
    scale, minimum = block_scale(scales, block, mask, first_block, FORMAT)
    v = decode_words(tl.load(codes + word, mask=mask, other=0), table, FORMAT)
    tile = weight_tile(v, scale, minimum, out.dtype.element_ty, FORMAT)
    value = row[:, None] * (8 * WORDS) + tl.arange(0, 8 * WORDS)[None, :]
    tl.store(out + value, tile, mask=value < words.to(tl.int64) * 8)


@triton.jit(do_not_specialize=["pitch"])
def _dequantize_packed_kernel(
    codes, scales, out, words, pitch, first_block,
    FORMAT: tl.constexpr, BLOCK_R: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """``_dequantize_kernel`` of packed codes, in groups of 16 words."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    lane = tl.arange(0, WORDS)
    word = row[:, None] * pitch + lane[None, :]
    mask = word < words
    BLOCKS: tl.constexpr = 4 if FORMAT == "int4" else 2  # in a group
    # as in ``_dequantize_kernel``: the stated contiguity orders the lanes
    block = row[:, None] * pitch * BLOCKS // 16 + tl.max_contiguous(lane // 16 * BLOCKS, 2)[None, :]
    table = code_table(scales[1], BLOCK_R, FORMAT, PACKED=True)
    packed = tl.load(codes + word, mask=mask, other=0)
    tile = packed_tile(packed, table, scales, block, mask, first_block, out.dtype.element_ty, FORMAT)
    value = row[:, None] * (8 * WORDS) + tl.arange(0, 8 * WORDS)[None, :]
    tl.store(out + value, tile, mask=value < words.to(tl.int64) * 8)


def kernel_format(scales):
    """The FORMAT that ``decode_tile`` compiles for."""
    return {torch.float16: "int4", torch.float32: "nf4", torch.uint8: "nested_nf4"}[scales[0].dtype]


def _dequantize_triton(
    codes: torch.Tensor, scales: list[torch.Tensor], quant_block: int, first_block: int, dtype: torch.dtype
) -> torch.Tensor:
    out = _dequantize_fake(codes, scales, quant_block, first_block, dtype)
    _launch_dequantize(out, codes, scales, quant_block, first_block)
    return out


def _launch_dequantize(out, codes, scales, quant_block, first_block):
    """To ``out`` (N, K), contiguous."""
    words = aligned(codes).view(torch.int32)
    if words.numel():
        packed = codes.dtype == torch.int32
        kernel = _dequantize_packed_kernel if packed else _dequantize_kernel
        blocks = {} if packed else {"QUANT_BLOCK": quant_block}
        with _runtime.launch_on(codes):
            kernel[(triton.cdiv(words.numel(), BLOCK_R * WORDS),)](
                words, tuple(scales), out, words.numel(), WORDS, first_block, FORMAT=kernel_format(scales),
                BLOCK_R=BLOCK_R, WORDS=WORDS, num_warps=4, enable_fp_fusion=False, **blocks,
            )  # fmt: skip


def _dequantize_torch(codes, scales, quant_block, first_block, dtype):
    out = _dequantize_fake(codes, scales, quant_block, first_block, dtype)
    nf4 = kernel_format(scales) != "int4"
    if codes.dtype == torch.int32:
        codes = unpack(codes, "nf4" if nf4 else "int4")
    packed, values = codes.view(-1, quant_block // 2), out.view(-1, quant_block)
    scale = (decode_absmax(scales, first_block) if nf4 else scales[0]).view(-1, 1)
    if nf4:
        byte = torch.arange(256, device=codes.device)
        # one 8-byte look-up gives both of a byte's float32 values
        pairs = torch.stack((scales[1][byte >> 4], scales[1][byte & 15]), -1).view(torch.int64).flatten()
    else:
        minimum = scales[1].view(-1, 1)
    for start in range(0, len(values), CPU_TILE // quant_block):
        part = slice(start, start + CPU_TILE // quant_block)
        if nf4:
            values[part] = pairs[packed[part].int()].view(torch.float32).mul_(scale[part])
        else:
            nibbles = torch.cat((packed[part] & 15, packed[part] >> 4), -1)
            values[part] = nibbles.float().mul_(scale[part]).add_(minimum[part])
    return out


def _dequantize_fake(codes, scales, quant_block, first_block, dtype):
    per_element = 8 if codes.dtype == torch.int32 else 2
    return torch.empty(codes.shape[0], per_element * codes.shape[1], dtype=dtype, device=codes.device)


dequantize_op = _runtime.register(
    "dequantize_4bit", triton_impl=_dequantize_triton, torch_impl=_dequantize_torch, fake=_dequantize_fake
)


def pieces(N, K, quant_block):
    """Slices of a weight's rows that are dense at the same time where many rows of x are trained: the halves of a
    large wide 4-bit weight, such as gate and up are."""
    if not quant_block or N < 2 * K or N * K <= WHOLE:
        return [slice(0, N)]
    return [slice(0, N // 2), slice(N // 2, N)]


def dense(weight, quant_block, first_block, dtype, rows=None):
    """The matrix of operands [W], or of [codes, *scales] with a ``quant_block``: dense for as long as it is held.

    rows: a slice of its rows, with start and stop; None: all.
    """
    if not quant_block:
        return weight[0] if rows is None else weight[0][rows]
    if rows is not None:
        codes, scale, *others = weight
        first_block += rows.start * scale.shape[1]  # which nested scales are counted by
        minimum = scale.dtype == torch.float16  # int4's, a value a block as well
        weight = [codes[rows], scale[rows], *(x[rows] if minimum else x for x in others)]
    dequantize = route(dequantize_op, _dequantize_triton, _dequantize_torch, weight[0].device)
    return dequantize(weight[0], weight[1:], quant_block, first_block, dtype)


def dense_into(out, weight, quant_block, first_block):
    """Write what ``dense`` returns, of a 4-bit weight, to ``out`` (N, K), contiguous. Not to be traced."""
    codes, *scales = weight
    if codes.is_cuda or _runtime.INTERPRET:
        _launch_dequantize(out, codes, scales, quant_block, first_block)
    else:
        out.copy_(_dequantize_torch(codes, scales, quant_block, first_block, out.dtype))


def dequantize_4bit(q, dtype=None):
    """The weight (N, K) of ``q`` in ``dtype`` (float32, float16 or bfloat16; by default that of ``q``).

    Bit-equal to bitsandbytes' ``dequantize_4bit`` (nf4) and to gguf's Q4_1. For less than the whole, dequantise
    ``q.rows(start, stop)``.
    """
    dtype = dtype or q.dtype
    _runtime.check(dtype in DTYPES, f"dtype is {dtype}, expected one of {DTYPES}")
    return dequantize_op(*q.operands(), dtype)
