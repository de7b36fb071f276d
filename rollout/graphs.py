"""CUDA graphs of a policy's steps, captured on first use and kept while what they hold of the policy stays valid."""

import torch

MAX_GRAPHS = 64


class StepGraphs:
    """Captured steps by key, in one memory pool: they run one after another, never at once.

    Weights and adapters are read where they stand, so graphs live through optimiser steps; weights or adapters that
    have moved, adapters of another scaling, or more than ``MAX_GRAPHS`` steps drop all graphs. Which adapters are on
    is part of every key.
    """

    def __init__(self, policy):
        self.policy = policy
        self.pool = None
        self.held = None
        self.captured = {}

    def get(self, key, make):
        """(state, run) of the step with this key; ``make()`` gives its state and the function to capture.

        The function runs once before it is captured, on the state as it was made.
        """
        held = _held(self.policy.model)
        key = *key, tuple(linear.adapter_on for _, linear in self.policy.model.linears())
        if held != self.held or (key not in self.captured and len(self.captured) >= MAX_GRAPHS):
            self.captured.clear()
            self.held = held
        if key not in self.captured:
            state, step = make()
            step()  # compiles what is to be captured
            graph = torch.cuda.CUDAGraph()
            if not self.captured:  # torch refuses a pool whose graphs are all gone
                self.pool = torch.cuda.graph_pool_handle()
            with torch.cuda.device(self.policy.device), torch.cuda.graph(graph, pool=self.pool):
                step()
            self.captured[key] = state, graph
        state, graph = self.captured[key]
        return state, graph.replay


def _held(model):
    """What a captured step has fixed of a model: where its tensors stand, their shapes, the adapters' scalings."""
    tensors, scalings = [model.embedding, model.head, model.norm], []
    for _, linear in model.linears():
        tensors += getattr(linear.weight, "codes", linear.weight), *linear.lora_a, *linear.lora_b
        scalings.append(linear.scaling)
    return [(tensor.data_ptr(), tensor.shape) for tensor in tensors], scalings
