"""Activation checkpointing of a layer: its input is kept, everything else is computed a second time for backward.

torch's own checkpointing reads the random state, which waits for the device, and hooks every saved tensor; a layer
without randomness needs neither. The inputs may wait in pinned CPU memory: then the device holds two at a time.
"""

import torch


class PinnedStore:
    """Tensors of one forward pass in pinned CPU memory, copied on another stream while others compute.

    Backward asks for them last to first; whenever it takes one, the one before is already on its way. The host never
    gets further ahead of the device than one layer, or the device would hold what has yet to leave.
    """

    def __init__(self, stream):
        """stream: one for all stores of a model, since the allocator keeps memory apart for each."""
        self.stream = stream
        self.kept, self.coming = [], {}
        self.last = None  # an event of the last call of ``keep`` or ``fetch``

    def keep(self, x):
        """The index under which ``fetch`` returns x."""
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.stream):
            pinned.copy_(x, non_blocking=True)
        x.record_stream(self.stream)
        self._wait_for_last(self.stream)
        self.kept.append(pinned)
        return len(self.kept) - 1

    def fetch(self, index):
        x = self.coming.pop(index) if index in self.coming else self._start(index)
        current = torch.cuda.current_stream(x.device)
        current.wait_stream(self.stream)
        x.record_stream(current)
        self._wait_for_last(current)
        if index and index - 1 not in self.coming:
            self.coming[index - 1] = self._start(index - 1)
        return x

    def _wait_for_last(self, stream):
        """Wait until ``stream`` has come to where the last call left it; this one leaves it here."""
        if self.last is not None:
            self.last.synchronize()
        self.last = stream.record_event()

    def _start(self, index):
        with torch.cuda.stream(self.stream):
            return self.kept[index].to(self.stream.device, non_blocking=True)


class LiveStep:
    """``function(x, *others)`` and its gradients, launch by launch.

    A step has ``forward(x)``, and ``backward(x, dy, needs)`` with the gradients of x and of the parameters that take
    part, each None where ``needs`` says so.
    """

    def __init__(self, function, others, parameters):
        self.function, self.others, self.parameters = function, others, parameters

    def forward(self, x):
        return self.function(x, *self.others)

    def backward(self, x, dy, needs):
        x = x.detach().requires_grad_(needs[0])
        needed = [t for t, need in zip((x, *self.parameters), needs, strict=True) if need]
        with torch.enable_grad():
            y = self.function(x, *self.others)
        found = iter(torch.autograd.grad(y, needed, dy))
        return [next(found) if need else None for need in needs]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step, store, x, *parameters):
        ctx.index = None if store is None else store.keep(x)
        ctx.save_for_backward(x if store is None else None, *parameters)
        ctx.step, ctx.store = step, store
        return step.forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x = ctx.saved_tensors[0]  # read before anything is computed: it raises where a parameter has changed
        x = ctx.store.fetch(ctx.index) if x is None else x
        return None, None, *ctx.step.backward(x, dy, ctx.needs_input_grad[2:])


def recompute_step(step, x, parameters, store=None):
    """``step.forward(x)``, keeping x alone for ``step.backward``: on its device, or in ``store``, a ``PinnedStore``.

    Gradients go to x and to ``parameters``, all of which must take part.
    """
    return _Recomputed.apply(step, store, x, *parameters)


def recompute(function, x, others, parameters, store=None):
    """``function(x, *others)`` as a step: gradients go to x and ``parameters``, ``others`` get none."""
    return recompute_step(LiveStep(function, others, parameters), x, parameters, store)
