"""The linears of a layer as a decode step calls them, NF4 base and live LoRA: q, k and v stacked, the output
projection with the residual, gate and up with SwiGLU, down with the residual. CUDA graphs over weights rotated past
the L2 cache; the floor is a dense linear of the same sizes, without adapters, SwiGLU or residual.
"""

import cases
import measurement
import peer_models
import policies
import pytest
import torch
import torch.nn.functional as F
from comparison import Peer, distance
from float64_model import linear_in_float64, wide_parameters
from nanogrpo.kernels import QuantizedWeight, dequantize_4bit, lora_linear_stacked
from nanogrpo.kernels.swiglu import swiglu_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {"bfloat16": 2.0**-5, "float32": 1e-4}  # relative norm of the error: plainly wrong beyond
LINEARS = {
    "qkv_proj": {},
    "o_proj": {"residual": True},
    "gate_up_proj": {"gated": True},
    "down_proj": {"residual": True},
}


# Each adapter takes a ``Problem`` and returns (tensors, call): call(*tensors) -> (M, N), on copies of them.


def ours():
    def load(problem):
        linear, q = problem.linear, problem.linear.weight
        names, sizes = list(q.tensors()), [len(b) for b in linear.lora_b]
        options = {"gated": problem.gated, "residual": problem.residual}
        whole = torch.cat(linear.lora_a), torch.cat(linear.lora_b)  # side by side, as a layer has them

        def call(*tensors):
            *of_weight, a, b = tensors
            weight = QuantizedWeight.from_tensors(dict(zip(names, of_weight, strict=True)), q.metadata)
            a, b = a.split(len(linear.lora_a[0])), b.split(sizes)
            return lora_linear_stacked(
                problem.x, weight, a, b, linear.scaling, linear.bias, linear.starts, **options
            )

        return (*q.tensors().values(), *whole), call

    return load


def peft():
    """A linear and its adapter for each part, then torch's SwiGLU and addition."""

    def load(problem):
        linears = [
            peer_models.lora(
                peer_models.linear4bit(dequantize_4bit(part.weight, problem.x.dtype), peer_models.bias_of(part)),
                part.lora_a, part.lora_b, problem.linear.scaling * len(part.lora_a),
            )
            for part in problem.linear.projections()
        ]  # fmt: skip
        weights = [linear.base_layer.weight.data for linear in linears]

        def call(*weights):
            for linear, weight in zip(linears, weights, strict=True):
                linear.base_layer.weight.data = weight
            parts = [linear(problem.x) for linear in linears]
            if problem.gated:
                return F.silu(parts[0]) * parts[1]
            return parts[0] + problem.residual if problem.residual is not None else torch.cat(parts, -1)

        return tuple(weights), call

    return load


PEERS = [Peer("ours", None, ours), Peer("PEFT + bitsandbytes", "peft", peft)]


class Problem:
    """A linear of a policy's first layer, and inputs of variance 1."""

    def __init__(self, case, name):
        model, (M, r) = case.name.split()[0], (case.shape[key] for key in ("M", "r"))
        dtype = getattr(torch, case.dtype)
        layer = policies.policy_of(model, "nf4", r, DEVICE, case.dtype).model.layers[0]
        self.linear, self.gated = getattr(layer, name), LINEARS[name].get("gated", False)
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator, device=DEVICE).to(dtype)
        N, K = self.linear.weight.shape
        self.x, residual = draw(M, K), draw(M, N)
        self.residual = residual if LINEARS[name].get("residual") else None

    def truth(self):
        wide = wide_parameters((*self.linear.lora_a, *self.linear.lora_b))
        y = linear_in_float64(self.linear, self.x.double(), wide).detach()
        return swiglu_ref(y) if self.gated else y if self.residual is None else y + self.residual.double()


@pytest.fixture(scope="module", params=cases.decode_linears(DEVICE), ids=str)
def case(request):
    return request.param


@pytest.mark.parametrize("name", LINEARS)
def test_decode_linears(compare, case, name):
    problem = Problem(case, name)
    truth = problem.truth()

    def call(load):
        tensors, linear = load(problem)
        copies = measurement.rotated(tensors, DEVICE)

        def lap(tensors):
            with torch.no_grad():
                return linear(*tensors)

        return [lambda tensors=tensors: lap(tensors) for tensors in copies]

    (N, K), M = problem.linear.weight.shape, len(problem.x)
    adapters = sum(p.numel() for p in problem.linear.lora_a + problem.linear.lora_b)
    values = M * (K + (N // 2 if problem.gated else N) * (1 if problem.residual is None else 2))
    dense = dequantize_4bit(problem.linear.weight, problem.x.dtype)
    compare(
        case, name, peers=PEERS, call=call, graph=DEVICE == "cuda",
        verify=lambda got: {"error": distance(got, truth, LIMITS[case.dtype])},
        flops=2 * M * (N * K + adapters),
        nbytes=problem.linear.weight.nbytes + problem.x.element_size() * (adapters + values),
        floor=("dense linear", lambda: F.linear(problem.x, dense)),
    )  # fmt: skip
