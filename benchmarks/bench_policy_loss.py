"""policy_loss, forward + backward, with and without its metrics, beside GRPO's loss alone written out in torch."""

import cases
import pytest
import torch
from comparison import Error, Peer
from nanogrpo.grpo import policy_loss, preset

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = preset("grpo", kl_coef=0.04)
LIMIT = 1e-4  # relative: plainly wrong beyond


def ours():
    return lambda new, old, ref, advantages, mask: (
        policy_loss(new, old, advantages, mask, CONFIG, ref_logprobs=ref).loss
    )


def measured():
    def loss_of(new, old, ref, advantages, mask):
        output = policy_loss(new, old, advantages, mask, CONFIG, ref_logprobs=ref)
        return output.loss + 0 * output.metrics["kl_k3"]  # the first metric read makes them all

    return loss_of


def formula(new, old, ref, advantages, mask):
    ratio, advantages = (new - old).exp(), advantages[:, None]
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    per_token = surrogate + 0.04 * ratio * (torch.expm1(ref - new) - (ref - new))
    return ((per_token * mask).sum(1) / mask.sum(1)).mean()


def compiled():
    torch.compiler.reset()
    return torch.compile(formula, dynamic=False)


PEERS = [
    Peer("ours", None, ours),
    Peer("ours, with every metric", None, measured),
    Peer("torch, loss alone", "torch", lambda: formula),
    Peer("torch.compile, loss alone", "torch", compiled),
]


@pytest.fixture(scope="module", params=cases.policy_loss(DEVICE), ids=str)
def case(request):
    return request.param


def test_policy_loss(compare, case):
    B, T = case.shape["B"], case.shape["T"]
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator, device=DEVICE)
    new = (-draw(B, T).abs() - 0.1).requires_grad_()
    old, ref = (new.detach() + 0.3 * draw(B, T) for _ in range(2))
    advantages = draw(B)
    lengths = torch.randint(1, T + 1, (B,), generator=generator, device=DEVICE)
    mask = torch.arange(T, device=DEVICE) < lengths[:, None]

    def step(loss_of):
        loss = loss_of(new, old, ref, advantages, mask)
        return loss, torch.autograd.grad(loss, new)[0]

    wide = [x.detach().double() for x in (new, old, ref, advantages)]
    wide[0].requires_grad_()
    loss = formula(*wide, mask)
    grad = torch.autograd.grad(loss, wide[0])[0]

    def verify(result):
        got, got_grad = result
        return {
            "loss error": Error((got - loss).abs().item(), LIMIT * (1 + loss.abs().item())),
            "gradient error": Error(((got_grad - grad).norm() / grad.norm()).item(), LIMIT),
        }

    compare(
        case,
        "forward + backward",
        peers=PEERS,
        call=lambda operation: [lambda: step(operation)],
        verify=verify,
        flops=30 * B * T,
        nbytes=(4 * 4 + 1) * B * T,
    )
