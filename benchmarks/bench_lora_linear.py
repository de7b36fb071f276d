"""lora_linear on an NF4 base, forward + backward as training calls it, beside what PEFT does over bitsandbytes."""

import cases
import pytest
import torch
import torch.nn.functional as F
from comparison import Error, Peer
from nanogrpo.kernels import dequantize_4bit, lora_linear, quantize_4bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALING = 0.5
# Plainly wrong: an output or gradient that is off by more than this times its own size.
LIMITS = {"bfloat16": 2.0**-5, "float32": 1e-4}


# Each adapter takes a dense weight (N, K) and returns call(x, lora_a, lora_b) -> (M, N).


def ours():
    def load(weight):
        q = quantize_4bit(weight)
        return lambda x, a, b: lora_linear(x, q, a, b, SCALING)

    return load


def peft():
    import bitsandbytes
    import bitsandbytes.functional as bnb

    def load(weight):
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")

        def call(x, a, b):
            base = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
            # as peft.tuners.lora.bnb.Linear4bit: the adapter in its own dtype, its result in the base's
            delta = F.linear(F.linear(x.to(a.dtype), a), b) * SCALING
            return base + delta.to(base.dtype)

        return call

    return load


PEERS = [Peer("ours", None, ours), Peer("PEFT + bitsandbytes", "bitsandbytes", peft, cuda_only=True)]


class Problem:
    """Activations, a weight on NF4's grid, and an adapter whose part of the output is as large as the base's."""

    def __init__(self, case):
        shape, self.dtype = case.shape, getattr(torch, case.dtype)
        M, K, N, r = (shape[name] for name in "MKNr")
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator, device=DEVICE)
        self.x, self.dy = draw(M, K).to(self.dtype), draw(M, N).to(self.dtype)
        self.weight = dequantize_4bit(quantize_4bit((draw(N, K) / K**0.5).to(self.dtype)), self.dtype)
        self.a, self.b = draw(r, K) / K**0.5, draw(N, r) / r**0.5
        for leaf in (self.x, self.a, self.b):
            leaf.requires_grad_()

    def step(self, linear):
        leaves = self.x, self.a, self.b
        y = linear(*leaves)
        return y, *torch.autograd.grad(y, leaves, self.dy)

    def floor(self):
        """The base layer alone, dense and frozen."""
        return torch.autograd.grad(F.linear(self.x, self.weight), self.x, self.dy)

    def truth(self):
        """The same step in float64: y, dx, dA and dB."""
        x, a, b, dy = (t.detach().double() for t in (self.x, self.a, self.b, self.dy))
        weight, h, g = self.weight.double(), x @ a.T, dy @ b
        return (
            x @ weight.T + SCALING * h @ b.T,
            dy @ weight + SCALING * g @ a,
            SCALING * g.T @ x,
            SCALING * dy.T @ h,
        )


@pytest.fixture(scope="module", params=cases.lora_linear(DEVICE), ids=str)
def case(request):
    return request.param


def test_lora_linear(compare, case):
    problem = Problem(case)
    truth = [t.float() for t in problem.truth()]
    M, K, N, r = (case.shape[name] for name in "MKNr")

    def verify(result):
        names = "y", "dx", "dA", "dB"
        return {
            f"{name} error": Error(((got - t).norm() / t.norm()).item(), LIMITS[case.dtype])
            for name, got, t in zip(names, result, truth, strict=True)
        }

    def call(load):
        linear = load(problem.weight)
        return [lambda: problem.step(linear)]

    values = problem.x.element_size()
    compare(
        case, "forward + backward", peers=PEERS, call=call, verify=verify,
        floor=("dense, frozen, no adapter", problem.floor),
        flops=4 * M * N * K + 2 * M * r * (3 * N + 3 * K),
        nbytes=2 * (N * K // 2 + 4 * N * K // 64) + values * 2 * M * (N + K) + 2 * 4 * r * (N + K),
    )  # fmt: skip
