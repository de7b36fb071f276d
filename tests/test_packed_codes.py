"""The packed order: bit by bit as documented, invertible; and its assembly, instruction by instruction."""

import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import packed_codes
from nanogrpo.kernels.packed_codes import GAIN, NF4_CODE, ORDER, pack, unpack

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.bfloat16, torch.float16]


def codes_of(elements, format):
    """Bytes in the order of files from codes (N, K) of elements."""
    if format == "nf4":
        return elements[:, ::2] << 4 | elements[:, 1::2]
    blocks = elements.unflatten(1, (-1, 2, 16))
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).flatten(1)


@pytest.mark.parametrize("format", ["nf4", "int4"])
@given(N=st.integers(0, 9), tiles=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_code_stands_where_documented(format, N, tiles, seed):
    elements = torch.randint(16, (N, 128 * tiles), generator=torch.Generator().manual_seed(seed)).byte()
    codes = codes_of(elements, format)
    words = pack(codes, format)
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (N, 16 * tiles))
    t, j, i = (n.flatten() for n in torch.meshgrid(*map(torch.arange, (tiles, 16, 8)), indexing="ij"))
    stored = (words.long()[:, 16 * t + j] >> 4 * i) & 15
    expected = elements[:, 128 * t + 32 * (i // 2) + 8 * (j // 4) + 4 * (i % 2) + j % 4].long()
    old = torch.tensor(ORDER)[stored] if format == "nf4" else stored
    assert torch.equal(old, expected)
    assert torch.equal(unpack(words, format), codes)


def test_order_is_a_permutation_whose_halves_pair():
    assert sorted(ORDER) == list(range(16))
    for dtype in DTYPES:
        value = (torch.tensor(NF4_CODE).double() * GAIN[dtype]).to(dtype)
        value[7] = -0.0
        bits = value.view(torch.int16).int()[list(ORDER)]
        assert torch.equal(bits[:8] & 0x8080, bits[8:] & 0x8080)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.0019), (torch.float16, 0.00032)])
def test_gain_keeps_the_stated_error(dtype, error):
    book = torch.tensor(NF4_CODE).double()
    rounded = (book * GAIN[dtype]).to(dtype).double() / GAIN[dtype]
    assert ((rounded - book).abs() <= error * book.abs()).all()


def run(assembly, first, second, upper=0):
    """What four registers hold after ``assembly``: enough of PTX, on unsigned 32-bit integers."""
    register = {
        "$4": first,
        "$5": second,
        "$6": upper,
        "%lanemask_lt": 0b0111,
        "%lanemask_gt": ~0b1111 & 0xFFFFFFFF,
    }
    value = lambda name: register[name] if name in register else int(name, 0)

    def prmt(a, b, selector):
        table, byte = (a | b << 32).to_bytes(8, "little"), 0
        for i in range(4):
            choice = selector >> 4 * i & 15
            picked = table[choice & 7]
            byte |= ((255 if picked & 128 else 0) if choice & 8 else picked) << 8 * i
        return byte

    operations = {
        "prmt.b32": prmt,
        "mov.u32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "xor.b32": lambda a, b: a ^ b,
        "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
        "sub.u32": lambda a, b: a - b & 0xFFFFFFFF,
        "shr.u32": lambda a, b: a >> b,
        "lop3.b32": lambda a, b, c, table: {0xEA: a & b | c, 0xE4: a & c | b & ~c}[table],
    }
    for line in re.sub(r"\.reg[^;]*;", "", assembly.strip("{} ")).split(";"):
        if line.strip():
            name, *operands = line.replace(",", " ").split()
            register[operands[0]] = operations[name](*map(value, operands[1:]))
    return [register[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_assembly_decodes_every_pair_of_codes(format, dtype, part, halves):
    """Nibbles 4 part + i, or 2 i + part, of two words."""
    if halves:
        assembly = {"nf4": packed_codes._nf4_halves, "int4": packed_codes._int4_halves}[format](dtype, part)
    else:
        assembly = {"nf4": packed_codes._nf4_quads, "int4": packed_codes._int4_quads}[format](dtype)
    book = (torch.tensor(NF4_CODE).double() * GAIN[dtype]).to(dtype)[list(ORDER)]
    table = book if format == "nf4" else torch.arange(16, 32).to(dtype)
    generator = torch.Generator().manual_seed(part)
    for _ in range(64):
        a, b = torch.randint(2**32, (2,), generator=generator).tolist()
        values = torch.tensor(run(assembly, a, b, 4 * part))
        pairs = values.to(torch.uint32).view(torch.uint16).view(dtype).view(4, 2)
        places = [4 * part + i if halves else 2 * i + part for i in range(4)]
        nibbles = torch.tensor([[w >> 4 * place & 15 for w in (a, b)] for place in places])
        assert torch.equal(pairs, table[nibbles])
