"""Float32 originals of a policy's adapters, their gradients and their moments, in the CPU's memory.

The GPU holds the adapters rounded to the compute dtype, and that is all: 2 bytes a trained value where AdamW in
float32 takes 16. Gradients leave it layer by layer as backward makes them, in float32; the optimiser's kernels read
and write the originals over PCIe, where they lie; then the adapters are rounded from them anew. So rounding never
adds up over the steps. On the CPU the same holds, of ordinary memory.

PCIe carries 4 bytes a value for the first micro-batch's gradients and 8 for every other, then 16 read and 12 written
by AdamW, 12 by clipping and 4 by rounding. CPU memory: 16 bytes a value, which the pinned allocator rounds up to a
power of two a layer.

Papers: master weights, Micikevicius et al. 2018, arXiv 1710.03740; offloaded optimisers, Ren et al. 2021, arXiv
2101.06840.
"""

import torch

from ..rollout.host_memory import host_zeros

MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterWeights:
    """parameters: the originals, by the names of ``Policy.adapters``; what an optimiser steps and a checkpoint keeps.

    From here on gradients of the policy's adapters are found at the originals.
    """

    def __init__(self, policy):
        self.originals = {}  # adapter -> its original
        self.gradients = {}  # adapter -> where its gradient is added up
        self.flat = {}  # first adapter of a layer -> the gradients of all of the layer
        self.moments = {}  # original -> its moments
        for layer in policy.model.layers:
            adapters = [adapter for adapter in layer.parameters_in_use() if adapter.requires_grad]
            if adapters:
                self._add_layer(adapters, policy.device)
        named = policy.adapters().items()
        self.parameters = {name: self.originals[a] for name, a in named if a in self.originals}
        policy.take_gradients = self.take_gradients

    def _add_layer(self, adapters, device):
        sizes = [adapter.numel() for adapter in adapters]
        flat = host_zeros((2 + len(MOMENTS)) * sum(sizes), device).view(-1, sum(sizes))
        self.flat[adapters[0]] = flat[1]
        for adapter, *parts in zip(adapters, *(row.split(sizes) for row in flat), strict=True):
            original, self.gradients[adapter], *moments = (part.view(adapter.shape) for part in parts)
            self.originals[adapter] = torch.nn.Parameter(original.copy_(adapter.detach()))
            self.moments[self.originals[adapter]] = moments
            adapter.register_post_accumulate_grad_hook(self._take)

    @torch.no_grad()
    def take_gradients(self, adapters, gradients):
        """Add ``gradients`` (values,) float32, those of all trained adapters of a layer one after the other."""
        if self.originals[adapters[0]].grad is not None:
            self.flat[adapters[0]].add_(gradients)
            return
        self.flat[adapters[0]].copy_(gradients)
        for adapter in adapters:
            self.originals[adapter].grad = self.gradients[adapter]

    @torch.no_grad()
    def _take(self, adapter):
        """Take one adapter's gradient over from autograd, which has it in the adapter's dtype."""
        if adapter.grad is None:  # taken above
            return
        original, gradient = self.originals[adapter], self.gradients[adapter]
        original.grad = gradient.copy_(adapter.grad) if original.grad is None else gradient.add_(adapter.grad)
        adapter.grad = None

    def keep_moments(self, optimizer):
        """Have a fresh ``torch.optim.AdamW`` of the originals keep its moments here."""
        for original, moments in self.moments.items():
            count = torch.zeros((), device=original.device)
            optimizer.state[original] = {"step": count, **dict(zip(MOMENTS, moments, strict=True))}

    @torch.no_grad()
    def publish(self):
        """Round the adapters from their originals."""
        for adapter, original in self.originals.items():
            adapter.copy_(original)
