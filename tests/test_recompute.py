"""Activation checkpointing: the same bits as without, keeping the input alone."""

import pytest
import torch
from nanogrpo.rollout.recompute import PinnedStore, recompute


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8))
        self.bias = torch.nn.Parameter(torch.randn(8))
        self.calls = 0

    def forward(self, x, factor, shift):
        self.calls += 1
        return torch.tanh(x @ self.weight) * factor + torch.sigmoid(x * self.bias) + shift


@pytest.mark.parametrize("x_requires_grad", [True, False])
def test_gradients_are_the_same_bits(x_requires_grad):
    layer, others = Layer(), (torch.randn(8), 0.5)
    x, dy = torch.randn(5, 8, requires_grad=x_requires_grad), torch.randn(5, 8)
    leaves = [*layer.parameters()] + ([x] if x_requires_grad else [])
    y = layer(x, *others)
    expected = torch.autograd.grad(y, leaves, dy)
    again = recompute(layer, x, others, list(layer.parameters()))
    assert torch.equal(y, again) and layer.calls == 2
    for _ in range(2):  # a graph that is kept is computed again each time
        found = torch.autograd.grad(again, leaves, dy, retain_graph=True)
        assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
    assert layer.calls == 4


def test_only_the_input_and_parameters_are_kept():
    layer, x, kept = Layer(), torch.randn(5, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        recompute(layer, x, (1.0, 0.0), list(layer.parameters()))
    assert set(kept) == {t.data_ptr() for t in (x, layer.weight, layer.bias)}


def test_a_chain_of_recomputed_layers():
    layers, x = [Layer() for _ in range(3)], torch.randn(4, 8)

    def chain(checkpointed):
        y = x
        for layer in layers:
            y = (
                recompute(layer, y, (1.0, 0.1), list(layer.parameters()))
                if checkpointed
                else layer(y, 1.0, 0.1)
            )
        parameters = [p for layer in layers for p in layer.parameters()]
        return torch.autograd.grad(y.square().sum(), parameters)

    assert all(torch.equal(p, q) for p, q in zip(chain(True), chain(False), strict=True))


@pytest.mark.gpu
def test_offloaded_inputs_give_the_same_bits_and_leave_the_device():
    layers, rows = [Layer().cuda() for _ in range(6)], 1 << 16
    parameters = [p for layer in layers for p in layer.parameters()]
    x = torch.randn(rows, 8, device="cuda")

    def chain(store):
        y = x
        for layer in layers:
            y = recompute(layer, y, (1.0, 0.1), list(layer.parameters()), store)
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")  # takes back what the store's stream has done with
        held = torch.cuda.memory_allocated()
        found = [
            torch.autograd.grad(y.square().sum(), parameters, retain_graph=again) for again in (True, False)
        ]
        assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
        return held, found[0]

    chain(None)  # allocates the libraries' workspaces
    (held, expected), (less, offloaded) = chain(None), chain(PinnedStore(torch.cuda.Stream()))
    assert all(torch.equal(p, q) for p, q in zip(offloaded, expected, strict=True))
    assert held - less > 4.99 * x.nbytes  # the inputs in between, less a few small blocks of the store


@pytest.mark.gpu
def test_the_host_does_not_run_ahead_of_offloaded_inputs():
    layers, rows = [Layer().cuda() for _ in range(40)], 1 << 19
    parameters = [p for layer in layers for p in layer.parameters()]
    stream, x = torch.cuda.Stream(), torch.randn(rows, 8, device="cuda")

    class Slow(torch.nn.Module):
        """A layer that keeps the device busy while the host goes on."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *inputs):
            torch.cuda._sleep(10_000_000)
            return self.layer(*inputs)

    def chain(wrap):
        store, y = PinnedStore(stream), x
        for layer in layers:
            y = recompute(wrap(layer), y, (1.0, 0.1), list(layer.parameters()), store)
        torch.autograd.grad(y.square().sum(), parameters)

    def grown(wrap):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        chain(wrap)
        return torch.cuda.memory_reserved() - before

    grown(lambda layer: layer)  # allocates the libraries' workspaces
    # One layer's own tensors and the inputs on their way, not all 40.
    assert grown(Slow) <= 30 * x.nbytes
