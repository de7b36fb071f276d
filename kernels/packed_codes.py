"""4-bit codes in the order in which tensor cores take them, and their decoding to 16-bit floats in registers.

Packed codes are int32 words (N, K/8), K a multiple of 128. A row's words come in groups of 16 for each tile of 128
elements: bits 4i to 4i+3 of word j (0..15) of tile t hold the code of element

    k = 128 t + 32 (i // 2) + 8 (j // 4) + 4 (i % 2) + j % 4

so that four words, a lane's share of a row, hold four runs of eight neighbouring elements, as 16 bytes of x do, and
nothing moves between lanes. int4 codes keep their value. An nf4 code is renumbered, ``new = ORDER.index(old)``, so
that codes c and c + 8 agree in sign and in bit 7 of both 16-bit roundings of their values: two byte permutations and
an exclusive or then look up a byte of four values at once (``_nf4_assembly``); one permutation reaches but eight.

The look-up yields GAIN * code_book rounded to 16 bits, and block scales are divided by GAIN. The
constants were found by search: with them the bits pair up as above, and a value errs by at most 0.0019 of itself in
bfloat16 and 0.00032 in float16 (half a unit in the last place, as a weight rounded after scaling errs: 0.0039 and
0.00049). int4 yields 16 + code, which is exact.
"""

import torch
import triton
import triton.language as tl

TILE = 128  # elements of K in a group of words
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
GAIN = {torch.bfloat16: 0.6875, torch.float16: 0.921875}


def _rounded(dtype):
    value = (torch.tensor(NF4_CODE, dtype=torch.float64) * GAIN[dtype]).to(dtype)
    value[NF4_CODE.index(0.0)] = -0.0  # a negative code is left without a partner otherwise
    return value


def _bits(dtype):
    return (_rounded(dtype).view(torch.int16).int() & 0xFFFF).tolist()


def _order():
    """old code by new: the two halves pair codes of one sign and of one bit 7 in both dtypes."""
    classes = {}
    for code, (b, h) in enumerate(zip(_bits(torch.bfloat16), _bits(torch.float16), strict=True)):
        classes.setdefault((b >> 15, b >> 7 & 1, h >> 7 & 1), []).append(code)
    low = [code for members in classes.values() for code in members[::2]]
    high = [code for members in classes.values() for code in members[1::2]]
    return tuple(low + high)


ORDER = _order()


def pack(codes, format):
    """Codes (N, K/2) uint8 in the order of ``QuantizedWeight`` to packed words (N, K/8) int32."""
    N, K = codes.shape[0], 2 * codes.shape[1]
    if format == "int4":
        blocks = codes.view(N, K // 32, 16)
        code = torch.stack((blocks & 15, blocks >> 4), 2)
    else:
        new = torch.tensor([ORDER.index(old) for old in range(16)], dtype=torch.uint8, device=codes.device)
        code = new[torch.stack((codes >> 4, codes & 15), -1).int()]
    # tile, i // 2, j // 4, i % 2, j % 4 -> tile, j // 4, j % 4, i // 2, i % 2
    code = code.view(N, K // TILE, 4, 4, 2, 4).permute(0, 1, 3, 5, 2, 4)
    return (code[..., 0] | code[..., 1] << 4).reshape(N, K // 2).view(torch.int32)


def unpack(words, format):
    """The inverse of ``pack``."""
    N, K = words.shape[0], 8 * words.shape[1]
    packed = words.view(torch.uint8)
    code = torch.stack((packed & 15, packed >> 4), -1).view(N, K // TILE, 4, 4, 4, 2)
    code = code.permute(0, 1, 4, 2, 5, 3).reshape(N, K)
    if format == "int4":
        blocks = code.view(N, K // 32, 2, 16)
        return (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(N, K // 2)
    code = torch.tensor(ORDER, dtype=torch.uint8, device=words.device)[code.int()]
    return code[:, ::2] << 4 | code[:, 1::2]


def _tables(dtype):
    """Eight words: for the high and then the low bytes, A and B such that the bytes of codes c and c + 8 (c < 8) are
    A[c] ^ S(B[c]) and S(A[c]) ^ B[c], with S the sign bit spread over a byte, as ``prmt`` does for codes >= 8."""
    bits = [_bits(dtype)[old] for old in ORDER]
    words = []
    for shift in (8, 0):
        low, high = [b >> shift & 255 for b in bits[:8]], [b >> shift & 255 for b in bits[8:]]
        flipped = [v ^ (255 if u >= 128 else 0) for u, v in zip(low, high, strict=True)]
        words += [sum(t[i + o] << 8 * i for i in range(4)) for t in (low, flipped) for o in (0, 4)]
    return words


def _nf4_assembly(dtype, codes, pairs):
    """Words to four pairs of values ($0..$3): ``codes`` makes the eight codes in p, ``pairs`` are the permutations
    that take the first and second pair of four codes."""
    ha0, ha1, hb0, hb1, la0, la1, lb0, lb1 = (f"0x{w:08x}" for w in _tables(dtype))
    lines = [".reg .b32 p, n, q, m, a, b, h, l, t0, t1, t2, t3;"]
    # Four table words pass through a zero that ptxas cannot see: it would hold them as uniform and copy at each use.
    lines += ["mov.u32 a, %lanemask_lt;", "mov.u32 b, %lanemask_gt;", "and.b32 a, a, b;"]
    lines += [f"or.b32 t{i}, a, {word};" for i, word in enumerate((ha0, hb0, la0, lb0))]
    lines += [*codes, "xor.b32 n, p, 0x88888888;", "shr.u32 q, p, 16;", "shr.u32 m, n, 16;"]
    for i, (code, negated) in enumerate((("p", "n"), ("q", "m"))):
        for byte, (a0, a1, b0, b1) in (("h", ("t0", ha1, "t1", hb1)), ("l", ("t2", la1, "t3", lb1))):
            lines += [f"prmt.b32 a, {a0}, {a1}, {code};", f"prmt.b32 b, {b0}, {b1}, {negated};"]
            lines += [f"xor.b32 {byte}, a, b;"]
        lines += [f"prmt.b32 ${2 * i + j}, l, h, {pair};" for j, pair in enumerate(pairs)]
    return "{ " + "\n".join(lines) + " }"


def nf4_pair_assembly(dtype):
    """The byte of two codes in $1 to the pair of their values in $0, that of the low code first."""
    ha0, ha1, hb0, hb1, la0, la1, lb0, lb1 = (f"0x{w:08x}" for w in _tables(dtype))
    lines = [".reg .b32 n, a, b, h, l, t, u;", "xor.b32 n, $1, 0x88;"]
    for byte, (a0, a1, b0, b1) in (("h", (ha0, ha1, hb0, hb1)), ("l", (la0, la1, lb0, lb1))):
        lines += [f"mov.u32 t, {a0};", f"mov.u32 u, {a1};", "prmt.b32 a, t, u, $1;"]
        lines += [f"mov.u32 t, {b0};", f"mov.u32 u, {b1};", "prmt.b32 b, t, u, n;", f"xor.b32 {byte}, a, b;"]
    return "{ " + "\n".join([*lines, "prmt.b32 $0, l, h, 0x5140;"]) + " }"


def _nf4_halves(dtype, half):
    """$4, $5 to four pairs: pair i holds the values of nibble 4 half + i of both."""
    codes = [f"prmt.b32 p, $4, $5, {('0x5140', '0x7362')[half]};"]
    return _nf4_assembly(dtype, codes, ("0x6240", "0x7351"))


def _nf4_quads(dtype):
    """$4, $5 and 4 u in $6 to four pairs: pair i holds the values of nibble 2 i + u of both."""
    codes = ["shr.u32 p, $4, $6;", "sub.u32 b, 4, $6;", "shl.b32 q, $5, b;"]
    codes += ["lop3.b32 p, p, q, 0x0F0F0F0F, 0xE4;"]  # p where the mask is set, else q
    return _nf4_assembly(dtype, codes, ("0x5140", "0x7362"))


def _int4_assembly(dtype, before, words, steps):
    """Words to four pairs of 16 + code: its bits in the mantissa of a float of exponent 4.

    words: names of two; steps: for each pair the half of the words and the nibble in it.
    """
    bf16 = (3, "0x00780078", "0x41804180")
    first, mask, magic = bf16 if dtype == torch.bfloat16 else (6, "0x03C003C0", "0x4C004C00")
    lines, last = [".reg .b32 g, t, u, v;", *before], None
    for i, (half, nibble) in enumerate(steps):
        if half != last:
            lines.append(f"prmt.b32 g, {words[0]}, {words[1]}, {('0x5410', '0x7632')[half]};")
        last, by = half, first - 4 * nibble
        lines.append(f"shl.b32 t, g, {by};" if by > 0 else f"shr.u32 t, g, {-by};")
        lines.append(f"lop3.b32 ${i}, t, {mask}, {magic}, 0xEA;")
    return "{ " + "\n".join(lines) + " }"


def _int4_halves(dtype, half):
    """As ``_nf4_halves``."""
    return _int4_assembly(dtype, [], ("$4", "$5"), [(half, i) for i in range(4)])


def _int4_quads(dtype):
    """As ``_nf4_quads``."""
    before = ["shr.u32 u, $4, $6;", "shr.u32 v, $5, $6;"]
    return _int4_assembly(dtype, before, ("u", "v"), [(i // 2, 2 * (i % 2)) for i in range(4)])


NF4_BF16, NF4_FP16, INT4_BF16, INT4_FP16 = (
    tl.constexpr(tuple(assembly(dtype, half) for half in (0, 1)))
    for assembly in (_nf4_halves, _int4_halves)
    for dtype in (torch.bfloat16, torch.float16)
)
NF4_QUADS_BF16, NF4_QUADS_FP16, INT4_QUADS_BF16, INT4_QUADS_FP16 = (
    tl.constexpr(assembly(dtype))
    for assembly in (_nf4_quads, _int4_quads)
    for dtype in (torch.bfloat16, torch.float16)
)
CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r")
QUAD_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r")
BOOK_FP16 = tl.constexpr(tuple(_rounded(torch.float16).float()[list(ORDER)].tolist()))
UNGAIN_BF16, UNGAIN_FP16 = tl.constexpr(1 / GAIN[torch.bfloat16]), tl.constexpr(1 / GAIN[torch.float16])
# ORDER as bits: the old code of ``new`` is four bits from 4 * new on
ORDER_BITS = tl.constexpr(sum(old << 4 * new for new, old in enumerate(ORDER)) - (1 << 64) * (ORDER[15] >= 8))


@triton.jit
def _plain(words, shift, NF4: tl.constexpr):
    """What the assembly computes, for the interpreter (float16 alone)."""
    code = (words >> shift) & 15
    if NF4:
        value = tl.zeros(words.shape, tl.float32)
        for i in tl.static_range(16):
            value = tl.where(code == i, BOOK_FP16[i], value)
    else:
        value = (code + 16).to(tl.float32)
    return value.to(tl.float16)


@triton.jit
def decode_packed(words, HALF: tl.constexpr, DTYPE: tl.constexpr, NF4: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Four tensors of the words' shape, of nibbles 4 HALF on: GAIN * code book (nf4), or 16 + code (int4)."""
    if not ASSEMBLY:
        FIRST: tl.constexpr = 16 * HALF
        return (_plain(words, FIRST, NF4), _plain(words, FIRST + 4, NF4),
                _plain(words, FIRST + 8, NF4), _plain(words, FIRST + 12, NF4))  # fmt: skip
    else:
        if DTYPE == tl.bfloat16:
            TEXT: tl.constexpr = NF4_BF16[HALF] if NF4 else INT4_BF16[HALF]
            return tl.inline_asm_elementwise(
                TEXT, CONSTRAINTS, [words], (tl.bfloat16,) * 4, is_pure=True, pack=2
            )
        else:
            TEXT: tl.constexpr = NF4_FP16[HALF] if NF4 else INT4_FP16[HALF]
            return tl.inline_asm_elementwise(
                TEXT, CONSTRAINTS, [words], (tl.float16,) * 4, is_pure=True, pack=2
            )


@triton.jit
def decode_quads(words, upper, DTYPE: tl.constexpr, NF4: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The same of nibbles 2 i + upper / 4, i = 0 to 3, where ``upper`` is 0 or 4, the same for two neighbours."""
    if not ASSEMBLY:
        return (_plain(words, upper, NF4), _plain(words, upper + 8, NF4),
                _plain(words, upper + 16, NF4), _plain(words, upper + 24, NF4))  # fmt: skip
    else:
        if DTYPE == tl.bfloat16:
            TEXT: tl.constexpr = NF4_QUADS_BF16 if NF4 else INT4_QUADS_BF16
            return tl.inline_asm_elementwise(
                TEXT, QUAD_CONSTRAINTS, [words, upper], (tl.bfloat16,) * 4, is_pure=True, pack=2
            )
        else:
            TEXT: tl.constexpr = NF4_QUADS_FP16 if NF4 else INT4_QUADS_FP16
            return tl.inline_asm_elementwise(
                TEXT, QUAD_CONSTRAINTS, [words, upper], (tl.float16,) * 4, is_pure=True, pack=2
            )
