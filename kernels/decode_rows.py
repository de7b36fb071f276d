"""The end of a decode step: rows take what was drawn and move on, or end; a record keeps it for the host.

For row b with alive = counts[b] < limits[b]:

    record[step, :, b] = drawn, logprob, kept         (of ended rows too: the host knows where a row ended)
    limits[b] = 0 where stops[drawn]
    tokens[b] = drawn; positions[b] += 1; counts[b] += 1              where alive
    context_lens[b] = positions[b] + 1 if counts[b] < limits[b] else 0
    step += 1

all in place, in one launch of one program: B is at most some hundreds. Bytes: about 150 a row. A step beyond the
record is not recorded.
"""

import torch
import triton
import triton.language as tl

from . import _runtime
from .dependent_launch import dependent_launch, wait_for_inputs
from .dispatch import route

BLOCK = 256


def advance_rows_ref(drawn, logprobs, kept, stops, words, context_lens, record, step):
    """Specification of :func:`advance_rows`."""
    tokens, positions, counts, limits = words
    alive = counts < limits
    for column, values in enumerate((drawn, logprobs, kept)):
        row = torch.ones_like(record[0, 0]) if values is None else values.to(record.dtype)
        here = torch.arange(len(record), device=record.device)[:, None] == step
        record[:, column] = torch.where(here, row, record[:, column])
    limits.copy_(torch.where(stops[drawn], 0, limits))
    tokens.copy_(torch.where(alive, drawn, tokens))
    positions += alive
    counts += alive
    context_lens.copy_(torch.where(counts < limits, positions + 1, 0))
    step += 1


@triton.jit
def _advance_kernel(
    drawn, logprobs, kept, stops, words, context_lens, record, step, B, steps,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    now = tl.load(step)
    for start in range(0, B, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = row < B
        token = tl.load(drawn + row, mask=mask, other=0)
        position = tl.load(words + B + row, mask=mask, other=0)
        count, limit = (
            tl.load(words + 2 * B + row, mask=mask, other=0),
            tl.load(words + 3 * B + row, mask=mask, other=0),
        )
        alive = count < limit
        stop = tl.load(stops + token, mask=mask, other=0) != 0
        slot, inside = record + now * 3 * B + row, mask & (now < steps)
        tl.store(slot, token.to(tl.float64), mask=inside)
        tl.store(slot + B, tl.load(logprobs + row, mask=mask, other=0.0).to(tl.float64), mask=inside)
        share = tl.full([BLOCK], 1.0, tl.float32)
        if kept is not None:
            share = tl.load(kept + row, mask=mask, other=0.0)
        tl.store(slot + 2 * B, share.to(tl.float64), mask=inside)
        limit = tl.where(stop, 0, limit)
        position += alive
        count += alive
        tl.store(words + row, token, mask=mask & alive)
        tl.store(words + B + row, position, mask=mask)
        tl.store(words + 2 * B + row, count, mask=mask)
        tl.store(words + 3 * B + row, limit, mask=mask)
        tl.store(context_lens + row, tl.where(count < limit, position + 1, 0).to(tl.int32), mask=mask)
    tl.store(step, now + 1)


def _advance_triton(
    drawn: torch.Tensor, logprobs: torch.Tensor, kept: torch.Tensor | None, stops: torch.Tensor,
    words: torch.Tensor, context_lens: torch.Tensor, record: torch.Tensor, step: torch.Tensor,
) -> None:  # fmt: skip
    with _runtime.launch_on(words):
        _advance_kernel[(1,)](
            drawn.contiguous(), logprobs.contiguous(), kept if kept is None else kept.contiguous(),
            stops.view(torch.uint8), words, context_lens, record, step, words.shape[1], len(record),
            BLOCK=BLOCK, num_warps=4, **dependent_launch(words),
        )  # fmt: skip


_advance = torch.library.custom_op(
    f"{_runtime.LIB}::advance_rows",
    _advance_triton,
    mutates_args=("words", "context_lens", "record", "step"),
    device_types="cuda",
)
_advance.register_kernel("cpu")(_advance_triton if _runtime.INTERPRET else advance_rows_ref)
_advance.register_fake(lambda *inputs: None)


def advance_rows(drawn, logprobs, kept, stops, words, context_lens, record, step):
    """Append what a decode step drew to its rows, in place.

    Args:
        drawn: (B,) int64, tokens, each below V.
        logprobs: (B,) float32; kept: (B,) float32, or None for ones.
        stops: (V,) bool, the tokens that end a row.
        words: (4, B) int64, contiguous: last token, its position, tokens generated, limit of these. Written.
        context_lens: (B,) int32, contiguous: the length with the last token, 0 once the row has ended. Written.
        record: (steps, 3, B) float64, contiguous: token, log-prob and kept share of each step. Written.
        step: (1,) int64, the step of the record that this is. Written.

    Raises:
        ValueError: a shape, dtype, device or layout is not as above.
    """
    B = len(drawn)
    expected = {
        "drawn": (drawn, (B,), torch.int64),
        "logprobs": (logprobs, (B,), torch.float32),
        "stops": (stops, (stops.numel(),), torch.bool),
        "words": (words, (4, B), torch.int64),
        "context_lens": (context_lens, (B,), torch.int32),
        "record": (record, (record.shape[0], 3, B), torch.float64),
        "step": (step, (1,), torch.int64),
    }
    if kept is not None:
        expected["kept"] = kept, (B,), torch.float32
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != words.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"expected {dtype} {shape} on {words.device}"
            )
    if not all(x.is_contiguous() for x in (stops, words, context_lens, record)):
        raise ValueError("expected stops, words, context_lens and record contiguous")
    run = route(_advance, _advance_triton, advance_rows_ref, words.device)
    run(drawn, logprobs, kept, stops, words, context_lens, record, step)
