"""A language model's output head (V, D), dense or 4-bit, as operators take it and as kernels read it: row by row."""

from dataclasses import replace

import torch

from .quantization import dequantize_4bit
from .quantized_weight import NESTED_BLOCK, QuantizedWeight

# The tensors beside the codes by the dtype of the first, in the order of ``QuantizedWeight.operands``.
FIELDS = {
    torch.float16: ("int4", ("scale", "minimum")),
    torch.float32: ("nf4", ("scale", "code_book")),
    torch.uint8: ("nf4", ("scale", "code_book", "nested_scale", "nested_code", "nested_offset")),
}


def operands(head):
    """Arguments of a registered operator for a dense weight or a ``QuantizedWeight``; ``from_operands`` inverts."""
    return (head, [], 0, 0) if isinstance(head, torch.Tensor) else head.operands()


def from_operands(weight, scales, quant_block, first_block):
    if not scales:
        return weight
    format, names = FIELDS[scales[0].dtype]
    per_element = 8 if weight.dtype == torch.int32 else 2  # packed codes are words
    return QuantizedWeight(
        codes=weight, shape=(weight.shape[0], per_element * weight.shape[1]), format=format, quant_block=quant_block,
        dtype=torch.float32, first_block=first_block, **dict(zip(names, scales, strict=True)),
    )  # fmt: skip


def rows(head, part, dtype):
    """Rows ``part`` (a slice): a view of a dense head, or a 4-bit one's rows in ``dtype``."""
    if isinstance(head, torch.Tensor):
        return head[part]
    return dequantize_4bit(head.rows(part.start, part.stop), dtype)


def gather(head, index, dtype):
    """Rows ``index`` (int64) in ``dtype``, copied."""
    if isinstance(head, torch.Tensor):
        return head.index_select(0, index).to(dtype)
    if head.nested_scale is None:
        return dequantize_4bit(head.index_rows(index), dtype)
    # Nested scales belong to neighbouring rows: decode those of the rows asked for and no others.
    blocks = head.shape[1] // head.quant_block
    block = index[:, None] * blocks + torch.arange(blocks, device=index.device) + head.first_block
    scale = head.nested_code[head.scale[index].int()] * head.nested_scale[block // NESTED_BLOCK]
    part = replace(
        head, codes=head.codes[index], scale=scale + head.nested_offset, shape=(len(index), head.shape[1]),
        nested_scale=None, nested_code=None, nested_offset=None, first_block=0,
    )  # fmt: skip
    return dequantize_4bit(part, dtype)
