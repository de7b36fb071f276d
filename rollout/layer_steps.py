"""The layers of a policy over packed tokens, at few shapes: on a GPU from CUDA graphs, a graph a layer and direction.

A pass pads its tokens to a multiple of ``TOKENS``, copies angles and the attention's plan to where the graphs read
them, and then runs layer by layer: hidden states in, forward graph, hidden states out; in the backward pass a layer's
input and the gradient of its output in, a graph that computes the layer again and differentiates it, and the
gradients of its input and adapters out. What autograd sees and keeps is as without graphs: a layer's input. All
graphs share one pool of memory, which is what a single layer works in at the largest number of tokens.
"""

import contextlib
import math

import torch

from ..kernels import lora_linear_stacked
from .attention import TreeAttention
from .graphs import StepGraphs
from .linear import STACKS

TOKENS = 128  # the rows of every product's tile: what padding adds costs the products nothing
WORKSPACE_TOKENS = 1024  # room that is made where nothing is known of the passes to come
MAX_PASSES = 48  # (tokens, direction, adapters) whose graphs are kept


class LayerSteps:
    """Runs the layers of a policy for scoring and training; graphs=False: launch by launch, the same bits."""

    def __init__(self, policy, *, graphs=True):
        self.policy = policy
        self.graphs = StepGraphs(policy, most=MAX_PASSES) if graphs else None
        self.expected = WORKSPACE_TOKENS
        self.clear()

    def reserve(self, tokens, size):
        """Passes will have up to ``tokens`` tokens: no more room is made, and the graphs' ``size`` bytes at once."""
        if self.graphs is not None:
            self.expected = padded_tokens(tokens)
            with torch.cuda.device(self.policy.device):
                self.policy.graph_pool.reserve(size)

    def clear(self):
        """Give back the graphs and their memory."""
        self.states, self.workspace, self.capacity = {}, None, (0, 0)
        if self.graphs is not None:
            self.graphs.clear()

    def start(self, cos, sin, attend, *, differentiable):
        """A list of steps, one a layer, of the pass with these angles (T, head_dim / 2) and ``TreeAttention``.

        A step has ``forward(x)`` and ``backward(x, dy, needs)`` as ``recompute`` takes them; T: a multiple of
        ``TOKENS``. None where launches go out one by one.
        """
        if self.graphs is None:
            return None
        model, tokens = self.policy.model, len(cos)
        state = self._state(tokens)
        _, forward = self.graphs.get(
            ("forward", tokens), lambda: (state, [state.forward(layer) for layer in model.layers])
        )
        backward = [None] * len(model.layers)
        if differentiable:
            trained = tuple(len(_trained(layer)) for layer in model.layers)
            _, backward = self.graphs.get(
                ("backward", tokens, trained),
                lambda: (state, [state.backward(layer) for layer in model.layers]),
            )
        entered = _Pass(state, (cos, sin, *attend.plan_for(*state.shapes)))
        return [
            _Step(entered, layer, *runs, self.policy.take_gradients)
            for layer, *runs in zip(model.layers, forward, backward, strict=True)
        ]

    @torch.inference_mode(False)  # what is kept between calls must stay writable outside of it
    def _state(self, tokens):
        """The ``LayerState`` for ``tokens``, in a workspace that is made anew where it is too small."""
        model, trained = self.policy.model, [_trained(layer) for layer in self.policy.model.layers]
        values = max(sum(p.numel() for p in own) for own in trained)
        if tokens > self.capacity[0] or values > self.capacity[1]:
            self.clear()
            rows = max(self.expected, tokens)
            if tokens > self.expected:
                rows = 1 << (tokens - 1).bit_length()  # so that it seldom grows
            self.capacity, embedding = (rows, values), model.embedding
            self.workspace = (
                *embedding.new_zeros(2, rows, embedding.shape[1]),
                embedding.new_zeros(values, dtype=torch.float32),
            )
        if tokens not in self.states:
            hidden_states, grad, gradients = self.workspace
            self.states[tokens] = LayerState(model, hidden_states[:tokens], grad[:tokens], gradients)
        return self.states[tokens]


class LayerState:
    """What the graphs of T tokens read and write.

    hidden_states (T, D): a layer's input, then its output. grad (T, D): the gradient of a layer's output, then of its
    input. gradients (values,) float32: those of the layer's adapters, one after the other. cos, sin (T, head_dim / 2)
    and the plan of ``attend``: the pass that ``owner`` names.
    """

    def __init__(self, model, hidden_states, grad, gradients):
        self.hidden_states, self.grad, self.gradients = hidden_states, grad, gradients
        self.owner, config, T = None, model.config, len(hidden_states)
        heads = config.num_attention_heads, config.num_key_value_heads
        self.shapes = [hidden_states.new_empty(1, 1, 1).expand(T, h, config.head_dim) for h in heads]
        self.cos, self.sin = hidden_states.new_zeros(2, T, config.head_dim // 2, dtype=torch.float32)
        self.attend = TreeAttention(torch.zeros(T, dtype=torch.int64, device=hidden_states.device))
        self.inputs = self.cos, self.sin, *self.attend.plan_for(*self.shapes)

    def forward(self, layer):
        def run():
            with torch.no_grad():
                self.hidden_states.copy_(layer(self.hidden_states, self.cos, self.sin, self.attend))

        return run

    def backward(self, layer):
        def run():
            if not (layer.index or _trained(layer)):
                return
            x = self.hidden_states.detach().requires_grad_()
            with _own_leaves(layer, self.gradients), torch.enable_grad():
                y = layer(x, self.cos, self.sin, self.attend)
                # In this thread: a library's workspace is held for every thread that calls it.
                with torch.autograd.set_multithreading_enabled(False):
                    [dx] = torch.autograd.grad(y, [x], self.grad)
            self.grad.copy_(dx)

        return run


class _Pass:
    """The angles and the plan of one pass, copied to where the graphs read them when its turn comes (again)."""

    def __init__(self, state, inputs):
        self.state, self.inputs = state, inputs

    def enter(self):
        if self.state.owner is not self:
            for target, source in zip(self.state.inputs, self.inputs, strict=True):
                target.copy_(source)
            self.state.owner = self


class _Step:
    """A layer of a pass from its graphs: see ``recompute``."""

    def __init__(self, entered, layer, forward, backward, take_gradients):
        self.entered, self.layer, self.take_gradients = entered, layer, take_gradients
        self.replay_forward, self.replay_backward = forward, backward

    def forward(self, x):
        state = self.entered.state
        self.entered.enter()
        state.hidden_states.copy_(x)
        self.replay_forward()
        return state.hidden_states.clone()

    def backward(self, x, dy, needs):
        state = self.entered.state
        self.entered.enter()
        state.hidden_states.copy_(x)
        state.grad.copy_(dy)
        self.replay_backward()
        parameters = self.layer.parameters_in_use()
        trained = _trained(self.layer)
        gradients = state.gradients[: sum(p.numel() for p in trained)]
        if trained and self.take_gradients is not None:
            self.take_gradients(trained, gradients)
            grads = [None] * len(parameters)
        else:
            parts = iter(_parts(gradients.clone(), trained))
            grads = [next(parts).to(p.dtype) if p.requires_grad else None for p in parameters]
        return [state.grad.clone() if needs[0] else None, *grads]


def _trained(layer):
    return [p for p in layer.parameters_in_use() if p.requires_grad]


def _parts(flat, parameters):
    """Views of ``flat``, shaped as ``parameters``, one after the other."""
    sizes = [p.numel() for p in parameters]
    pieces = flat[: sum(sizes)].split(sizes)
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


@contextlib.contextmanager
def _own_leaves(layer, gradients):
    """Inside, the layer's adapters belong to no graph, and backward writes the trained ones' gradients to
    ``gradients``, float32, one after the other.

    A parameter's own leaf may belong to a graph of another stream, which must not be drawn into a capture. And the
    layer's last product is not computed: its gradients do not need it.
    """
    linears, trained = [getattr(layer, name) for name in STACKS], _trained(layer)
    before = [(linear.lora_a, linear.lora_b) for linear in linears]
    targets = {id(p): part for p, part in zip(trained, _parts(gradients, trained), strict=True)}
    for linear, (lora_a, lora_b) in zip(linears, before, strict=True):
        own = [targets.get(id(p)) for p in (*lora_a, *lora_b)]
        linear.gradients = own if any(target is not None for target in own) else None
        linear.lora_a, linear.lora_b = (tuple(p.detach() for p in parts) for parts in (lora_a, lora_b))
    last = layer.down_proj
    if last.lora_a and last.adapter_on:
        last.forward = lambda x, residual: lora_linear_stacked(
            x, last.weight, last.lora_a, last.lora_b, last.scaling, last.bias, last.starts,
            residual=residual, value=False, gradients=last.gradients,
        )  # fmt: skip
    try:
        yield
    finally:
        vars(last).pop("forward", None)
        for linear, (lora_a, lora_b) in zip(linears, before, strict=True):
            linear.lora_a, linear.lora_b, linear.gradients = lora_a, lora_b, None


def padded_tokens(tokens):
    """``tokens`` rounded up to a multiple of ``TOKENS``."""
    return TOKENS * math.ceil(tokens / TOKENS)
