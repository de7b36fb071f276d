"""CUDA graphs of a policy's steps, captured on first use and kept while what they hold of the policy stays valid."""

import weakref

import torch

MAX_GRAPHS = 64


class GraphPool:
    """Memory of graphs that run one after another, never at once, whoever captured them."""

    def __init__(self):
        self.graphs = weakref.WeakSet()
        self.handle = None

    def add(self, graph):
        """The handle to capture ``graph`` with."""
        if not len(self.graphs):  # torch refuses a pool whose graphs are all gone
            self.handle = torch.cuda.graph_pool_handle()
        self.graphs.add(graph)
        return self.handle


class StepGraphs:
    """Captured steps by key, in the policy's pool of memory.

    Weights and adapters are read where they stand, so graphs live through optimiser steps; weights or adapters that
    have moved, adapters of another scaling, or more than ``most`` steps drop all graphs. Which adapters are on
    is part of every key.
    """

    def __init__(self, policy, *, most=MAX_GRAPHS):
        self.policy = policy
        self.most = most
        self.held = None
        self.captured = {}

    def clear(self):
        """Drop all graphs, and with them their memory."""
        self.captured.clear()

    def get(self, key, make):
        """(state, run) of the step with this key; ``make()`` gives its state and the function to capture.

        The function runs once before it is captured, on the state as it was made. A step may be a list of functions,
        captured one by one, and ``run`` a list: the last runs before, and no other launches kernels that it does not.
        """
        held = _held(self.policy.model)
        key = *key, tuple(linear.adapter_on for _, linear in self.policy.model.linears())
        if held != self.held or (key not in self.captured and len(self.captured) >= self.most):
            self.clear()
            self.held = held
        if key not in self.captured:
            state, step = make()
            parts = step if isinstance(step, list) else [step]
            parts[-1]()  # compiles what is to be captured
            graphs = []
            for part in parts:
                graphs.append(torch.cuda.CUDAGraph())
                pool = self.policy.graph_pool.add(graphs[-1])
                with torch.cuda.device(self.policy.device), torch.cuda.graph(graphs[-1], pool=pool):
                    part()
            replays = [graph.replay for graph in graphs]
            self.captured[key] = state, replays if isinstance(step, list) else replays[0]
        return self.captured[key]


def _held(model):
    """What a captured step has fixed of a model: where its tensors stand, their shapes, the adapters' scalings."""
    tensors, scalings = [model.embedding, model.head, model.norm], []
    for _, linear in model.linears():
        tensors += getattr(linear.weight, "codes", linear.weight), *linear.lora_a, *linear.lora_b
        scalings.append(linear.scaling)
    return [(tensor.data_ptr(), tensor.shape) for tensor in tensors], scalings
