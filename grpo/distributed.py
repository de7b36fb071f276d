"""Several processes that train one policy: ``torchrun --nproc-per-node 2 -m nanogrpo.grpo train ...``.

Every rank holds the whole policy. The prompts of a step are split over the ranks; each samples and rewards its own,
and all get the whole batch of rollouts, so that advantages, denominators and metrics are those of one rank. Scoring
and training are split by group; gradients are added up in float32 before the one optimiser step that every rank takes
alike. NCCL carries what is on CUDA, Gloo what is on the CPU. A rank that ends, or is silent for ``TIMEOUT``, ends the
others with an error.
"""

import contextlib
import importlib
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)
BUCKET = 8 * 2**20  # values that are added up at once, in 32 MiB beside the gradients
GOLDEN = 0x9E3779B97F4A7C15  # what the sampler's counter-based generator adds to its seed for each prompt


@dataclass(frozen=True)
class Ranks:
    """This process's ``rank`` of ``world``; of one, every method gives back what it was given."""

    rank: int = 0
    world: int = 1

    @property
    def main(self):
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    def part(self, count):
        """The range of 0 .. count - 1 that is this rank's: contiguous, in the order of ranks, as even as can be."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def rows(self, batch):
        """The rows of a ``RolloutBatch`` that this rank trains on: whole groups, of about as many tokens a rank."""
        if self.world == 1:
            return list(range(len(batch)))
        lengths, total = batch.cu_seqlens.diff().tolist(), int(batch.cu_seqlens[-1])
        groups, owner, before = batch.group_ids.tolist(), {}, 0
        for group in dict.fromkeys(groups):
            size = sum(length for length, g in zip(lengths, groups, strict=True) if g == group)
            # By where the middle of a group lies: contiguous, since that only grows.
            owner[group] = min(self.world - 1, self.world * (2 * before + size) // (2 * total))
            before += size
        return [row for row, group in enumerate(groups) if owner[group] == self.rank]

    def gather(self, thing):
        """What each rank gave, a list in the order of ranks: anything that pickles, tensors on the CPU."""
        if self.world == 1:
            return [thing]
        gathered = [None] * self.world
        with _named_errors():
            # Objects lie in CPU memory, so of both backends torch takes Gloo: no copy on a card, and a rank that has
            # ended is an error at once, where NCCL would wait for it.
            dist.all_gather_object(gathered, thing)
        return gathered

    def any(self, flag):
        return any(self.gather(bool(flag)))

    @torch.no_grad()
    def sum_gradients(self, parameters):
        """Add up the gradients of all ranks in place, in float32; a missing one counts as 0.

        parameters: a list, of one device. Beside the gradients 4 ``BUCKET`` bytes of that device are in use (8 of
        16-bit gradients), or as many a value of the largest parameter, if more.
        """
        if self.world == 1:
            return
        for bucket in _buckets(parameters):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in bucket]
            # On the card, for NCCL, also where the gradients are pinned CPU memory that the card sees.
            total = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
            with _named_errors():
                dist.all_reduce(total)
            parts = total.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(parameters):
    """``parameters`` in order, in lists of ``BUCKET`` values at most; a larger one is a list of its own."""
    bucket, size = [], 0
    for parameter in parameters:
        if bucket and size + parameter.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


@contextlib.contextmanager
def _named_errors():
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"another rank has ended or was silent for {TIMEOUT.total_seconds():.0f} s: {error}"
        ) from error


def seed_from(seed, first):
    """The seed under which the sampler's prompt 0 draws what prompt ``first`` draws under ``seed``.

    Its generator begins by adding ``GOLDEN`` (prompt + 1) to the seed, modulo 2^64.
    """
    shifted = (seed + GOLDEN * first) % 2**64
    return shifted - 2**64 if shifted >= 2**63 else shifted


@contextlib.contextmanager
def launched(device):
    """The ``Ranks`` of a process that torchrun started, connected; of any other, one. device: the run's setting."""
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    if device is not None and ":" in device:
        raise ValueError(f"device must be cpu or cuda where torchrun starts several ranks, got {device!r}")
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        torch.cuda.set_device(dist.get_node_local_rank())
    # Imported while a group lives, as optimisers do, it keeps that group, whose threads then outlast the interpreter.
    importlib.import_module("torch._dynamo")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    yield Ranks(dist.get_rank(), dist.get_world_size())
    # After an error the others may never come: the process just ends.
    dist.destroy_process_group()
