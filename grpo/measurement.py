"""Where the time and the memory of a step go."""

import contextlib
import time

import torch

PHASES = ("rollout", "reward", "scoring", "forward", "backward", "optimizer")


class StepMeter:
    """Seconds by phase and, on CUDA, bytes of one step. Use as ``with meter("forward"): ...``; phases may nest.

    Time belongs to the innermost phase, so the phases never count a moment twice. On CUDA the device's work is
    finished at each border. Memory: what the allocator has given out and holds reserved, each at its highest; and of
    the whole card, other processes and the CUDA context included, at most: what is taken beside the allocator, at its
    highest as seen at the borders, and the most that it has reserved.
    """

    def __init__(self, device):
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.running = []
        self.beside = 0
        self.mark = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextlib.contextmanager
    def __call__(self, phase):
        self._lap()
        self.running.append(phase)
        try:
            yield
        finally:
            self._lap()
            self.running.pop()

    def _lap(self):
        """Give the time since the last border to the phase that runs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            self.beside = max(self.beside, total - free - torch.cuda.memory_reserved(self.device))
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.mark
        self.mark = now

    def metrics(self):
        """A flat dict: seconds_PHASE and, on CUDA, memory_allocated, memory_reserved and memory_card in bytes."""
        found = {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        if self.device.type == "cuda":
            found["memory_allocated"] = torch.cuda.max_memory_allocated(self.device)
            found["memory_reserved"] = torch.cuda.max_memory_reserved(self.device)
            found["memory_card"] = self.beside + found["memory_reserved"]
        return found


@contextlib.contextmanager
def unmeasured(phase):
    """In place of a ``StepMeter`` where nobody asks."""
    yield
