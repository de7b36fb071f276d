"""Rows that a mask keeps, counted and gathered on the device; the host learns how many while that has work to do."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "height"])
def _compact_kernel(mask_ptr, rows_ptr, counts_ptr, N, height, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Where mask (N,) is not 0, in order, to rows. To counts: how many, and how many of them a chunk takes.

    Chunks are as even as multiples of UNIT allow and of at most height rows. One program.
    """
    index = tl.arange(0, BLOCK)
    count = tl.zeros((), tl.int32)
    for start in range(0, N, BLOCK):
        kept = (tl.load(mask_ptr + start + index, mask=start + index < N, other=0) != 0).to(tl.int32)
        place = count + tl.cumsum(kept, 0) - kept
        tl.store(rows_ptr + place, (start + index).to(tl.int64), mask=kept != 0)
        count += tl.sum(kept, 0)
    chunks = tl.maximum(tl.cdiv(count, height), 1)
    tl.store(counts_ptr, count)
    tl.store(counts_ptr + 1, tl.minimum(count, tl.cdiv(tl.cdiv(count, UNIT), chunks) * UNIT))


@triton.jit(do_not_specialize=["first"])
def _gather_kernel(
    hidden_ptr, target_ptr, rows_ptr, counts_ptr, hidden_out_ptr, target_out_ptr, first, D, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Row rows[first + i] of hidden and its target to row i; where counts is given, no more than a chunk takes."""
    row = tl.program_id(0).to(tl.int64)
    inside = True
    if counts_ptr is not None:
        inside = row < tl.load(counts_ptr + 1)
    if inside:
        source = tl.load(rows_ptr + first + row)
        tl.store(target_out_ptr + row, tl.load(target_ptr + source))
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            value = tl.load(hidden_ptr + source * D + dims, mask=dims < D)
            tl.store(hidden_out_ptr + row * D + dims, value, mask=dims < D)


class KeptRows:
    """The rows where ``mask`` (N,) is True, found on the device, and how many: at once there, later on the host.

    ``counts``: how many there are, and how many the first chunk takes. Chunks are of at most ``height`` rows each and
    as even as multiples of ``unit`` allow.
    """

    def __init__(self, mask, height, unit):
        self.unit = unit
        self.rows = torch.empty(len(mask), dtype=torch.int64, device=mask.device)
        self.counts = torch.empty(2, dtype=torch.int32, device=mask.device)
        _compact_kernel[(1,)](
            mask.contiguous().view(torch.uint8), self.rows, self.counts, len(mask), height, UNIT=unit, BLOCK=4096,
            num_warps=8,
        )  # fmt: skip
        self.host, self.copied = self.counts, None
        if mask.is_cuda:
            self.host = torch.empty(2, dtype=torch.int32, pin_memory=True).copy_(
                self.counts, non_blocking=True
            )
            self.copied = torch.cuda.Event()
            self.copied.record()

    def gather(self, hidden, target_ids, rows, *, known=True):
        """hidden and targets of the kept ``rows`` (a slice), copied; of no more than there are, where not known."""
        n, D = rows.stop - rows.start, hidden.shape[1]
        out, targets = hidden.new_empty((n, D)), target_ids.new_empty(n)
        _gather_kernel[(n,)](
            hidden, target_ids, self.rows, None if known else self.counts, out, targets, rows.start, D,
            BLOCK_D=min(1024, triton.next_power_of_2(D)), num_warps=4,
        )  # fmt: skip
        return out, targets

    def wait(self):
        """(how many, how many at a time): all the host has launched by now needs neither."""
        if self.copied is not None:
            self.copied.synchronize()
        count, first = self.host.tolist()
        return count, max(self.unit, triton.cdiv(first, self.unit) * self.unit)
