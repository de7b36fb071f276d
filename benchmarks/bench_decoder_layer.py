"""One decoder layer of Qwen2.5-1.5B's shape, NF4 base and live LoRA: forward + backward with recomputation.

Beside it transformers' layer with bitsandbytes' linears and PEFT's adapters under torch's checkpointing, as its
trainers run it: a batch of equal sequences, so that no padding burdens it. Unsloth patches whole models that it
loads itself; its linear is in bench_lora_linear.
"""

import cases
import peer_models
import pytest
import torch
import torch.nn.functional as F
from comparison import Peer, distance
from nanogrpo.kernels import QuantizedWeight, dequantize_4bit
from nanogrpo.kernels.lora_linear import lora_linear_stacked_ref
from nanogrpo.kernels.rms_norm import rms_norm_ref
from nanogrpo.kernels.rotary import rotary_ref
from nanogrpo.kernels.swiglu import swiglu_ref
from nanogrpo.rollout import LoraConfig
from nanogrpo.rollout.attention import TreeAttention
from nanogrpo.rollout.random_weights import random_policy
from nanogrpo.rollout.recompute import recompute
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Plainly wrong: relative norm of the error of the output, and of a gradient.
LIMITS = {"bfloat16": (2.0**-5, 2.0**-3), "float32": (1e-4, 1e-3)}


# Each adapter takes a ``Problem`` and returns (step, leaves): step() -> (T, D), differentiable to leaves: the hidden
# states and the parameters of the adapters in the order of ``Policy.adapters``.


def ours(plan_reused):
    def load(problem):
        layer, attend = problem.layer, TreeAttention(problem.key_end)
        others, parameters = (problem.cos, problem.sin), layer.parameters_in_use()

        def step():
            nonlocal attend
            if not plan_reused:
                attend = TreeAttention(problem.key_end)
            return recompute(layer, problem.hidden_states, (*others, attend), parameters)

        return step, [problem.hidden_states, *problem.parameters]

    return lambda: load


def transformers():
    def load(problem):
        model = peer_models.causal_lm(problem.policy, layers=1)
        model.config._attn_implementation = "sdpa"
        layer, (S, L) = model.model.layers[0], problem.sizes
        positions = torch.arange(L, device=DEVICE)[None].expand(S, -1)
        batch = problem.hidden_states.detach().view(S, L, -1).requires_grad_()
        dtype = batch.dtype
        embeddings = model.model.rotary_emb(batch, positions)
        named = dict(model.named_parameters())
        adapters = [
            named[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")]
            for name in problem.names
        ]

        def forward(x):
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                return layer(x, position_ids=positions, position_embeddings=embeddings)

        step = lambda: checkpoint(forward, batch, use_reentrant=False).flatten(0, 1)
        return step, [batch, *adapters]

    return load


PEERS = [
    Peer("ours", None, ours(True)),
    Peer("ours, plan included", None, ours(False)),
    Peer("transformers + PEFT + bitsandbytes", "peft", transformers),
]


class Problem:
    """The first layer of a policy with random weights, and hidden states of packed sequences of one length."""

    def __init__(self, case):
        S, L, r = (case.shape[name] for name in ("sequences", "length", "r"))
        self.sizes = S, L
        model = case.name.split()[0]
        self.policy = random_policy(
            model, "nf4", LoraConfig(r=r, alpha=r), device=DEVICE, dtype=getattr(torch, case.dtype)
        )
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator, device=DEVICE)
        for parameter in self.policy.adapters().values():
            parameter.data += 0.01 * draw(*parameter.shape)
        self.layer, config = self.policy.model.layers[0], self.policy.config
        own = {name: p for name, p in self.policy.adapters().items() if ".layers.0." in name}
        self.names, self.parameters = list(own), list(own.values())
        token = torch.arange(S * L, device=DEVICE)
        self.key_end = (token // L + 1) * L
        angles = (token % L)[:, None].float() * self.policy.model.inv_freq
        self.cos, self.sin = angles.cos(), angles.sin()
        dtype = getattr(torch, case.dtype)
        self.hidden_states = draw(S * L, config.hidden_size).to(dtype).requires_grad_()
        self.upstream = draw(S * L, config.hidden_size).to(dtype)

    def truth(self):
        """Output and gradients of the hidden states and the adapters, in float64, by the references."""
        layer, (S, L) = self.layer, self.sizes
        wide = {id(p): p.detach().double().requires_grad_() for p in self.parameters}
        hidden_states = self.hidden_states.detach().double().requires_grad_()

        def linear(part, x):
            weight = part.weight
            if isinstance(weight, QuantizedWeight):
                weight = dequantize_4bit(weight, torch.float32)
            a, b = ([wide[id(p)] for p in half] for half in (part.lora_a, part.lora_b))
            bias = None if part.bias is None else part.bias.double()
            return lora_linear_stacked_ref(x, weight.double(), a, b, part.scaling, bias)

        def sequences(x):
            return x.view(S, L, *x.shape[1:]).transpose(1, 2)

        x = rms_norm_ref(hidden_states, layer.input_norm.double(), layer.eps)
        q, k, v = linear(layer.qkv_proj, x).unflatten(-1, (-1, layer.head_dim)).split(layer.heads, dim=1)
        q, k, v = map(sequences, (*rotary_ref(q, k, self.cos.double(), self.sin.double()), v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1).flatten(1)
        middle = hidden_states + linear(layer.o_proj, out)
        x = rms_norm_ref(middle, layer.post_attention_norm.double(), layer.eps)
        y = middle + linear(layer.down_proj, swiglu_ref(linear(layer.gate_up_proj, x)))
        leaves = [hidden_states, *(wide[id(p)] for p in self.parameters)]
        return [y.detach(), *torch.autograd.grad(y, leaves, self.upstream.double())]


@pytest.fixture(scope="module", params=cases.decoder_layer(DEVICE), ids=str)
def case(request):
    return request.param


def test_decoder_layer(compare, case):
    problem, limits = Problem(case), LIMITS[case.dtype]
    truth = problem.truth()

    def call(load):
        forward, leaves = load(problem)

        def step():
            y = forward()
            return y, *torch.autograd.grad(y, leaves, problem.upstream)

        return [step]

    def verify(result):
        y, dx, *grads = result
        errors = [distance(got, want, limits[1]) for got, want in zip(grads, truth[2:], strict=True)]
        return {
            "error": distance(y, truth[0], limits[0]),
            "dx error": distance(dx.reshape(truth[1].shape), truth[1], limits[1]),
            "adapters' error": max(errors, key=lambda error: (error.value != error.value, error.value)),
        }

    (S, L), linears = (
        problem.sizes,
        [linear for name, linear in problem.policy.model.linears() if ".0." in name],
    )
    weights = sum(linear.weight.shape[0] * linear.weight.shape[1] for linear in linears)
    ranks, width = sum(p.numel() for p in problem.parameters), problem.layer.heads[0] * problem.layer.head_dim
    compare(
        case, "forward + backward, recomputed", peers=PEERS, call=call, verify=verify,
        flops=S * L * (6 * weights + 8 * ranks) + 18 * S * L * L // 2 * width,
        nbytes=3 * weights // 2 + 6 * S * L * problem.hidden_states.shape[1] * problem.hidden_states.element_size(),
        work=("tokens", S * L),
    )  # fmt: skip
