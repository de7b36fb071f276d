"""4-bit codes as kernels read them: 32-bit words, one a lane, decoded in registers.

A word holds eight codes: those of eight neighbouring elements (nf4), or of four and the four 16 places on (int4). A
tile of words has 32 columns, one a lane, and its rows go to warps and registers: so a code book spread over a warp
answers a look-up by one shuffle (``tl.gather``), a word's eight values stay in their thread, and a tile of values
leaves it as eight neighbours. Int4 codes become floats by their bits. ``packed_tile`` does the same for the order of
``packed_codes``. Launch with ``enable_fp_fusion=False``: a fused
multiply-add of nested scales, or of int4's scale and minimum, would round once, not twice.
"""

import triton
import triton.language as tl

from .packed_codes import ORDER_BITS

WORDS = 32  # words that a tile has a row: 256 weights


def aligned(tensor):
    """``tensor``, contiguous and on a boundary of 16 bytes, where its bytes can be read as wider integers."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@triton.jit
def _value(words, table, SHIFT: tl.constexpr, FORMAT: tl.constexpr):
    """The code at bit SHIFT of each word as float32: its place in the code book, or itself."""
    if FORMAT == "int4":
        # a mantissa with these bits is 2^23 + code: cheaper than a conversion, and exact
        value = (((words >> SHIFT) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    else:
        value = tl.gather(table, (words >> SHIFT) & 31, 1)
    return value


@triton.jit
def decode_words(words, table, FORMAT: tl.constexpr):
    """A word's eight codes as float32 in the order of their elements (int4: 0 to 3, then 16 to 19)."""
    if FORMAT == "int4":
        v0, v1 = _value(words, table, 0, FORMAT), _value(words, table, 8, FORMAT)
        v2, v3 = _value(words, table, 16, FORMAT), _value(words, table, 24, FORMAT)
        v4, v5 = _value(words, table, 4, FORMAT), _value(words, table, 12, FORMAT)
        v6, v7 = _value(words, table, 20, FORMAT), _value(words, table, 28, FORMAT)
    else:
        v0, v1 = _value(words, table, 4, FORMAT), _value(words, table, 0, FORMAT)
        v2, v3 = _value(words, table, 12, FORMAT), _value(words, table, 8, FORMAT)
        v4, v5 = _value(words, table, 20, FORMAT), _value(words, table, 16, FORMAT)
        v6, v7 = _value(words, table, 28, FORMAT), _value(words, table, 24, FORMAT)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def code_table(book, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr, PACKED: tl.constexpr = False):
    """The code book in registers, twice over: it then spans a warp, and bit 4 of an index does not matter."""
    table = 0
    if FORMAT != "int4":
        code = (tl.arange(0, 32) & 15)[None, :]
        if PACKED:
            code = ((tl.full(code.shape, ORDER_BITS, tl.int64) >> (4 * code)) & 15).to(tl.int32)
        table = tl.load(book + tl.zeros((BLOCK_N, 1), tl.int32) + code)
    return table


@triton.jit
def block_scale(scales, block, mask, first_block, FORMAT: tl.constexpr):
    """The float32 scale and minimum (nf4: 0) of each block."""
    scale, minimum = tl.load(scales[0] + block, mask=mask, other=0), 0.0
    if FORMAT == "int4":
        scale = scale.to(tl.float32)
        minimum = tl.load(scales[1] + block, mask=mask, other=0).to(tl.float32)
    elif FORMAT == "nested_nf4":
        group = tl.load(scales[2] + (block + first_block) // 256, mask=mask, other=0)
        scale = tl.load(scales[3] + scale.to(tl.int32)) * group + tl.load(scales[4])
    return scale, minimum


@triton.jit
def weight_tile(values, scale, minimum, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """The decoded codes (ROWS, WORDS) of ``decode_words`` as weights (ROWS, 8 * WORDS) of DTYPE."""
    v0, v1, v2, v3, v4, v5, v6, v7 = values
    v0, v1 = _weight(v0, scale, minimum, DTYPE, FORMAT), _weight(v1, scale, minimum, DTYPE, FORMAT)
    v2, v3 = _weight(v2, scale, minimum, DTYPE, FORMAT), _weight(v3, scale, minimum, DTYPE, FORMAT)
    v4, v5 = _weight(v4, scale, minimum, DTYPE, FORMAT), _weight(v5, scale, minimum, DTYPE, FORMAT)
    v6, v7 = _weight(v6, scale, minimum, DTYPE, FORMAT), _weight(v7, scale, minimum, DTYPE, FORMAT)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    tile = tl.join(even, tl.join(tl.join(v1, v5), tl.join(v3, v7)))
    ROWS: tl.constexpr = v0.shape[0]
    WORDS: tl.constexpr = v0.shape[1]
    if FORMAT == "int4":  # a word's second four stand 16 places after its first
        tile = tile.reshape(ROWS, WORDS // 4, 4, 2, 4).permute(0, 1, 3, 2, 4)
    return tile.reshape(ROWS, 8 * WORDS)


@triton.jit
def packed_tile(words, table, scales, block, mask, first_block, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """Packed words (ROWS, 32), two groups of 16 a row, as weights (ROWS, 256); ``block`` is each group's first."""
    PER_BLOCK: tl.constexpr = 2 if FORMAT == "int4" else 4
    v = ()
    for b in tl.static_range(8 // PER_BLOCK):
        scale, minimum = block_scale(scales, block + b, mask, first_block, FORMAT)
        for nibble in tl.static_range(b * PER_BLOCK, (b + 1) * PER_BLOCK):
            value = _value(words, table, 4 * nibble, FORMAT)
            v = v + (_weight(value, scale, minimum, DTYPE, FORMAT),)
    # nibble i of word 4 p + r in its group is element 32 (i // 2) + 8 p + 4 (i % 2) + r
    even = tl.join(tl.join(v[0], v[1]), tl.join(v[4], v[5]))
    tile = tl.join(even, tl.join(tl.join(v[2], v[3]), tl.join(v[6], v[7])))
    tile = tile.reshape(words.shape[0], 2, 4, 4, 2, 2, 2).permute(0, 1, 5, 6, 2, 4, 3)
    return tile.reshape(words.shape[0], 256)


@triton.jit
def _weight(value, scale, minimum, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    weight = value * scale
    if FORMAT == "int4":
        weight += minimum
    return weight.to(DTYPE)
