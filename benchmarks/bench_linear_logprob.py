"""fused_linear_logprob and its peers: forward alone, and forward + backward to the hidden states (frozen head).

To benchmark another operation, write ``bench_<op>.py`` like this one: a function in ``cases.py`` for its shapes, an
adapter for each peer, and one test that draws the inputs, knows the truth on a sample of the output and hands both
to the ``compare`` fixture. ``make bench`` finds it; the record and its tables follow.
"""

import importlib
import sys
from contextlib import nullcontext
from types import ModuleType

import cases
import pytest
import torch
import torch.nn.functional as F
from comparison import Error, Peer, import_alone
from nanogrpo.kernels import fused_linear_logprob

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Plainly wrong: log-probs off by more than this times (1 + max |truth|); gradients off by more, in relative norm.
LIMITS = {"bfloat16": (2.0**-6, 2.0**-4), "float32": (1e-4, 1e-4)}
SAMPLE = 64  # rows held against float64
LITTLE = 64 * 2**20  # bytes, for a small card
CHUNK = 8192  # vocabulary rows of the head that are float64 at once


# Each adapter is a peer's own call behind one signature: (hidden, weight, target_ids, mask | None) -> (N,) log-probs.


def on_kept_rows(logprobs):
    """Mask support for a peer without it, as its caller would write it."""

    def masked(hidden, weight, target_ids, mask):
        if mask is None:
            return logprobs(hidden, weight, target_ids)
        kept = logprobs(hidden[mask], weight, target_ids[mask])
        return torch.zeros_like(mask, dtype=kept.dtype).masked_scatter(mask, kept)

    return masked


def ours():
    return lambda h, w, t, mask: fused_linear_logprob(h, w, t, mask=mask).logprobs


def ours_in_little_memory():
    return lambda h, w, t, mask: fused_linear_logprob(h, w, t, mask=mask, workspace_bytes=LITTLE).logprobs


def naive(hidden, weight, target_ids):
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    return log_p.gather(1, target_ids[:, None]).squeeze(1)


def torch_eager():
    return on_kept_rows(naive)


def torch_compiled():
    torch.compiler.reset()
    return on_kept_rows(torch.compile(naive, dynamic=False))


def cce(impl):
    def load():
        from cut_cross_entropy import linear_cross_entropy as f

        # filter_eps=None: the filter drops small gradients, and with them this check's meaning.
        return on_kept_rows(lambda h, w, t: -f(h, w, t, reduction="none", filter_eps=None, impl=impl))

    return load


def liger():
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    f = module.LigerFusedLinearCrossEntropyFunction.apply
    # reduction="none" is its only form that takes a gradient for each row; its faster "sum" gives one scalar.
    return on_kept_rows(lambda h, w, t: -f(h, w, t, None, None, -100, 0.0, 0.0, "none")[0])


def trl():
    f = import_alone("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply
    # Its backward asks trl.trainer, which needs much more, for a context that is null without DeepSpeed.
    utils = sys.modules.setdefault("trl.trainer.utils", ModuleType("trl.trainer.utils"))
    utils.maybe_gather_lm_head_ctx = lambda *parameters: nullcontext()
    import_alone("trl.trainer.utils")
    return on_kept_rows(lambda h, w, t: f(h, w, None, t, 1.0, 32768, None, 1.0, ())[0])


def verl():
    f = import_alone("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return on_kept_rows(lambda h, w, t: f(h, w, t, 1.0, "none", None)[0])


def unsloth():
    f = import_alone("unsloth_zoo.fused_losses.fused_linear").fused_linear_logprobs
    return lambda h, w, t, mask: f(h, w, t, mask=mask, entropy_requires_grad=False)


PEERS = [
    Peer("ours", None, ours),
    Peer("Unsloth fused_linear", "unsloth_zoo", unsloth),
    Peer("TRL ChunkedLogProb", "trl", trl),
    Peer("verl", "verl", verl, cuda_only=True),
    Peer("Liger FLCE", "liger-kernel", liger, cuda_only=True),
    Peer("CCE", "cut-cross-entropy", cce("cce"), cuda_only=True),
    Peer("CCE torch_compile", "cut-cross-entropy", cce("torch_compile")),
    Peer("torch.compile", "torch", torch_compiled),
    Peer("torch", "torch", torch_eager),
    Peer("ours, 64 MiB", None, ours_in_little_memory, cuda_only=True),
]


class Problem:
    """Random inputs of a case. Logits have standard deviation 3, a distribution as peaked as a language model's."""

    def __init__(self, case, device):
        shape, dtype = case.shape, getattr(torch, case.dtype)
        N, D, V = shape["N"], shape["D"], shape["V"]
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator, device=device)
        self.hidden = draw(N, D).to(dtype).requires_grad_()
        self.weight = (draw(V, D) * (3 / D**0.5)).to(dtype)
        self.target_ids = torch.randint(V, (N,), generator=generator, device=device)
        self.upstream = draw(N)
        order = torch.randperm(N, generator=generator, device=device)
        self.mask = order < shape["kept"] if "kept" in shape else None

    def truth(self, rows):
        """Log-probs (R,) and gradients (R, D) of these rows in float64, by the formula."""
        hidden, target_ids = self.hidden[rows].detach().double(), self.target_ids[rows]
        chunks = self.weight.split(CHUNK)
        log_p = torch.cat([hidden @ chunk.double().T for chunk in chunks], 1).log_softmax(1)
        pairs = zip(log_p.exp().split(CHUNK, 1), chunks, strict=True)
        grad = self.weight[target_ids].double() - sum(p @ chunk.double() for p, chunk in pairs)
        kept = 1.0 if self.mask is None else self.mask[rows].double()
        logprobs = log_p.gather(1, target_ids[:, None]).squeeze(1) * kept
        return logprobs, grad * (self.upstream[rows] * kept)[:, None]

    def step(self, logprobs, backward):
        """What is timed: log-probs (N,), and the gradient (N, D) or None."""
        arguments = self.hidden, self.weight, self.target_ids, self.mask
        with torch.set_grad_enabled(backward):
            out = logprobs(*arguments)
        return out, torch.autograd.grad(out, self.hidden, self.upstream.to(out.dtype))[
            0
        ] if backward else None


@pytest.fixture(scope="module", params=cases.linear_logprob(DEVICE), ids=str)
def case(request):
    return request.param


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
def test_linear_logprob(compare, case, mode):
    backward, problem = mode != "forward", Problem(case, DEVICE)
    N, D, V = case.shape["N"], case.shape["D"], case.shape["V"]
    kept, size = case.shape.get("kept", N), problem.hidden.element_size()
    rows = torch.linspace(0, N - 1, min(N, SAMPLE), device=DEVICE).long()
    logprobs, grad = problem.truth(rows)
    limits = LIMITS[case.dtype]

    def verify(result):
        got, got_grad = result
        # 0 * sum carries a NaN in any row, one that nobody wrote, into the error of the sample.
        error = (got[rows] - logprobs).abs().max() + 0 * got.sum()
        errors = {"log-prob error": Error(error.item(), limits[0] * (1 + logprobs.abs().max().item()))}
        if backward:
            error = (got_grad[rows] - grad).norm() / grad.norm() + 0 * got_grad.float().sum()
            errors["gradient error"] = Error(error.item(), limits[1])
        return errors

    decode = DEVICE == "cuda" and N == cases.DECODE_ROWS  # a decode step runs inside a CUDA graph
    left = problem.hidden.detach()[:kept]
    logits = left.new_empty(kept, V)
    compare(
        case,
        mode,
        peers=PEERS,
        call=lambda operation: [lambda: problem.step(operation, backward)],
        verify=verify,
        flops=(4 if backward else 2) * kept * V * D,
        nbytes=size * (V * D + kept * D * (2 if backward else 1)) + 4 * kept,
        floor=("one matmul", lambda: torch.mm(left, problem.weight.T, out=logits)),
        graph=decode and not backward,
    )
