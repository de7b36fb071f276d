"""dequantize_4bit and its peers: a whole weight to bfloat16 (float32 on the CPU), bit for bit."""

import cases
import measurement
import pytest
import torch
from comparison import Error, Peer, import_alone
from nanogrpo.kernels import QuantizedWeight, dequantize_4bit, quantize_4bit
from nanogrpo.kernels.quantization import dequantize_4bit_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Each adapter takes a QuantizedWeight and returns (tensors, call): call(*tensors) -> (N, K).


def ours():
    def load(q):
        names = list(q.tensors())

        def call(*tensors):
            return dequantize_4bit(
                QuantizedWeight.from_tensors(dict(zip(names, tensors, strict=True)), q.metadata)
            )

        return tuple(q.tensors().values()), call

    return load


def bitsandbytes():
    import bitsandbytes.functional as bnb

    def load(q):
        def call(codes, absmax, code_book):
            state = bnb.QuantState(
                absmax=absmax.view(-1),
                shape=q.shape,
                code=code_book,
                blocksize=64,
                quant_type="nf4",
                dtype=q.dtype,
            )
            return bnb.dequantize_4bit(codes.view(-1, 1), state)

        return (q.codes, q.scale, q.code_book), call

    return load


def unsloth():
    import_alone("unsloth_zoo.utils")  # Unsloth's kernels ask it for a version
    dequantize = import_alone("unsloth.kernels.nf4").dequantize_nf4

    def load(q):
        def call(codes, absmax, code_book):
            single = None, None, None  # its scales are not quantised themselves
            return dequantize(codes.view(-1, 1), absmax.view(-1), *single, code_book, 64, 0, q.shape, q.dtype)

        return (q.codes, q.scale, q.code_book), call

    return load


PEERS = {
    "nf4": [
        Peer("ours", None, ours),
        Peer("bitsandbytes", "bitsandbytes", bitsandbytes),
        Peer("Unsloth", "unsloth", unsloth, cuda_only=True),
    ]
}
PEERS["int4"] = PEERS["nf4"][:1]


@pytest.fixture(scope="module", params=cases.dequantize(DEVICE), ids=str)
def case(request):
    return request.param


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_dequantize(compare, case, format):
    N, K, dtype = case.shape["N"], case.shape["K"], getattr(torch, case.dtype)
    generator = torch.Generator(DEVICE).manual_seed(0)
    q = quantize_4bit(torch.randn(N, K, generator=generator, device=DEVICE).to(dtype), format)
    truth, source = dequantize_4bit_ref(q), torch.empty(N, K, dtype=dtype, device=DEVICE)
    target = torch.empty_like(source)

    def call(load):
        tensors, dequantize = load(q)
        copies = measurement.rotated(tensors, DEVICE)
        return [lambda tensors=tensors: dequantize(*tensors) for tensors in copies]

    compare(
        case, format, peers=PEERS[format], call=call, graph=DEVICE == "cuda", flops=0, nbytes=q.nbytes + truth.nbytes,
        verify=lambda got: {"bits that differ": Error(float((got != truth).sum()), 0.0)},
        floor=("copy of the values", lambda: target.copy_(source)),
    )  # fmt: skip
