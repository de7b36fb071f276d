"""rms_norm, rotary, swiglu and sample_tokens beside torch, eager and compiled.

They move bytes: the roofline column is their share of the bandwidth of a copy.
"""

from types import SimpleNamespace

import cases
import pytest
import torch
import torch.nn.functional as F
from comparison import Error, Peer, distance
from nanogrpo.kernels import counter_uniform, rms_norm, rotary, sample_tokens, swiglu
from nanogrpo.kernels.rms_norm import rms_norm_ref
from nanogrpo.kernels.rotary import rotary_ref
from nanogrpo.kernels.swiglu import swiglu_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {"bfloat16": 2.0**-6, "float32": 1e-5}  # relative norm of an error: plainly wrong beyond
EPS, TEMPERATURE = 1e-6, 0.9


# What torch would be asked to do: the same functions in the same dtype, as transformers writes them.


def torch_norm(x, residual, weight):
    total = x + residual
    values = total.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * values.to(x.dtype), total


def torch_rotary(q, k, cos, sin):
    cos, sin = (torch.cat((x, x), -1).to(q.dtype)[:, None] for x in (cos, sin))
    half = lambda x: torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def torch_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) * up,)


def torch_sample(logits, uniforms):
    scaled = logits / TEMPERATURE
    tokens = torch.multinomial(scaled.softmax(-1), 1)
    return tokens[:, 0], scaled.log_softmax(-1).gather(1, tokens)[:, 0]


def operations(case):
    """name -> ours, torch's and the float64 truth (or None), their leaves and other arguments, and the least bytes of
    forward and of backward."""
    T, D, F_, V, H, KVH, width = case.shape.values()
    dtype, generator = getattr(torch, case.dtype), torch.Generator(DEVICE).manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator, device=DEVICE).to(dtype)
    angles = torch.arange(T, device=DEVICE)[:, None] * 1e4 ** -torch.linspace(0, 1, width // 2, device=DEVICE)
    size, turned = dtype.itemsize, T * (H + KVH) * width
    rows = min(T, cases.DECODE_ROWS)
    zeros, count = (torch.zeros(rows, dtype=torch.int64, device=DEVICE) for _ in range(2))
    uniforms = counter_uniform(0, torch.arange(rows, device=DEVICE), zeros, count)
    norm = lambda x, residual, weight: rms_norm(x, weight, EPS, residual)
    draws = lambda logits, uniforms: sample_tokens(
        logits, torch.arange(len(logits), device=DEVICE), TEMPERATURE, uniforms=uniforms
    )
    return {
        "rms_norm with a residual": SimpleNamespace(
            ours=norm, torch=torch_norm, truth=lambda x, r, w: rms_norm_ref(x, w, EPS, r),
            leaves=[draw(T, D), draw(T, D)], others=[1 + 0.1 * draw(D)], bytes=(4 * T * D * size, 4 * T * D * size),
        ),
        "rotary": SimpleNamespace(
            ours=rotary, torch=torch_rotary, truth=rotary_ref,
            leaves=[draw(T, H, width), draw(T, KVH, width)], others=[angles.cos(), angles.sin()],
            bytes=(2 * turned * size + 4 * T * width, 2 * turned * size + 4 * T * width),
        ),
        "swiglu": SimpleNamespace(
            ours=lambda x: (swiglu(x),), torch=torch_swiglu, truth=lambda x: (swiglu_ref(x),),
            leaves=[draw(T, 2 * F_)], others=[], bytes=(3 * T * F_ * size, 5 * T * F_ * size),
        ),
        "sample_tokens": SimpleNamespace(
            ours=draws, torch=torch_sample, truth=None, leaves=[],
            others=[3 * draw(rows, V).float(), uniforms], bytes=(4 * rows * V, None),
        ),
    }  # fmt: skip


def peers(operation):
    def compiled():
        torch.compiler.reset()
        return torch.compile(operation.torch, dynamic=False)

    return [
        Peer("ours", None, lambda: operation.ours),
        Peer("torch", "torch", lambda: operation.torch),
        Peer("torch.compile", "torch", compiled),
    ]


@pytest.fixture(scope="module", params=cases.small_kernels(DEVICE), ids=str)
def case(request):
    return request.param


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
@pytest.mark.parametrize("name", ["rms_norm with a residual", "rotary", "swiglu", "sample_tokens"])
def test_small_kernels(compare, case, name, mode):
    operation, backward = operations(case)[name], mode != "forward"
    if operation.truth is None and (backward or case.shape["T"] > cases.DECODE_ROWS):
        pytest.skip("sampling has no gradient and rows of a decode step alone")
    leaves = [x.requires_grad_() for x in operation.leaves]
    upstream, truth = [], None
    if operation.truth is not None:
        wide = [x.detach().double().requires_grad_() for x in leaves]
        outputs = operation.truth(*wide, *(x.double() for x in operation.others))
        upstream = [torch.randn_like(x).to(leaves[0].dtype) for x in outputs]
        truth = (
            *outputs,
            *(torch.autograd.grad(outputs, wide, [x.double() for x in upstream]) if backward else ()),
        )

    def call(function):
        def run():
            with torch.set_grad_enabled(backward):
                outputs = function(*leaves, *operation.others)
            return (*outputs, *torch.autograd.grad(outputs, leaves, upstream)) if backward else outputs

        return [run]

    def verify(result):
        limit = LIMITS[case.dtype]
        if truth is None:
            tokens, logprobs = result
            expected = (
                (operation.others[0].double() / TEMPERATURE).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            )
            return {"error": Error((logprobs - expected).abs().max().item(), 1e-4)}
        errors = [distance(got, want.detach(), limit) for got, want in zip(result, truth, strict=True)]
        return {"error": max(errors, key=lambda error: (error.value != error.value, error.value))}

    compare(
        case, f"{name}, {mode}", peers=peers(operation), call=call, verify=verify, flops=0,
        nbytes=sum(operation.bytes[: 1 + backward]), graph=DEVICE == "cuda" and not backward,
    )  # fmt: skip
