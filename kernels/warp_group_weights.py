"""A warp group's share of W from packed 4-bit codes: 64 rows of a tile as the left operand of its products.

nf4 codes are looked up in pairs, in a table in shared memory: an entry for each byte of two codes, and a copy of the
table for each lane of a warp. Entry e of lane i is the word at 128 e + 4 i, in that lane's own bank, so that lanes
never wait for each other. Filling its 32 KiB takes as many accesses as looking up 16,384 weights; looking up takes 16
instructions for eight weights where the permutations of ``packed_codes`` take 23, for the same bits. int4 codes are
decoded as there. In Gluon, for ``hopper_matmul``.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .packed_codes import (
    INT4_QUADS_BF16,
    INT4_QUADS_FP16,
    QUAD_CONSTRAINTS,
    UNGAIN_BF16,
    UNGAIN_FP16,
    nf4_pair_assembly,
)

_TABLE = gl.constexpr("{ .shared .align 1024 .b8 nf4_pairs[32768]; mov.u32 $0, nf4_pairs; }")
_STORE = gl.constexpr("st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.u32 $0, 0;")
_OF_LANE = gl.constexpr("{ .reg .b32 l; mov.u32 l, %laneid; mad.lo.u32 $0, l, 4, $1; }")
_PAIR_BF16, _PAIR_FP16 = (gl.constexpr(nf4_pair_assembly(dtype)) for dtype in (torch.bfloat16, torch.float16))
# $4, $5, 4 u in $6 and the lane's table in $8 to four pairs: pair i holds the values of nibble 2 i + u of both.
_LOOK_UP = gl.constexpr(
    "{ .reg .b32 p, q, b; shr.u32 p, $4, $6; sub.u32 b, 4, $6; shl.b32 q, $5, b; lop3.b32 p, p, q, 0x0F0F0F0F, 0xE4;"
    + "".join(
        f" prmt.b32 b, p, 0, 0x444{i}; mad.lo.u32 b, b, 128, $8; ld.shared.b32 ${i}, [b];" for i in range(4)
    )
    + " }"
)
_LOOK_UP_CONSTRAINTS = gl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r,r")
# Two values at once, as ``tiled_matmul`` scales them: by 16 bits of the scale, with one rounding.
_SCALE = gl.constexpr("{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 $0, $1, $2, t; }")

# A tile's words (64 rows, u, 16), of which a lane holds what it decodes: rows g and g + 8 of its warp's sixteen,
# words 4 s + 2 v + l, nibbles of u. Both lanes u read the same words.
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 4], [0, 0, 8], [8, 0, 0]],
        lane_bases=[[0, 0, 2], [0, 1, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, 2, 16],
    )
)
ROWS = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, WORDS.value)))
U = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(2, WORDS.value)))


@gluon.jit
def fill_table(DTYPE: gl.constexpr):
    """By four warps: a program's table of pairs of DTYPE; its address in shared memory."""
    PAIR: gl.constexpr = _PAIR_BF16 if DTYPE == gl.bfloat16 else _PAIR_FP16
    base = gl.inline_asm_elementwise(_TABLE, "=r", [], gl.int32, is_pure=False, pack=1)
    lane = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    for first in gl.static_range(0, 256, 128):
        entry = first + lane
        pair = gl.inline_asm_elementwise(PAIR, "=&r,r", [entry], gl.int32, is_pure=True, pack=1)
        for turn in gl.static_range(8):
            # sixteen bytes at a time; neighbouring lanes begin at different banks
            at = base + entry * 128 + (entry + turn) % 8 * 16
            gl.inline_asm_elementwise(_STORE, "=r,r,r", [at, pair], gl.int32, is_pure=False, pack=1)
    return base


@gluon.jit
def lane_table(table):
    """The lane's own copy of a table that ``fill_table`` returned."""
    return gl.inline_asm_elementwise(_OF_LANE, "=r,r", [table], gl.int32, is_pure=False, pack=1)


@gluon.jit
def decoded(words, upper, table, FORMAT: gl.constexpr, DTYPE: gl.constexpr):
    """Four tensors like words, of nibbles 2 i + upper / 4, i = 0 to 3; two neighbours share upper, 0 or 4."""
    if FORMAT == "int4":
        TEXT: gl.constexpr = INT4_QUADS_BF16 if DTYPE == gl.bfloat16 else INT4_QUADS_FP16
        CONSTRAINTS: gl.constexpr = QUAD_CONSTRAINTS
        operands = [words, upper]
    else:
        TEXT: gl.constexpr = _LOOK_UP
        CONSTRAINTS: gl.constexpr = _LOOK_UP_CONSTRAINTS
        operands = [words, upper, table]
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            TEXT, CONSTRAINTS, operands, (gl.bfloat16,) * 4, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(TEXT, CONSTRAINTS, operands, (gl.float16,) * 4, is_pure=True, pack=2)


@gluon.jit
def _half_float(bits, SHIFT: gl.constexpr):
    return (bits >> SHIFT).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _like(values, wide):
    """values (64,) repeated along a tensor (64, u, 16)."""
    values, _ = gl.broadcast(values.expand_dims(1).expand_dims(2), wide)
    return values


@gluon.jit
def _scaled(value, scales, raw, raw_minimum, block, NUMBER: gl.constexpr, FORMAT: gl.constexpr):
    """Decoded codes of block NUMBER of a tile as weights."""
    DTYPE: gl.constexpr = value.dtype
    if FORMAT == "int4":
        scale = _half_float(raw, 16 * NUMBER)
        minimum = _half_float(raw_minimum, 16 * NUMBER) - 16 * scale
        return (value.to(gl.float32) * _like(scale, value) + _like(minimum, value)).to(DTYPE)
    else:
        UNGAIN: gl.constexpr = UNGAIN_BF16 if DTYPE == gl.bfloat16 else UNGAIN_FP16
        if FORMAT == "nf4":
            scale = (raw >> (32 * NUMBER)).to(gl.int32).to(gl.float32, bitcast=True) * UNGAIN
        else:
            group = gl.load(scales[2] + (block + NUMBER) // 256)
            code = ((raw >> (8 * NUMBER)) & 255).to(gl.int32)
            scale = (gl.load(scales[3] + code) * group + gl.load(scales[4])) * UNGAIN
        if DTYPE == gl.bfloat16:
            high = scale.to(gl.bfloat16)
            low = (scale - high.to(gl.float32)).to(gl.bfloat16)
            operands = [value, _like(high, value), _like(low, value)]
            return gl.inline_asm_elementwise(_SCALE, "=r,r,r,r", operands, gl.bfloat16, is_pure=True, pack=2)
        else:
            return (value.to(gl.float32) * _like(scale, value)).to(DTYPE)


@gluon.jit
def operand(
    first, second, scales, raw, raw_minimum, block, HALF: gl.constexpr, FORMAT: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Two of ``decoded``'s tensors as weights: the left operand (64, 64) of a product, in the same registers.

    They are half HALF of a tile, whose first scale is number ``block``, whose scales as integers are raw and
    raw_minimum.
    """
    NUMBER: gl.constexpr = 2 * HALF if FORMAT == "int4" else HALF
    SECOND: gl.constexpr = NUMBER + 1 if FORMAT == "int4" else HALF
    first = _scaled(first, scales, raw, raw_minimum, block, NUMBER, FORMAT)
    second = _scaled(second, scales, raw, raw_minimum, block, SECOND, FORMAT)
    # (n, u, s, v, l, run) to columns 32 run + 8 s + 4 u + 2 v + l
    runs = gl.join(first, second).reshape([64, 2, 4, 2, 2, 2]).permute(0, 5, 2, 1, 3, 4)
    return gl.convert_layout(runs.reshape([64, 64]), LAYOUT, assert_trivial=True)
