"""lora_linear over an NF4 base, forward and backward, beside other QLoRA linears; the floor is a dense linear.

Launch by launch, where the host may be what a call waits for, and as CUDA graphs, as training runs a layer.
"""

import cases
import peer_models
import pytest
import torch
import torch.nn.functional as F
from comparison import Peer, distance, import_alone
from nanogrpo.kernels import dequantize_4bit, lora_linear, quantize_4bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Plainly wrong: relative norm of the error of the output, and of a gradient.
LIMITS = {"bfloat16": (2.0**-6, 2.0**-5), "float32": (1e-5, 1e-4)}
SCALING = 0.5


# Each adapter takes a ``Problem`` and returns (call, lora_a, lora_b): call(x (M, K)) -> (M, N).


def ours():
    def load(problem):
        q = quantize_4bit(problem.weight, "nf4")
        return (
            lambda x: lora_linear(x, q, problem.lora_a, problem.lora_b, SCALING),
            problem.lora_a,
            problem.lora_b,
        )

    return load


def over_dense():
    """LoRA in plain torch over a dense base: four bytes where the others have one."""

    def load(problem):
        a, b = problem.lora_a, problem.lora_b
        call = lambda x: (
            F.linear(x, problem.weight) + SCALING * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        )
        return call, a, b

    return load


def peft():
    def load(problem):
        linear = peer_models.lora(
            peer_models.linear4bit(problem.weight),
            problem.lora_a,
            problem.lora_b,
            SCALING * len(problem.lora_a),
        )

        def call(x):
            with torch.autocast(DEVICE, x.dtype, enabled=x.dtype != torch.float32):  # as its trainers run it
                return linear(x)

        return call, linear.lora_A["default"].weight, linear.lora_B["default"].weight

    return load


def unsloth():
    import_alone("unsloth_zoo.utils")  # Unsloth's kernels ask it for a version
    function = import_alone("unsloth.kernels.fast_lora").LoRA_W

    def load(problem):
        base, (a, b) = peer_models.linear4bit(problem.weight, nested=True), (problem.lora_a, problem.lora_b)
        weight, state = base.weight.data, base.weight.quant_state
        return lambda x: function.apply(x[None], weight, state, a, b, SCALING)[0], a, b

    return load


PEERS = [
    Peer("ours", None, ours),
    Peer("Unsloth LoRA_W", "unsloth", unsloth, cuda_only=True),
    Peer("PEFT + bitsandbytes", "peft", peft),
    Peer("torch over a dense base", "torch", over_dense),
]


class Problem:
    """A base of variance 1/K on NF4's grid, so that every contender has the same, and adapters of a similar size."""

    def __init__(self, case):
        shape, dtype = case.shape, getattr(torch, case.dtype)
        M, K, N, r = (shape[name] for name in ("M", "K", "N", "r"))
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator, device=DEVICE)
        self.x = draw(M, K).to(dtype).requires_grad_()
        self.weight = dequantize_4bit(quantize_4bit((draw(N, K) / K**0.5).to(dtype), "nf4"), dtype)
        self.lora_a = (draw(r, K) / K**0.5).requires_grad_()
        self.lora_b = (draw(N, r) / r**0.5).requires_grad_()
        self.upstream = draw(M, N).to(dtype)

    def truth(self):
        """y and the gradients of x, lora_a, lora_b in float64."""
        x, w, a, b, dy = (
            t.detach().double() for t in (self.x, self.weight, self.lora_a, self.lora_b, self.upstream)
        )
        h, g = x @ a.T, dy @ b
        return x @ w.T + SCALING * h @ b.T, dy @ w + SCALING * g @ a, SCALING * g.T @ x, SCALING * dy.T @ h


@pytest.fixture(scope="module", params=cases.lora_linear(DEVICE), ids=str)
def case(request):
    return request.param


@pytest.mark.parametrize("mode", ["forward + backward", "forward + backward, CUDA graph"])
def test_lora_linear(compare, case, mode):
    graph = mode.endswith("CUDA graph")
    if graph and DEVICE != "cuda":
        pytest.skip("no CUDA graph without CUDA")
    problem = Problem(case)
    M, K, N, r = (case.shape[name] for name in ("M", "K", "N", "r"))
    truth, limits = problem.truth(), LIMITS[case.dtype]

    def call(load):
        linear, lora_a, lora_b = load(problem)

        def step():
            y = linear(problem.x)
            return y, *torch.autograd.grad(y, (problem.x, lora_a, lora_b), problem.upstream)

        return [step]

    def verify(result):
        names = ("error", "dx error", "dA error", "dB error")
        return {
            name: distance(got, want, limits[index > 0])
            for index, (name, got, want) in enumerate(zip(names, result, truth, strict=True))
        }

    def dense():
        return torch.autograd.grad(F.linear(problem.x, problem.weight), problem.x, problem.upstream)

    size = problem.x.element_size()
    compare(
        case, mode, peers=PEERS, call=call, verify=verify, floor=("dense linear", dense), graph=graph,
        flops=4 * M * N * K + 2 * M * r * (3 * N + 4 * K),
        nbytes=2 * (N * K // 2 + N * K // 16) + size * M * (3 * K + 2 * N) + 8 * r * (N + K),
    )  # fmt: skip
