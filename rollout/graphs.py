"""CUDA graphs of a policy's steps, captured on first use and kept while what they hold of the policy stays valid."""

import contextlib
import functools
import gc
import weakref

import torch

MAX_GRAPHS = 64
WORKSPACE = 10 * 2**20  # bytes: the smallest piece that the allocator takes for one tensor alone


class GraphPool:
    """Memory of graphs that run one after another, never at once, whoever captured them.

    It is taken piece by piece, as captures ask for it, or with ``reserve`` at once: pieces do not merge, and what
    fits into none of them takes another. All is given back when no graph is left.
    """

    def __init__(self):
        self.graphs = weakref.WeakSet()
        self.pool = None
        self.room = 0  # bytes of the largest piece that was reserved
        self.used = False

    def open(self):
        """The ``MemPool``, made on first use. Its memory belongs to ``capture_stream``, as the allocator sees it."""
        if self.pool is None:
            self.pool = torch.cuda.MemPool()
        return self.pool

    def add(self, graph):
        """The handle to capture ``graph`` with."""
        if self.used:
            self.give_back()  # where a capture has failed, so that none of it is left
        self.used = True
        self.graphs.add(graph)
        return self.open().id

    @contextlib.contextmanager
    def working(self):
        """Inside, memory comes from here: for what is gone again before a graph runs."""
        before, stream = torch.cuda.current_stream(), capture_stream(torch.cuda.current_device())
        torch.cuda.empty_cache()  # a pool takes nothing that is kept for reuse elsewhere
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream), torch.cuda.use_mem_pool(self.open()):
                yield
        finally:
            before.wait_stream(stream)

    def reserve(self, size):
        """Have ``size`` bytes in one piece, before graphs have taken others."""
        if size > self.room:
            with self.working():
                torch.empty(size, dtype=torch.uint8, device="cuda")
            self.room = size

    def give_back(self):
        """Return the memory to the device, if no graph is left."""
        if not len(self.graphs):
            self.pool, self.room, self.used = None, 0, False


@functools.cache
def capture_stream(device):
    """The stream on which the graphs of a ``device`` (its index) are captured, with cuBLAS' workspace for it.

    The workspace outlives every graph: made during a capture, it would keep a pool's memory from being given back.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")  # a piece for it alone
            x = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
            torch.mm(x, x)
    return stream


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
        if self.captured:
            self.captured.clear()
            self.policy.graph_pool.give_back()

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
            graphs, pool = [], self.policy.graph_pool
            with torch.cuda.device(self.policy.device):
                with pool.working():
                    parts[-1]()  # compiles what is to be captured
                stream = capture_stream(torch.cuda.current_device())
                for part in parts:
                    graphs.append(torch.cuda.CUDAGraph())
                    with (
                        _uncollected(),
                        torch.cuda.graph(graphs[-1], pool=pool.add(graphs[-1]), stream=stream),
                    ):
                        part()
            replays = [graph.replay for graph in graphs]
            self.captured[key] = state, replays if isinstance(step, list) else replays[0]
        return self.captured[key]


@contextlib.contextmanager
def _uncollected():
    """Inside, no garbage is collected: another graph that is freed while one is captured ends the process."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _held(model):
    """What a captured step has fixed of a model: where its tensors stand, their shapes, the adapters' scalings."""
    tensors, scalings = [model.embedding, model.head, model.norm], []
    for _, linear in model.linears():
        tensors += getattr(linear.weight, "codes", linear.weight), *linear.lora_a, *linear.lora_b
        scalings.append(linear.scaling)
    return [(tensor.data_ptr(), tensor.shape) for tensor in tensors], scalings
