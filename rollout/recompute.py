"""Activation checkpointing of a layer: its input is kept, everything else is computed a second time for backward.

torch's own checkpointing reads the random state, which waits for the device, and hooks every saved tensor; a layer
without randomness needs neither.
"""

import torch


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, others, x, *parameters):
        ctx.save_for_backward(x, *parameters)
        ctx.function, ctx.others = function, others
        return function(x, *others)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[2])
        needed = [t for t, need in zip((x, *parameters), ctx.needs_input_grad[2:], strict=True) if need]
        with torch.enable_grad():
            y = ctx.function(x, *ctx.others)
        found = iter(torch.autograd.grad(y, needed, dy))
        return None, None, *(next(found) if need else None for need in ctx.needs_input_grad[2:])


def recompute(function, x, others, parameters):
    """``function(x, *others)``, keeping x alone for backward.

    Gradients go to x and to ``parameters``, all of which must take part; ``others`` get none.
    """
    return _Recomputed.apply(function, others, x, *parameters)
