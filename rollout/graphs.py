"""CUDA graphs of a policy's steps, captured on first use and kept while the addresses that they read stay valid."""

import torch

MAX_GRAPHS = 64


class StepGraphs:
    """Captured steps by key, in one memory pool: they run one after another, never at once.

    Adapters are read where they stand, so graphs live through optimiser steps; adapters that have moved, or
    ``MAX_GRAPHS`` of them, drop all graphs. Which adapters are on is part of every key.
    """

    def __init__(self, policy):
        self.policy = policy
        self.pool = None
        self.adapters = None
        self.captured = {}

    def get(self, key, make):
        """(state, run) of the step with this key; ``make()`` gives its state and the function to capture.

        The function runs once before it is captured, on the state as it was made.
        """
        adapters = tuple(p.data_ptr() for p in self.policy.adapters().values())
        if adapters != self.adapters or len(self.captured) >= MAX_GRAPHS:
            self.captured.clear()
            self.adapters = adapters
        key = *key, tuple(linear.adapter_on for _, linear in self.policy.model.linears())
        if key not in self.captured:
            state, step = make()
            step()  # compiles what is to be captured
            graph = torch.cuda.CUDAGraph()
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self.pool):
                step()
            self.captured[key] = state, graph
        state, graph = self.captured[key]
        return state, graph.replay
