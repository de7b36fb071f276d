"""A prototype of a faster fused 4-bit matmul, measured and not yet a route of ``matmul_4bit``, for 16-bit x.

Packed codes (N, K/2) uint8 = int32 words (N, K/8). A row's words come in groups of 16 for each tile of 128 elements:
bits 4i..4i+3 of word j (0..15) of tile t hold the code of element k = 128 t + 16 i + j. An nf4 code is renumbered,
``new = ORDER.index(old)`` (int4: unchanged), so that codes c and c + 8 agree in sign and in bit 7 of both 16-bit
roundings: what ``_NF4_ASM`` needs. ``pack`` / ``unpack`` convert from and to the order of ``quantization.py``.
"""

import torch
import triton
import triton.language as tl
from nanogrpo.kernels.quantization import NF4_CODE

TILE = 128
# The book is rounded after multiplication by a constant that block scales divide out: found by search, it makes the
# bits pair up (see pack) and halves the worst rounding error (bf16: 0.0019 relative, instead of 0.0031).
GAIN = {torch.bfloat16: 0.6875, torch.float16: 0.921875}


def _rounded(dtype):
    value = (torch.tensor(NF4_CODE, dtype=torch.float64) * GAIN[dtype]).to(dtype)
    value[7] = -0.0
    return value


def _bits(dtype):
    return (_rounded(dtype).view(torch.int16).int() & 0xFFFF).tolist()


def _order():
    classes = {}
    for code, (b, h) in enumerate(zip(_bits(torch.bfloat16), _bits(torch.float16), strict=True)):
        classes.setdefault((b >> 15, b >> 7 & 1, h >> 7 & 1), []).append(code)
    low, high = [], []
    for members in classes.values():
        assert len(members) % 2 == 0
        low += members[::2]
        high += members[1::2]
    return tuple(low + high)


ORDER = _order()  # ORDER[new] = old


def _tables(dtype):
    """A0, A1, B0, B1 of the high and of the low bytes: what two sign-replicating look-ups must xor to."""
    bits = [_bits(dtype)[old] for old in ORDER]
    words = []
    for shift in (8, 0):
        r0, r1 = [b >> shift & 255 for b in bits[:8]], [b >> shift & 255 for b in bits[8:]]
        # code c < 8: A[c] ^ S(B[c]); c + 8: S(A[c]) ^ B[c], S = sign replicated to a byte
        a, b = [], []
        for u, v in zip(r0, r1, strict=True):
            assert (u ^ v) < 128
            # msb(A) ^ msb(B) = msb(u) = msb(v); choose msb(B) = 0
            a.append(u)
            b.append(v ^ (255 if u >= 128 else 0))
            assert b[-1] < 128
        for t in (a, b):
            words += [sum(t[i + o] << 8 * i for i in range(4)) for o in (0, 4)]
    return words


def _nf4_asm(dtype):
    ha0, ha1, hb0, hb1, la0, la1, lb0, lb1 = (f"0x{w:08x}" for w in _tables(dtype))
    lines = [".reg .b32 p0, p1, n0, n1, q0, q1, m0, m1, a, b, h, l, t0, t1, t2, t3;"]
    # Four table words pass through a zero that ptxas cannot see: it would hold them as uniform and copy at each use.
    lines += ["mov.u32 a, %lanemask_lt;", "mov.u32 b, %lanemask_gt;", "and.b32 a, a, b;"]
    lines += [f"or.b32 t{i}, a, {word};" for i, word in enumerate((ha0, hb0, la0, lb0))]
    ha0, hb0, la0, lb0 = "t0", "t1", "t2", "t3"
    lines += ["prmt.b32 p0, $8, $9, 0x5140;", "prmt.b32 p1, $8, $9, 0x7362;"]
    for i in "01":
        lines += [f"xor.b32 n{i}, p{i}, 0x88888888;", f"shr.u32 q{i}, p{i}, 16;", f"shr.u32 m{i}, n{i}, 16;"]
    for i, (s, n) in enumerate((("p0", "n0"), ("q0", "m0"), ("p1", "n1"), ("q1", "m1"))):
        for out, (a0, a1, b0, b1) in (("h", (ha0, ha1, hb0, hb1)), ("l", (la0, la1, lb0, lb1))):
            lines += [
                f"prmt.b32 a, {a0}, {a1}, {s};",
                f"prmt.b32 b, {b0}, {b1}, {n};",
                f"xor.b32 {out}, a, b;",
            ]
        lines += [f"prmt.b32 ${2 * i}, l, h, 0x6240;", f"prmt.b32 ${2 * i + 1}, l, h, 0x7351;"]
    return "{ " + "\n".join(lines) + " }"


def _int4_asm(dtype):
    first, mask, magic = (
        (3, "0x00780078", "0x41804180") if dtype == torch.bfloat16 else (6, "0x03C003C0", "0x4C004C00")
    )
    lines = [".reg .b32 g0, g1, t;", "prmt.b32 g0, $8, $9, 0x5410;", "prmt.b32 g1, $8, $9, 0x7632;"]
    for i in range(8):
        by = first - 4 * (i % 4)
        lines.append(f"shl.b32 t, g{i // 4}, {by};" if by > 0 else f"shr.u32 t, g{i // 4}, {-by};")
        lines.append(f"lop3.b32 ${i}, t, {mask}, {magic}, 0xEA;")
    return "{ " + "\n".join(lines) + " }"


def _scaled_int4_asm(dtype):
    """As _int4_asm, then (code - 8) * scale + centre, for the two elements' blocks of scale and centre twice over."""
    kind, minus, one = (
        ("bf16x2", "0xC1C0C1C0", "0x3F803F80")
        if dtype == torch.bfloat16
        else ("f16x2", "0xCE00CE00", "0x3C003C00")
    )
    body = (
        _int4_asm(dtype)[2:-2]
        .replace("g0, g1, t;", "g0, g1, t, one, minus, q;")
        .replace("lop3.b32 $", "lop3.b32 q, ")
    )
    lines = []
    for line in body.split("\n"):
        if "lop3" in line:
            i = int(line.split(", ")[1][0])
            line = line.replace(f"q, {i},", "q,")
            line += f"\nfma.rn.{kind} q, q, one, minus;"
            line += f"\nfma.rn.{kind} ${i}, q, ${10 + 2 * (i // 2)}, ${18 + 2 * (i // 2)};"
        lines.append(line)
        if ".reg" in line:
            lines += [f"mov.b32 one, {one};", f"mov.b32 minus, {minus};"]
    return "{ " + "\n".join(lines) + " }"


_ASM = {
    (f, d): tl.constexpr(make(d))
    for f, make in (("nf4", _nf4_asm), ("int4", _int4_asm), ("scaled", _scaled_int4_asm))
    for d in (torch.bfloat16, torch.float16)
}
NF4_BF16, NF4_FP16 = _ASM["nf4", torch.bfloat16], _ASM["nf4", torch.float16]
INT4_BF16, INT4_FP16 = _ASM["int4", torch.bfloat16], _ASM["int4", torch.float16]
SCALED_BF16, SCALED_FP16 = _ASM["scaled", torch.bfloat16], _ASM["scaled", torch.float16]
SCALED_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r" + ",r" * 18)
CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")
BOOK_FP16 = tl.constexpr(tuple(_rounded(torch.float16).float()[list(ORDER)].tolist()))
UNSCALE_BF16, UNSCALE_FP16 = tl.constexpr(1 / GAIN[torch.bfloat16]), tl.constexpr(1 / GAIN[torch.float16])


@triton.jit
def _plain(words, SHIFT: tl.constexpr, NF4: tl.constexpr):
    """What the assembly computes, for the interpreter (float16 only)."""
    code = (words >> SHIFT) & 15
    if NF4:
        value = tl.zeros(words.shape, tl.float32)
        for i in tl.static_range(16):
            value = tl.where(code == i, BOOK_FP16[i], value)
    else:
        value = (code + 16).to(tl.float32)
    return value.to(tl.float16)


@triton.jit
def _decode(w, DTYPE: tl.constexpr, NF4: tl.constexpr, ASM: tl.constexpr):
    """Eight tiles of 16-bit values of one tile of words: GAIN * code book, or 16 + code."""
    if not ASM:
        return (_plain(w, 0, NF4), _plain(w, 4, NF4), _plain(w, 8, NF4), _plain(w, 12, NF4),
                _plain(w, 16, NF4), _plain(w, 20, NF4), _plain(w, 24, NF4), _plain(w, 28, NF4))  # fmt: skip
    elif NF4:
        if DTYPE == tl.bfloat16:
            return tl.inline_asm_elementwise(
                NF4_BF16, CONSTRAINTS, [w], (tl.bfloat16,) * 8, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                NF4_FP16, CONSTRAINTS, [w], (tl.float16,) * 8, is_pure=True, pack=2
            )
    else:
        if DTYPE == tl.bfloat16:
            return tl.inline_asm_elementwise(
                INT4_BF16, CONSTRAINTS, [w], (tl.bfloat16,) * 8, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                INT4_FP16, CONSTRAINTS, [w], (tl.float16,) * 8, is_pure=True, pack=2
            )


@triton.jit
def _half(bits, SHIFT: tl.constexpr):
    return (bits >> SHIFT).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _twice(value, like, DTYPE: tl.constexpr):
    """A float32 rounded to DTYPE in both halves of an integer, for each of a row's words."""
    if DTYPE == tl.bfloat16:
        bits = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,r", [value], tl.int32, is_pure=True, pack=1
        )
    else:
        bits = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [value], tl.int32, is_pure=True, pack=1
        )
    return tl.broadcast_to(bits[:, :, None], like.shape)


@triton.jit
def _decode_scaled(w, raw, low, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Eight tiles of int4 weights, each rounded as (code - 8) * scale + (minimum + 8 * scale) in 16 bits."""
    s0, s1, s2, s3 = _half(raw, 0), _half(raw, 16), _half(raw, 32), _half(raw, 48)
    c0, c1, c2, c3 = (
        _half(low, 0) + 8 * s0,
        _half(low, 16) + 8 * s1,
        _half(low, 32) + 8 * s2,
        _half(low, 48) + 8 * s3,
    )
    if not ASM:
        v0, v1, v2, v3, v4, v5, v6, v7 = _decode(w, DTYPE, False, False)
        return (
            ((v0 - 24) * s0[:, :, None] + c0[:, :, None]).to(DTYPE),
            ((v1 - 24) * s0[:, :, None] + c0[:, :, None]).to(DTYPE),
            ((v2 - 24) * s1[:, :, None] + c1[:, :, None]).to(DTYPE),
            ((v3 - 24) * s1[:, :, None] + c1[:, :, None]).to(DTYPE),
            ((v4 - 24) * s2[:, :, None] + c2[:, :, None]).to(DTYPE),
            ((v5 - 24) * s2[:, :, None] + c2[:, :, None]).to(DTYPE),
            ((v6 - 24) * s3[:, :, None] + c3[:, :, None]).to(DTYPE),
            ((v7 - 24) * s3[:, :, None] + c3[:, :, None]).to(DTYPE),
        )  # fmt: skip
    else:
        t0, t1, t2, t3 = (
            _twice(s0, w, DTYPE),
            _twice(s1, w, DTYPE),
            _twice(s2, w, DTYPE),
            _twice(s3, w, DTYPE),
        )
        d0, d1, d2, d3 = (
            _twice(c0, w, DTYPE),
            _twice(c1, w, DTYPE),
            _twice(c2, w, DTYPE),
            _twice(c3, w, DTYPE),
        )
        if DTYPE == tl.bfloat16:
            return tl.inline_asm_elementwise(
                SCALED_BF16, SCALED_CONSTRAINTS, [w, t0, t1, t2, t3, d0, d1, d2, d3], (tl.bfloat16,) * 8,
                is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                SCALED_FP16, SCALED_CONSTRAINTS, [w, t0, t1, t2, t3, d0, d1, d2, d3], (tl.float16,) * 8,
                is_pure=True, pack=2,
            )  # fmt: skip


@triton.jit
def _raw_scales(scales, row, tile, tiles, mask, FORMAT: tl.constexpr):
    """A tile's block scales as loaded: one integer (and one of minima) for each row."""
    raw = tl.load(scales[0] + row * tiles + tile, mask=mask, other=0)
    low = raw
    if FORMAT == "int4":
        low = tl.load(scales[1] + row * tiles + tile, mask=mask, other=0)
    return raw, low


@triton.jit
def _scale(
    scales, raw, row, tile, tiles, first_block, B: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr
):
    """float32 scale of block B of each row's tile."""
    UNSCALE: tl.constexpr = UNSCALE_BF16 if DTYPE == tl.bfloat16 else UNSCALE_FP16
    if FORMAT == "int4":
        scale = _half(raw, 16 * B)
    elif FORMAT == "nf4":
        scale = (raw >> (32 * B)).to(tl.int32).to(tl.float32, bitcast=True) * UNSCALE
    else:
        group = tl.load(
            scales[2] + ((row * tiles + tl.minimum(tile, tiles - 1)) * 2 + B + first_block) // 256
        )
        code = ((raw >> (8 * B)) & 255).to(tl.int32)
        scale = (tl.load(scales[3] + code) * group + tl.load(scales[4])) * UNSCALE
    return scale


@triton.jit(do_not_specialize=["M", "tiles", "steps", "first_block"])
def _fast_kernel(
    x, codes, scales, bias, out, M, N, tiles, steps, first_block,
    FORMAT: tl.constexpr, PARTIAL: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr, OVER_N: tl.constexpr,
    SCALED: tl.constexpr, PREFETCH: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of W @ x.T; S warps take BLOCK_N rows of W each (OVER_N), or share them, each with every S-th tile of K.

    x (M, 128 tiles), codes int32 (N, 16 tiles), scales[0] (and int4's scales[1]) one integer a tile: (N, tiles).
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    NF4: tl.constexpr = FORMAT != "int4"
    PER: tl.constexpr = 4 if NF4 else 2
    s = tl.arange(0, S)[:, None]
    lane = tl.arange(0, BLOCK_N)[None, :]
    j = tl.arange(0, 16)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if OVER_N:
        n = (tl.program_id(0) * S + s) * BLOCK_N + lane
        first = tl.program_id(2) * steps + tl.zeros((1, 1), tl.int32)
        STRIDE: tl.constexpr = 1
    else:
        n = tl.program_id(0) * BLOCK_N + lane
        first = tl.program_id(2) * steps * S + s
        STRIDE: tl.constexpr = S
    row = tl.minimum(n, N - 1).to(tl.int64)
    words_row = codes + (row * tiles * 16)[:, :, None] + j[None, None, :]
    x_row = x + (m.to(tl.int64) * tiles * 128)[None, None, :] + j[None, :, None]
    x_mask = (m < M)[None, None, :]
    acc = tl.zeros((S, BLOCK_N, BLOCK_M), tl.float32)
    ones = tl.full((S, BLOCK_N, 16), 1.0, DTYPE)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # the weight depends on no earlier kernel: its first steps go to the L2 cache while the last one ends
        for step in tl.static_range(PREFETCH):
            tile = tl.minimum(first + step * STRIDE, tiles - 1)
            pointer = codes + (row * tiles + tile) * 16
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointer.to(tl.int64)], tl.int32,
                is_pure=False, pack=1,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
    for step in tl.range(0, steps, num_stages=STAGES):
        tile = first + step * STRIDE
        exists = tile < tiles
        w = tl.load(words_row + tile[:, :, None] * 16, mask=exists[:, :, None], other=0)
        raw, low = _raw_scales(scales, row, tile, tiles, exists, FORMAT)
        if SCALED:
            v = _decode_scaled(w, raw, low, DTYPE, ASM)
        else:
            v = _decode(w, DTYPE, NF4, ASM)
        x_tile = x_row + tile[:, :, None] * 128
        mask = x_mask & exists[:, :, None]
        if SCALED:
            for i in tl.static_range(8):
                xi = tl.broadcast_to(tl.load(x_tile + 16 * i, mask=mask, other=0), (S, 16, BLOCK_M))
                acc = tl.dot(v[i], xi, acc)
        else:
            for b in tl.static_range(8 // PER):
                part = tl.zeros((S, BLOCK_N, BLOCK_M), tl.float32)
                total = tl.zeros((S, BLOCK_N, BLOCK_M), tl.float32)
                for i in tl.static_range(PER):
                    xi = tl.load(x_tile + 16 * (b * PER + i), mask=mask, other=0)
                    xi = tl.broadcast_to(xi, (S, 16, BLOCK_M))
                    part = tl.dot(v[b * PER + i], xi, part)
                    if not NF4:
                        total = tl.dot(ones, xi, total)
                scale = _scale(scales, raw, row, tile, tiles, first_block, b, FORMAT, DTYPE)
                acc += part * scale[:, :, None]
                if not NF4:
                    acc += total * (_half(low, 16 * b) - 16 * scale)[:, :, None]
    target = tl.program_id(2).to(tl.int64) * M + m
    if OVER_N:
        y = acc
        column, target = n[:, :, None], target[None, None, :]
        inside = (n < N)[:, :, None] & (m < M)[None, None, :]
    else:
        y = tl.sum(acc, 0)
        column, target = tl.trans(n), target[None, :]
        inside = (column < N) & (m < M)[None, :]
    if bias is not None and not PARTIAL:
        y += tl.load(bias + column, mask=column < N, other=0).to(tl.float32)
    tl.store(out + target * N + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(partial, bias, out, total, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out (M, N) = partial sums (SPLIT, M, N) added in order, + bias; ``total`` = M*N."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(partial + split * total + index, mask=mask, other=0)
    if bias is not None:
        acc += tl.load(bias + index % N, mask=mask, other=0).to(tl.float32)
    tl.store(out + index, acc.to(out.dtype.element_ty), mask=mask)


def pack(codes, format):
    """Codes (N, K/2) uint8 in ``quantization.py``'s order to the packed order above; K a multiple of 128."""
    N, K = codes.shape[0], 2 * codes.shape[1]
    if format == "int4":
        blocks = codes.view(N, K // 32, 16)
        code = torch.stack((blocks & 15, blocks >> 4), 2).view(N, K)
    else:
        code = torch.stack((codes >> 4, codes & 15), -1).view(N, K)
        code = torch.tensor([ORDER.index(i) for i in range(16)], dtype=torch.uint8, device=codes.device)[
            code.int()
        ]
    code = code.view(N, K // 128, 8, 16).transpose(2, 3)  # tile, word, nibble
    return (code[..., ::2] | code[..., 1::2] << 4).reshape(N, K // 2)  # byte b of a word: nibbles 2b, 2b + 1


def unpack(packed, format):
    """The inverse of ``pack``."""
    N, K = packed.shape[0], 2 * packed.shape[1]
    code = torch.stack((packed & 15, packed >> 4), -1).view(N, K // 128, 16, 8).transpose(2, 3).reshape(N, K)
    if format == "int4":
        blocks = code.view(N, K // 32, 2, 16)
        return (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(N, K // 2)
    code = torch.tensor(ORDER, dtype=torch.uint8, device=packed.device)[code.int()]
    return code[:, ::2] << 4 | code[:, 1::2]


def plan(tiles_n, tiles_k, slices, programs):
    """Steps a program and splits, from N and K alone: about ``programs`` programs, two steps each at least."""
    steps = triton.cdiv(tiles_k, slices)
    split = max(1, min(programs // max(1, tiles_n), steps // 2))
    steps = triton.cdiv(steps, split)
    return steps, triton.cdiv(tiles_k, steps * slices)


def launch_plan(x, packed, scales, bias, first_block, config, asm=True):
    """Arguments of the launches of ``fast_matmul``: (kernel, grid, positional, keywords)."""
    over_n, S, block_n, block_m, stages, programs, pdl, *scaled = config
    (M, K), N = x.shape, len(packed)
    tiles = K // TILE
    format = {torch.float16: "int4", torch.float32: "nf4", torch.uint8: "nested_nf4"}[scales[0].dtype]
    integer = torch.int16 if format == "nested_nf4" else torch.int64
    views = (scales[0].view(integer),)
    views += (scales[1].view(integer),) if format == "int4" else tuple(scales[1:])
    grid_n = triton.cdiv(N, block_n * (S if over_n else 1))
    grid_m = triton.cdiv(M, block_m)
    steps, split = plan(grid_n, tiles, 1 if over_n else S, programs)
    prefetch = min(steps, 4) if pdl == 2 else 0
    out = x.new_empty(M, N)
    target = out if split == 1 else x.new_empty(split, M, N, dtype=torch.float32)
    keywords = {
        "FORMAT": format, "PARTIAL": split > 1, "ASM": asm, "PDL": pdl > 0, "OVER_N": over_n, "SCALED": scaled == [1],
        "PREFETCH": prefetch, "S": S, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "STAGES": stages, "num_warps": S, "launch_pdl": pdl > 0,
    }  # fmt: skip
    positional = (x, packed.view(torch.int32), views, bias, target, M, N, tiles, steps, first_block)
    launches = [(_fast_kernel, (grid_n, grid_m, split), positional, keywords)]
    if split > 1:
        positional = (target, bias, out, M * N, N)
        keywords = {"SPLIT": split, "BLOCK": 256, "PDL": pdl > 0, "num_warps": 2, "launch_pdl": pdl > 0}
        launches.append((_sum_kernel, (triton.cdiv(M * N, 256),), positional, keywords))
    return out, launches


def fast_matmul(x, packed, scales, config, bias=None, first_block=0, asm=True):
    """x (M, K) @ W.T; K % 128 == 0. ``packed`` of ``pack``; ``scales`` as ``QuantizedWeight.operands`` lists them.

    config: over_n, S (warps), BLOCK_N (rows of W a warp: 16 or 32), BLOCK_M, stages, programs that fill the card, pdl
    (0: plain launches; 1: programmatic dependent launch; 2: the same, and codes prefetched to L2 before the wait);
    then optionally 1 (int4): weights are scaled and rounded before the dot, not by float32 block scales after it.
    """
    out, launches = launch_plan(x, packed, scales, bias, first_block, config, asm)
    for kernel, grid, positional, keywords in launches:
        kernel[grid](*positional, **keywords)
    return out
