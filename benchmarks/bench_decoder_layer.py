"""One decoder layer of Qwen2.5-1.5B's shape, NF4 base and live LoRA: forward + backward with recomputation.

Ours runs as in training, which on a GPU is from the CUDA graphs of ``LayerSteps``, and launch by launch. Beside it
transformers' layer with bitsandbytes' linears and PEFT's adapters under torch's checkpointing, as its trainers run
it: a batch of equal sequences, so that no padding burdens it; and the same layer with Unsloth's norms, rotary
embedding, feed-forward block and output projection in their places, as it patches a Qwen2 (whose q, k and v have a
bias, and stay PEFT's).
"""

import functools

import cases
import peer_models
import policies
import pytest
import torch
import torch.nn.functional as F
from comparison import Peer, distance, import_alone
from float64_model import layer_in_float64, wide_parameters
from nanogrpo.rollout import pack_tree
from nanogrpo.rollout.attention import TreeAttention
from nanogrpo.rollout.layer_steps import padded_tokens
from nanogrpo.rollout.recompute import LiveStep, recompute, recompute_step
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Plainly wrong: relative norm of the error of the output, and of a gradient.
LIMITS = {"bfloat16": (2.0**-5, 2.0**-3), "float32": (1e-4, 1e-3)}


# Each adapter takes a ``Problem`` and returns (step, leaves): step() -> (T, D), differentiable to leaves: the hidden
# states and the parameters of the adapters in the order of ``Policy.adapters``. More rows than T are padding.


def ours():
    """What ``Policy.score`` makes of a layer: its padding, and the steps of its ``LayerSteps`` where it has them."""

    def load(problem):
        policy, layer = problem.policy, problem.layer
        parameters, rows = layer.parameters_in_use(), len(problem.hidden_states)
        if policy.steps is not None:
            policy.steps.clear()  # of other passes, so that all memory that this one takes is seen
            rows = padded_tokens(rows)
        others = problem.packed(rows)
        hidden_states = padded(problem.hidden_states.detach(), rows).requires_grad_()

        @functools.cache  # once a pass, for all its layers; in the first call, where what it keeps is counted
        def started():
            steps = policy.steps and policy.steps.start(*others, differentiable=True)
            return LiveStep(layer, others, parameters) if steps is None else steps[layer.index]

        step = lambda: recompute_step(started(), hidden_states, parameters)
        return step, [hidden_states, *problem.parameters]

    return load


def ours_eager(plan_reused):
    def load(problem):
        layer, parameters = problem.layer, problem.layer.parameters_in_use()
        *angles, attend = problem.packed(len(problem.hidden_states))

        def step():
            plan = attend if plan_reused else TreeAttention(attend.key_end)
            return recompute(layer, problem.hidden_states, (*angles, plan), parameters)

        return step, [problem.hidden_states, *problem.parameters]

    return lambda: load


def in_a_model_of_theirs(forward_of):
    """forward_of(its first layer, positions (S, L), their cosines and sines) -> forward(x (S, L, D))."""

    def load(problem):
        model = peer_models.causal_lm(problem.policy, layers=1)
        model.config._attn_implementation = "sdpa"
        S, L = problem.sizes
        positions = torch.arange(L, device=DEVICE)[None].expand(S, -1)
        batch = problem.hidden_states.detach().view(S, L, -1).requires_grad_()
        dtype = batch.dtype
        embeddings = model.model.rotary_emb(batch, positions)
        named = dict(model.named_parameters())
        adapters = [
            named[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")]
            for name in problem.names
        ]
        layer_forward = forward_of(model.model.layers[0], positions, embeddings)

        def forward(x):
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                return layer_forward(x)

        step = lambda: checkpoint(forward, batch, use_reentrant=False).flatten(0, 1)
        return step, [batch, *adapters]

    return load


def transformers():
    return in_a_model_of_theirs(
        lambda layer, positions, embeddings: (
            lambda x: layer(x, position_ids=positions, position_embeddings=embeddings)
        )
    )


def unsloth():
    import_alone("unsloth_zoo.utils")  # Unsloth's kernels ask it for a version
    lora, norms, rotary = (
        import_alone(f"unsloth.kernels.{name}") for name in ("fast_lora", "rms_layernorm", "rope_embedding")
    )

    def forward_of(layer, positions, embeddings):
        attention, (cos, sin) = layer.self_attn, (x[0].contiguous() for x in embeddings)
        norm = norms.fast_rms_layernorm

        def forward(x):
            normed = norm(layer.input_layernorm, x)
            heads = lambda x: x.view(*x.shape[:2], -1, attention.head_dim).transpose(1, 2)
            q, k, v = (
                heads(linear(normed)) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = rotary.fast_rope_embedding(q, k, cos, sin)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + lora.apply_lora_o(attention, out.transpose(1, 2).flatten(2))
            return x + lora.apply_lora_mlp_swiglu(layer.mlp, norm(layer.post_attention_layernorm, x))

        return forward

    return in_a_model_of_theirs(forward_of)


PEERS = [
    Peer("ours", None, ours),
    Peer("ours, eager", None, ours_eager(True)),
    Peer("ours, eager, plan included", None, ours_eager(False)),
    Peer("transformers + PEFT + bitsandbytes", "peft", transformers),
    Peer("transformers + PEFT + bitsandbytes + Unsloth", "unsloth", unsloth, cuda_only=True),
]


class Problem:
    """The first layer of a policy with random weights, and hidden states of packed sequences of one length."""

    def __init__(self, case):
        S, L, r = (case.shape[name] for name in ("sequences", "length", "r"))
        self.sizes = S, L
        self.policy = policies.policy_of(case.name.split()[0], "nf4", r, DEVICE, spread=0.01)
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator, device=DEVICE)
        self.layer, config = self.policy.model.layers[0], self.policy.config
        own = {name: p for name, p in self.policy.adapters().items() if ".layers.0." in name}
        self.names, self.parameters = list(own), list(own.values())
        dtype = getattr(torch, case.dtype)
        self.hidden_states = draw(S * L, config.hidden_size).to(dtype).requires_grad_()
        self.upstream = draw(S * L, config.hidden_size).to(dtype)

    def packed(self, rows):
        """(cos, sin, ``TreeAttention``) of the sequences and of what pads them to ``rows`` tokens."""
        S, L = self.sizes
        tree = pack_tree([[0] * L] * S, share_prefix=False).padded(rows).to(DEVICE)
        angles = tree.positions[:, None].float() * self.policy.model.inv_freq
        return angles.cos(), angles.sin(), TreeAttention(tree.key_end)

    def truth(self):
        """Output and gradients of the hidden states and the adapters, in float64, by the references."""
        wide = wide_parameters(self.parameters)
        hidden_states = self.hidden_states.detach().double().requires_grad_()
        cos, sin, _ = self.packed(len(hidden_states))
        y = layer_in_float64(self.layer, hidden_states, cos, sin, self.sizes[1], wide)
        leaves = [hidden_states, *(wide[id(p)] for p in self.parameters)]
        return [y.detach(), *torch.autograd.grad(y, leaves, self.upstream.double())]


def padded(x, rows):
    """x (T, D) with zeros below, of ``rows`` rows."""
    return F.pad(x, (0, 0, 0, rows - len(x)))


@pytest.fixture(scope="module", params=cases.decoder_layer(DEVICE), ids=str)
def case(request):
    return request.param


def test_decoder_layer(compare, case):
    problem, limits = Problem(case), LIMITS[case.dtype]
    truth, T = problem.truth(), len(problem.hidden_states)

    def call(load):
        forward, leaves = load(problem)
        rows = leaves[0].numel() // leaves[0].shape[-1]
        upstream = padded(problem.upstream, rows)

        def step():
            y = forward()
            return y, *torch.autograd.grad(y, leaves, upstream)

        return [step]

    def verify(result):
        y, dx, *grads = result
        errors = [distance(got, want, limits[1]) for got, want in zip(grads, truth[2:], strict=True)]
        return {
            "error": distance(y[:T], truth[0], limits[0]),
            "dx error": distance(dx.flatten(0, -2)[:T], truth[1], limits[1]),
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
