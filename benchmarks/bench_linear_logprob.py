"""fused_linear_logprob beside plain torch: forward, and forward + backward to the hidden states.

On a GPU at Qwen2.5-1.5B's head, on the CPU at SmolLM2-135M's. Results are checked before anything is timed.
"""

import pytest
import torch
from nanogrpo.kernels import fused_linear_logprob
from nanogrpo.kernels.linear_logprob import fused_linear_logprob_ref

CUDA = torch.cuda.is_available()
SHAPE = (2048, 1536, 151936) if CUDA else (256, 576, 49152)  # rows, hidden size, vocabulary


@pytest.fixture(scope="module")
def problem():
    rows, hidden_size, vocab_size = SHAPE
    generator = torch.Generator().manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    hidden = torch.randn(rows, hidden_size, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5).to(device, dtype)
    targets = torch.randint(vocab_size, (rows,), generator=generator).to(device)
    return hidden, weight, targets


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("operation", [fused_linear_logprob, fused_linear_logprob_ref], ids=["ours", "torch"])
def test_linear_logprob(benchmark, problem, operation, backward):
    hidden, weight, targets = problem
    some = slice(0, 64)
    truth = fused_linear_logprob_ref(hidden[some].double(), weight.double(), targets[some]).logprobs
    error = (operation(hidden[some], weight, targets[some]).logprobs - truth).abs().max().item()
    # Plain torch rounds its logits to bfloat16, 2**-8 of about 10; in float32 both round sums of 576 products.
    assert error <= (5e-2 if hidden.dtype == torch.bfloat16 else 1e-4)

    def call():
        hidden.grad = None
        with torch.set_grad_enabled(backward):
            logprobs = operation(hidden, weight, targets).logprobs
        if backward:
            logprobs.sum().backward()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.extra_info.update(shape=SHAPE, dtype=str(hidden.dtype), max_error=error)
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
