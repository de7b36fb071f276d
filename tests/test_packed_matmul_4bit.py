"""The packed prototype: the packing inverts, and what the interpreter runs of its kernel agrees with float64."""

import os

import packed_matmul_4bit as packed_matmul
import pytest
import torch
import torch.nn.functional as F
from nanogrpo.kernels import dequantize_4bit, quantize_4bit
from numerics import assert_no_worse_than

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
every_format = pytest.mark.parametrize(
    "format, double_quant", [("nf4", False), ("int4", False), ("nf4", True)]
)


@every_format
def test_packing_inverts(format, double_quant):
    codes = quantize_4bit(torch.randn(40, 640), format, double_quant=double_quant).codes
    packed = packed_matmul.pack(codes, format)
    assert not torch.equal(packed, codes)
    assert torch.equal(packed_matmul.unpack(packed, format), codes)


@every_format
@pytest.mark.skipif(not INTERPRET, reason="needs the interpreter")
@pytest.mark.parametrize(
    "M, config",
    [(5, (False, 4, 16, 8, 3, 1, 0)), (17, (True, 2, 16, 32, 3, 1, 0)), (1, (False, 2, 16, 16, 2, 9, 0))],
)
def test_product(format, double_quant, M, config):
    q = quantize_4bit(torch.randn(40, 640) / 640**0.5, format, double_quant=double_quant)
    codes, scales, _, first_block = q.operands()
    x, weight = torch.randn(M, 640).half(), dequantize_4bit(q, torch.float32)
    packed = packed_matmul.pack(codes, format)
    y = packed_matmul.fast_matmul(x, packed, scales, config, first_block=first_block, asm=False)
    plain = F.linear(x.float(), weight.half().float()).half()
    # the floor: one rounding of the result to float16
    assert_no_worse_than(y, plain, x.double() @ weight.double().T, floor=2.0**-11)
