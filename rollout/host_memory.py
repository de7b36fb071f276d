"""The CPU's memory in the service of a GPU: tensors that it uses where they lie, and weights laid out without gaps.

A kernel that gathers some rows of an embedding fetches those over PCIe, T D b bytes for T tokens; none of the table's
V D b bytes are on the card. Whatever kernel reads or writes such a tensor, PCIe is what it waits for.
"""

from dataclasses import replace

import torch

ALIGNMENT = 512  # bytes: where the allocator's own tensors begin


class _Mapped:
    """Pinned memory as CUDA's array interface describes it; torch keeps this object, and so the memory, alive."""

    def __init__(self, pinned):
        self.pinned = pinned
        self.__cuda_array_interface__ = {
            "data": (pinned.data_ptr(), False),
            "shape": (pinned.nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


def _of_device(pinned, device):
    mapped = torch.as_tensor(_Mapped(pinned.flatten().view(torch.uint8)), device=device)
    return mapped.view(pinned.dtype).view(pinned.shape)


def in_host_memory(tensor):
    """A copy of a CUDA tensor in pinned CPU memory, as a tensor of the same device, shape and dtype."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return _of_device(pinned, tensor.device)


def host_zeros(count, device):
    """(count,) float32 zeros in CPU memory, as a tensor of ``device``: pinned where that is a GPU."""
    if device.type == "cpu":
        return torch.zeros(count)
    return _of_device(torch.zeros(count, pin_memory=True), device)


def laid_out_again(weights, device, *, but=None):
    """The dict ``weights`` with the same values in one fresh piece of ``device``'s memory; ``but`` stays.

    Quantising leaves gaps between weights, of the size of what was quantised, that nothing later fits into; and
    behind a weight with memory of its own the allocator leaves up to 2 MiB unused.
    """
    moved = [name for name in weights if name != but]
    for name in moved:
        weights[name] = weights[name].to("cpu")
    torch.cuda.empty_cache()
    size = lambda tensor: -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    room = torch.empty(
        sum(size(part) for name in moved for part in _parts(weights[name]).values()),
        dtype=torch.uint8, device=device,
    )  # fmt: skip
    start = 0
    for name in moved:
        placed = {}
        for field, part in _parts(weights[name]).items():
            own = room[start : start + part.nbytes].view(part.dtype).view(part.shape)
            placed[field] = own.copy_(part)
            start += size(part)
        weights[name] = placed[None] if None in placed else replace(weights[name], **placed)
    return weights


def _parts(weight):
    """{field: tensor} of a 4-bit weight; of a dense one {None: itself}."""
    return {None: weight} if isinstance(weight, torch.Tensor) else weight.tensors()
