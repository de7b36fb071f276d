"""The container of a frozen 4-bit weight: its tensors, its views, and the two file formats it comes from.

A weight (N, K) is cut along K into blocks of ``quant_block`` values, two 4-bit codes a byte:

    nf4    w = code_book[code] * absmax         blocks of 64, float32 absmax      4.5 bits a weight
           absmax = nested_code[c] * nested_scale + nested_offset (double quant)  4.127 bits a weight
    int4   w = scale * code + minimum           blocks of 32, both float16        5 bits a weight

The nibbles keep the order of bitsandbytes (nf4) and GGUF's Q4_1 (int4), so that loading copies bytes: nf4 byte j
holds element 2j in its high nibble and 2j+1 in its low one; int4 byte j of a block of 16 bytes holds element j in its
low nibble and j+16 in its high one. ``packed`` gives the same weight with its codes in the order that tensor cores
take, words of eight codes, bit by bit in ``packed_codes``; ``unpacked`` inverts it.
"""

import json
from dataclasses import dataclass, fields, replace

import torch

from . import _runtime
from .packed_codes import NF4_CODE, TILE, pack, unpack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NF4_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
INT4_BLOCK = 32
PACKED_BLOCK = {"nf4": 64, "int4": 32}  # blocks that packed codes may have
NESTED_BLOCK = 256  # scales that share one nested scale
_CODE_BOOK = torch.tensor(NF4_CODE).tolist()  # rounded to float32, as tensors hold it


@dataclass(eq=False)
class QuantizedWeight:
    """A frozen 4-bit weight of ``shape`` (N, K). Made by ``quantize_4bit`` or by a ``from_...`` constructor.

    Attributes:
        codes: (N, K/2) uint8, two codes a byte; or packed, (N, K/8) int32.
        scale: (N, K/quant_block): nf4 absmax float32, or uint8 under double quant; int4 step float16.
        shape: (N, K).
        format: "nf4" or "int4".
        quant_block: weights that share one scale.
        dtype: what ``dequantize_4bit`` returns unless told otherwise.
        minimum: (N, K/quant_block) float16, int4 only.
        code_book: (16,) float32, nf4 only.
        nested_scale, nested_code, nested_offset: double quant only; float32 of shapes (ceil((first_block +
            N*K/quant_block)/256),), (256,) and ().
        first_block: where this weight's first block stands in its nested block; nonzero only after ``rows``.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]
    format: str
    quant_block: int
    dtype: torch.dtype
    minimum: torch.Tensor | None = None
    code_book: torch.Tensor | None = None
    nested_scale: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None
    first_block: int = 0

    def __post_init__(self):
        self.shape = tuple(self.shape)
        check_layout(self.shape, self.format, self.quant_block)
        N, K = self.shape
        _runtime.check(self.dtype in DTYPES, f"dtype is {self.dtype}, expected one of {DTYPES}")
        blocks, nested = K // self.quant_block, self.nested_scale is not None
        groups = -(-(self.first_block + N * blocks) // NESTED_BLOCK)
        layout = {"codes": ((N, K // 8), torch.int32) if self.is_packed else ((N, K // 2), torch.uint8)}
        _runtime.check(not self.is_packed or self._fits_tiles, f"packed codes: {self._why_not_packed()}")
        if self.format == "int4":
            layout |= {"scale": ((N, blocks), torch.float16), "minimum": ((N, blocks), torch.float16)}
        else:
            absmax = torch.uint8 if nested else torch.float32
            layout |= {"scale": ((N, blocks), absmax), "code_book": ((16,), torch.float32)}
        if nested:
            shapes = {"nested_scale": (groups,), "nested_code": (256,), "nested_offset": ()}
            layout |= {name: (shape, torch.float32) for name, shape in shapes.items()}
        tensors = self.tensors()
        same = tensors.keys() == layout.keys()
        _runtime.check(same, f"{self.format} weight of {sorted(tensors)}, expected {sorted(layout)}")
        for name, expected in layout.items():
            got = tensors[name]
            _runtime.check(
                (tuple(got.shape), got.dtype) == expected
                and got.is_contiguous()
                and got.device == self.device,
                f"{name} is {tuple(got.shape)} {got.dtype} on {got.device} with strides {got.stride()}, "
                f"expected contiguous {expected} on {self.device}",
            )

    @property
    def device(self):
        return self.codes.device

    @property
    def is_packed(self):
        """Whether the codes are in ``packed_codes``' order rather than that of files."""
        return self.codes.dtype == torch.int32

    @property
    def _fits_tiles(self):
        return self.shape[1] % TILE == 0 and self.quant_block == PACKED_BLOCK[self.format]

    @property
    def can_be_packed(self):
        """Whether ``packed`` is possible: K a multiple of 128, int4 or nf4 in blocks of 64 of NF4's own code book.

        Reads the code book, so it waits for the device.
        """
        return self._fits_tiles and (self.code_book is None or self.code_book.tolist() == _CODE_BOOK)

    def _why_not_packed(self):
        block = PACKED_BLOCK[self.format]
        return (
            f"{self.format} weight {self.shape} in blocks of {self.quant_block}, "
            f"expected K a multiple of {TILE} in blocks of {block}"
        )

    def packed(self):
        """This weight with codes copied to the order of ``packed_codes``; itself where they are in it already.

        Raises ValueError unless ``can_be_packed``.
        """
        if self.is_packed:
            return self
        _runtime.check(self._fits_tiles, self._why_not_packed())
        if self.code_book is not None:
            book = self.code_book.tolist()
            _runtime.check(book == _CODE_BOOK, f"the code book is {book}, expected {_CODE_BOOK}")
        return replace(self, codes=pack(self.codes, self.format))

    def unpacked(self):
        """This weight with codes in the order of files, the inverse of ``packed``."""
        return replace(self, codes=unpack(self.codes, self.format)) if self.is_packed else self

    @property
    def nbytes(self):
        """Bytes of all tensors: what the weight occupies."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def metadata(self):
        """What ``tensors`` leaves out, as strings (safetensors metadata); ``from_tensors`` reads it."""
        numbers = {"quant_block": self.quant_block, "shape": self.shape, "first_block": self.first_block}
        names = {"format": self.format, "dtype": str(self.dtype).removeprefix("torch.")}
        return names | {name: json.dumps(number) for name, number in numbers.items()}

    def tensors(self):
        """The tensors by field name, without those that the format does not have."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def operands(self):
        """Positional arguments of a registered operator that reads this weight: ``codes, scales, quant_block,
        first_block``, where ``scales`` lists the tensors beside the codes, in the order of ``block_scale``."""
        names = ("scale", "minimum", "code_book", "nested_scale", "nested_code", "nested_offset")
        scales = [getattr(self, name) for name in names if getattr(self, name) is not None]
        return self.codes, scales, self.quant_block, self.first_block

    def absmax(self):
        """The nf4 scale of each block, (N, K/quant_block) float32."""
        _, scales, _, first_block = self.operands()
        return decode_absmax(scales, first_block)

    def to(self, device):
        """This weight with every tensor on ``device``."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def rows(self, start, stop):
        """Rows ``start`` to ``stop`` (0 <= start <= stop <= N) as a weight that shares this one's storage."""
        N, K = self.shape
        _runtime.check(0 <= start <= stop <= N, f"rows {start}:{stop} of a weight with {N} rows")
        part = {"codes": self.codes[start:stop], "scale": self.scale[start:stop], "shape": (stop - start, K)}
        if self.minimum is not None:
            part["minimum"] = self.minimum[start:stop]
        if self.nested_scale is not None:
            blocks = K // self.quant_block
            first, last = self.first_block + start * blocks, self.first_block + stop * blocks
            group, part["first_block"] = divmod(first, NESTED_BLOCK)
            groups = -(-(part["first_block"] + last - first) // NESTED_BLOCK)
            part["nested_scale"] = self.nested_scale[group : group + groups]
        return replace(self, **part)

    def index_rows(self, index):
        """Rows ``index`` (int64, one dimension), copied: a permutation of outputs.

        Nested scales belong to neighbouring rows, so a double-quantised weight comes back with its absmax in
        float32: equal values, more bytes.
        """
        _runtime.check(
            index.ndim == 1 and index.dtype == torch.int64,
            f"index is {index.dtype} {tuple(index.shape)}, expected one dimension of int64",
        )
        part = {"codes": self.codes[index], "shape": (len(index), self.shape[1])}
        if self.nested_scale is None:
            part["scale"] = self.scale[index]
            part["minimum"] = None if self.minimum is None else self.minimum[index]
        else:
            part["scale"] = self.absmax()[index]
            part |= {"nested_scale": None, "nested_code": None, "nested_offset": None, "first_block": 0}
        return replace(self, **part)

    @classmethod
    def from_tensors(cls, tensors, metadata):
        """The inverse of ``tensors`` and ``metadata``; raises ValueError where something is missing."""
        expected = {"format", "quant_block", "shape", "dtype", "first_block"}
        missing = expected - set(metadata)
        _runtime.check(not missing, f"metadata has {sorted(metadata)}, expected {sorted(missing)} too")
        dtype = getattr(torch, metadata["dtype"], None)
        numbers = {name: json.loads(metadata[name]) for name in ("quant_block", "shape", "first_block")}
        return cls(**tensors, **numbers, format=metadata["format"], dtype=dtype)

    @classmethod
    def from_bitsandbytes(cls, state_dict, prefix):
        """The nf4 weight that bitsandbytes saved in ``state_dict`` under ``prefix``, a linear layer's name.

        Reads ``prefix.weight`` and, below it, ``absmax``, ``quant_map``, ``quant_state.bitsandbytes__nf4`` and,
        after double quantisation, ``nested_absmax`` and ``nested_quant_map``. Raises ValueError for a missing
        entry and for a layout that is not nf4.
        """
        name = _weight_name(prefix)

        def entry(key, count=None):
            _runtime.check(
                key in state_dict, f"state_dict has no {key!r}, a part of a bitsandbytes nf4 weight"
            )
            tensor = state_dict[key].contiguous()
            tensor = tensor.view(torch.uint8) if key == name else tensor  # quant_storage may be any dtype
            got = tensor.numel()
            _runtime.check(count in (None, got), f"{key} has {got} elements, expected {count}")
            return tensor

        state = json.loads(bytes(entry(f"{name}.quant_state.bitsandbytes__nf4").tolist()))
        shape, block, nested = tuple(state["shape"]), state["blocksize"], "nested_offset" in state
        check_layout(shape, "nf4", block)
        N, blocks = shape[0], shape[1] // block
        scale = entry(f"{name}.absmax", N * blocks).view(N, blocks)
        weight = {
            "codes": entry(name, N * shape[1] // 2).view(N, -1),
            "scale": scale if nested else scale.float(),
            "code_book": entry(f"{name}.quant_map").float(),
        }
        if nested:
            got = state["nested_blocksize"]
            _runtime.check(got == NESTED_BLOCK, f"nested_blocksize is {got}, expected {NESTED_BLOCK}")
            weight["nested_scale"] = entry(f"{name}.nested_absmax").float()
            weight["nested_code"] = entry(f"{name}.nested_quant_map").float()
            weight["nested_offset"] = torch.tensor(float(state["nested_offset"]), device=scale.device)
        dtype = getattr(torch, state["dtype"])
        return cls(**weight, shape=shape, format="nf4", quant_block=block, dtype=dtype)

    def to_bitsandbytes(self, prefix):
        """What bitsandbytes saves for this nf4 weight of the linear layer ``prefix``; ``from_bitsandbytes`` inverts.

        Raises ValueError for int4, and for rows cut out of a double-quantised weight within a nested block.
        """
        _runtime.check(self.format == "nf4", f"format is {self.format!r}, bitsandbytes holds 'nf4'")
        _runtime.check(
            self.first_block == 0, f"rows that begin {self.first_block} scales into a nested block"
        )
        codes = self.unpacked().codes
        name = _weight_name(prefix)
        dtype = str(self.dtype).removeprefix("torch.")
        state = {
            "quant_type": "nf4",
            "blocksize": self.quant_block,
            "dtype": dtype,
            "shape": list(self.shape),
        }
        entries = {"absmax": self.scale.reshape(-1), "quant_map": self.code_book}
        if self.nested_scale is not None:
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
            state["nested_offset"] = self.nested_offset.item()
            entries |= {"nested_absmax": self.nested_scale, "nested_quant_map": self.nested_code}
        packed = list(json.dumps(state).encode())
        entries["quant_state.bitsandbytes__nf4"] = torch.tensor(packed, dtype=torch.uint8, device=self.device)
        saved = {f"{name}.{key}": tensor for key, tensor in entries.items()}
        return {name: codes.reshape(-1, 1)} | saved

    @classmethod
    def from_gguf_q4_1(cls, raw, shape, dtype=torch.float32):
        """The int4 weight of ``shape`` (N, K) in GGUF's Q4_1 blocks: ``raw`` uint8 of N*K/32 times 20 bytes.

        A block is a float16 scale, a float16 minimum and 16 bytes of codes, as the gguf package reads them.
        """
        check_layout(tuple(shape), "int4", INT4_BLOCK)
        N, K = shape
        size, got = N * K // INT4_BLOCK * 20, (raw.dtype, raw.numel())
        _runtime.check(
            got == (torch.uint8, size), f"raw is {got}, expected {(torch.uint8, size)} for {(N, K)}"
        )
        raw = raw.reshape(N, K // INT4_BLOCK, 20)
        scale, minimum = raw[..., :4].contiguous().view(torch.float16).unbind(-1)
        return cls(
            codes=raw[..., 4:].reshape(N, K // 2).contiguous(),
            scale=scale.contiguous(),
            minimum=minimum.contiguous(),
            shape=shape,
            format="int4",
            quant_block=INT4_BLOCK,
            dtype=dtype,
        )


def _weight_name(prefix):
    return prefix if prefix.endswith("weight") else f"{prefix.rstrip('.')}.weight".removeprefix(".")


def check_layout(shape, format, block, name="weight"):
    """Raise ValueError unless ``format`` can hold ``name``, a weight of ``shape``, in blocks of ``block``."""
    blocks = {"nf4": NF4_BLOCKS, "int4": (INT4_BLOCK,)}
    _runtime.check(format in blocks, f"format is {format!r}, expected 'nf4' or 'int4'")
    _runtime.check(block in blocks[format], f"{format} block of {block}, expected one of {blocks[format]}")
    _runtime.check(
        len(shape) == 2 and shape[1] > 0 and shape[1] % block == 0,
        f"{name} has shape {shape}, expected (N, K) with K a multiple of the block of {block}",
    )


def decode_absmax(scales, first_block):
    """The nf4 scale of each block from ``QuantizedWeight.operands``: (N, K/quant_block) float32."""
    if len(scales) == 2:
        return scales[0]
    scale, _, nested_scale, nested_code, nested_offset = scales
    group = (torch.arange(scale.numel(), device=scale.device) + first_block) // NESTED_BLOCK
    return (nested_code[scale.flatten().int()] * nested_scale[group] + nested_offset).view_as(scale)
