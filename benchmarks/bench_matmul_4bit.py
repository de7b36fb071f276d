"""matmul_4bit and its peers on one frozen linear, forward: CUDA graphs over weights rotated past the L2 cache.

NF4 beside bitsandbytes, int4 (affine, blocks of 32) beside others of the same form, each with its own quantisation of
the same weight; cuBLAS multiplies by the dense weight, four times the bytes.
"""

from pathlib import Path

import cases
import measurement
import pytest
import torch
import torch.nn.functional as F
from comparison import Error, Peer, import_alone
from nanogrpo.kernels import QuantizedWeight, dequantize_4bit, matmul_4bit, quantize_4bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Plainly wrong: off by more than this times (1 + max |truth|), where outputs are of order 1.
LIMITS = {"bfloat16": 2.0**-5, "float32": 1e-4}
INT4_ROWS = 1, 8, 64, 256, 2048  # the other regimes' borders are NF4's
# tinygemm reads the weight once for every few rows; GemLite's tuning takes seconds for each size.
MOST_ROWS = {"Unsloth GEMV": 1, "tinygemm": 256, "torchao": 64, "GemLite": 64}
TUNING = Path(__file__).parent / "gemlite_tuning.json"


# Each adapter packs a dense weight (N, K) and returns (tensors, call): call(x, *tensors) -> (M, N) on copies of them.


def ours(format, packed):
    def load(weight):
        q = quantize_4bit(weight, format)
        q = q.packed() if packed and q.can_be_packed else q
        names = list(q.tensors())

        def call(x, *tensors):
            return matmul_4bit(
                x, QuantizedWeight.from_tensors(dict(zip(names, tensors, strict=True)), q.metadata)
            )

        return tuple(q.tensors().values()), call

    return lambda: load


def dense():
    return lambda weight: ((weight,), F.linear)


def bitsandbytes():
    import bitsandbytes.functional as bnb

    def load(weight):
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")

        def call(x, packed, absmax):
            import bitsandbytes

            moved = bnb.QuantState(
                absmax=absmax,
                shape=state.shape,
                code=state.code,
                blocksize=64,
                quant_type="nf4",
                dtype=state.dtype,
            )
            return bitsandbytes.matmul_4bit(x, packed.t(), quant_state=moved)

        return (packed, state.absmax), call

    return load


def unsloth():
    """Its product of a weight and one row, which on this kind of card it takes for one row alone."""
    import_alone("unsloth_zoo.utils")  # Unsloth's kernels ask it for a version
    gemv = import_alone("unsloth.kernels.nf4_gemv").gemv_nf4

    def load(weight):
        q = quantize_4bit(weight, "nf4")

        def call(x, codes, absmax, code_book):
            single = None, None, None  # its scales are not quantised themselves
            return gemv(
                x[None], codes.view(-1, 1), absmax.view(-1), *single, code_book, 64, 0, weight.shape, x.dtype
            )[0]

        return (q.codes, q.scale, q.code_book), call

    return load


def affine_codes(weight, dtype):
    """Codes (N, K) of ``dtype``, and scales and least values (N, K / 32, 1), of affine groups of 32."""
    N, K = weight.shape
    groups = weight.float().view(N, K // 32, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-9)
    return ((groups - low) / scale).round().clamp(0, 15).to(dtype).view(N, K), scale, low


def tinygemm():
    """torch's own int4 kernel: groups of 32 with scale and zero, codes of 16 places on an affine grid."""

    def load(weight):
        codes, scale, low = affine_codes(weight, torch.int32)
        packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
        zero = low + 8 * scale
        table = torch.cat((scale, zero), -1).to(weight.dtype).transpose(0, 1).contiguous()
        return (packed, table), lambda x, packed, table: torch._weight_int4pack_mm(x, packed, 32, table)

    return load


def torchao():
    """Its int4 linear, groups of 32, in the layout of tinygemm."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    def load(weight):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], False, weight.device, weight.dtype)
        linear.weight.data = weight
        quantize_(linear, Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"))
        # ``rotated`` copies what a quantised tensor is made of, and a call puts it together again.
        names, context = linear.weight.__tensor_flatten__()
        tensors, kind = [getattr(linear.weight, name) for name in names], type(linear.weight)

        def call(x, *tensors):
            whole = kind.__tensor_unflatten__(dict(zip(names, tensors, strict=True)), context, None, None)
            return F.linear(x, whole)

        return tuple(tensors), call

    return load


def gemlite():
    """Groups of 32 with scale and zero, tuned by its own autotuner, whose choice for these sizes is kept."""
    from gemlite import DType, GemLiteLinear, forward_functional, load_config

    if TUNING.exists():
        load_config(str(TUNING))

    def load(weight):
        N, K = weight.shape
        codes, scale, low = affine_codes(weight, torch.uint8)
        linear = GemLiteLinear(4, 32, K, N, input_dtype=DType.BF16, output_dtype=DType.BF16)
        linear.pack(
            codes, scale.to(weight.dtype).view(N, -1), (-low / scale).to(weight.dtype).view(N, -1), None
        )
        settings = linear.get_meta_args()
        return tuple(linear.get_tensor_args()), lambda x, *tensors: forward_functional(
            x, None, list(tensors), settings
        )

    return load


def peers(format, rows):
    common = [
        Peer("ours", None, ours(format, DEVICE == "cuda")),
        Peer("ours, codes as in files", None, ours(format, False), cuda_only=True),
        Peer("cuBLAS" if DEVICE == "cuda" else "BLAS", None, dense),
    ]
    theirs = {
        "nf4": [
            Peer("bitsandbytes", "bitsandbytes", bitsandbytes, cuda_only=True),
            Peer("Unsloth GEMV", "unsloth", unsloth, cuda_only=True),
        ],
        "int4": [
            Peer("tinygemm", "torch", tinygemm, cuda_only=True),
            Peer("torchao", "torchao", torchao, cuda_only=True),
            Peer("GemLite", "gemlite", gemlite, cuda_only=True),
        ],
    }
    return common + [peer for peer in theirs[format] if rows <= MOST_ROWS.get(peer.name, rows)]


class Problem:
    """A weight of variance 1/K on the grid of its format, so that every contender is near the same truth."""

    def __init__(self, case, format):
        shape, dtype = case.shape, getattr(torch, case.dtype)
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator, device=DEVICE)
        self.x = draw(shape["M"], shape["K"]).to(dtype)
        self.weight = (draw(shape["N"], shape["K"]) / shape["K"] ** 0.5).to(dtype)
        self.packed = dequantize_4bit(quantize_4bit(self.weight, format), dtype)
        self.rows = torch.linspace(0, shape["M"] - 1, min(shape["M"], 32), device=DEVICE).long()
        self.truth = self.x[self.rows].double() @ self.packed.double().T


@pytest.fixture(scope="module", params=cases.matmul_4bit(DEVICE), ids=str)
def case(request):
    return request.param


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_matmul_4bit(compare, case, format):
    M, K, N = case.shape["M"], case.shape["K"], case.shape["N"]
    if DEVICE == "cuda" and format == "int4" and M not in INT4_ROWS:
        pytest.skip("int4 is measured at fewer sizes")
    problem = Problem(case, format)

    def call(load):
        tensors, matmul = load(problem.packed)
        # Many rows push each other's weights out of the cache: there one copy is enough.
        copies = [tensors] if M >= 2048 else measurement.rotated(tensors, DEVICE)
        return [lambda tensors=tensors: matmul(problem.x, *tensors) for tensors in copies]

    def verify(got):
        error = (got[problem.rows] - problem.truth).abs().max() + 0 * got.float().sum()
        limit = LIMITS[case.dtype] * (1 + problem.truth.abs().max().item())
        # a second quantisation of values already on nf4's grid is exact; int4's moves them by a part of a step
        return {"error": Error(error.item(), limit if format == "nf4" else 4 * limit)}

    scales = 4 * N * K // 64 if format == "nf4" else 4 * N * K // 32
    compare(
        case, format, peers=peers(format, M), call=call, verify=verify, graph=DEVICE == "cuda",
        flops=2 * M * N * K, nbytes=N * K // 2 + scales + problem.x.element_size() * M * (N + K),
    )  # fmt: skip
