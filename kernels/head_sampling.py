"""Draw next tokens from an output head, whose logits exist for a slice of the vocabulary at a time.

    logits = hidden_states @ head.T                       hidden_states (R, D), head (V, D); logits float32
    tokens, logprobs: those of ``sample_tokens`` on all logits, one draw a row

The head is read once, slice by slice; a slice's logits leave the maximum and the sum of exponentials of each PART
tokens, and make room for the next. A draw finds the chunk of PARTS parts in which the cumulative sum passes u, then
the part, whose logits it makes once more: PART rows of the head. Bytes: V D b for b-byte values, R PART D b, and the
logits written and read. Memory beside the outputs: the logits of a slice, 4 R CHUNK at least, and 8 R ceil(V / PART).

Precision: as ``token_sampling`` says, for logits that are sums of D products in float32. Those of the drawn part are
summed in another order than the slice's, which moves a border between two tokens by rounding, and a log-probability
likewise. Sums run in fixed order; a row's logits depend on no other row as far as
the library keeps to one algorithm for a number of rows.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import _runtime
from .dependent_launch import dependent_launch, wait_for_inputs
from .dispatch import check_floating
from .token_sampling import (
    CHUNK,
    PART,
    _counter_uniform,
    _find,
    _scaled,
    checked_noise,
    counter_uniform_ref,
    sample_tokens_ref,
)

PARTS = CHUNK // PART
SLICE_BYTES = 40 * 2**20  # logits that exist at once, unless one chunk of the vocabulary has more
STATS_WARPS, DRAW_WARPS = 4, 8
BLOCK_BYTES, STAGES = 256, 4  # of a row of the head at a time, and how many are on their way
COPIES = 16  # of a row, where it is multiplied: the rows that tensor cores take


def sample_from_head_ref(hidden_states, head, uniforms, temperature):
    """Specification of :func:`sample_from_head`; also in float64."""
    logits = F.linear(hidden_states, head)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    rows = torch.arange(len(logits), device=logits.device)
    return sample_tokens_ref(logits, rows, uniforms, temperature)


@triton.jit
def _slice_kernel(
    logits, peaks, sums, tokens, first_part, parts, chunks, row_stride, temperature,
    GREEDY: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """peaks and sums (R, parts) float32 from first_part on: of each PART of ``tokens`` logits of a slice."""
    wait_for_inputs(PDL)
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    part = chunk * (CHUNK // PART) + tl.arange(0, CHUNK // PART)
    token = part[:, None] * PART + tl.arange(0, PART)[None, :]
    x = tl.load(logits + row * row_stride + token, mask=token < tokens, other=float("-inf"))
    x = _scaled(x, temperature, GREEDY)
    peak = tl.max(x, axis=1)
    total = tl.sum(tl.exp(x - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), axis=1)
    at, there = row * parts + first_part + part, part * PART < tokens
    tl.store(peaks + at, peak, mask=there)
    tl.store(sums + at, total, mask=there)


@triton.jit
def _remade_logits(
    hidden_states, head, row, start, V, D: tl.constexpr, row_stride, head_stride, PART: tl.constexpr,
    COPIES: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits (PART,) float32 of the tokens from ``start`` on, -inf beyond the vocabulary."""
    token, copy = start + tl.arange(0, PART), tl.arange(0, COPIES)[:, None]
    acc = tl.zeros([COPIES, PART], tl.float32)
    for begin in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = begin + tl.arange(0, BLOCK_D)
        there = (token < V)[:, None] & (d < D)[None, :]
        weight = tl.load(head + token.to(tl.int64)[:, None] * head_stride + d[None, :], mask=there, other=0.0)
        at = hidden_states + row * row_stride + d[None, :] + 0 * copy
        x = tl.load(at, mask=(d < D)[None, :], other=0.0)
        acc = tl.dot(x, weight.T, acc, input_precision="ieee")
    acc = tl.sum(tl.where(copy == 0, acc, 0.0), axis=0)
    return tl.where(token < V, acc, float("-inf"))


@triton.jit
def _draw_part_kernel(
    hidden_states, head, peaks, sums, uniforms, seed, prompt_index, group_index, position, tokens, logprobs,
    V, parts, row_stride, head_stride, seed_stride, temperature,
    D: tl.constexpr, GREEDY: tl.constexpr, KEYED: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr, COPIES: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """tokens and logprobs (R,), one draw a program."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    c, j = tl.arange(0, CHUNKS), tl.arange(0, PARTS)
    part = c[:, None] * PARTS + j[None, :]
    peak = tl.load(peaks + row * parts + part, mask=part < parts, other=float("-inf"))
    top = tl.max(tl.max(peak, axis=1), axis=0)
    share = tl.where(peak == float("-inf"), 0.0, tl.exp(peak - top)).to(tl.float64)
    masses = share * tl.load(sums + row * parts + part, mask=part < parts, other=0.0).to(tl.float64)
    masses = tl.sum(masses, axis=1)
    total = tl.sum(masses, axis=0)
    lane = tl.arange(0, PART)
    if GREEDY:
        first = tl.min(tl.min(tl.where(peak == top, part, CHUNKS * PARTS), axis=1), axis=0)
        start = tl.minimum(first, parts - 1) * PART
    else:
        if KEYED:
            s, p = tl.load(seed + row * seed_stride), tl.load(prompt_index + row)
            u = _counter_uniform(s, p, tl.load(group_index + row), tl.load(position + row))
        else:
            u = tl.load(uniforms + row)
        target = u * total
        chunk = _find(masses, c, target, CHUNKS)
        target -= tl.sum(tl.where(c < chunk, masses, 0.0), axis=0)
        # From here on in units of exp(the own maximum), first of the chunk, then of the part.
        inside = chunk * PARTS + j < parts
        own = tl.load(peaks + row * parts + chunk * PARTS + j, mask=inside, other=float("-inf"))
        chunk_top = tl.max(own, axis=0)
        target = (target / tl.exp(chunk_top - top).to(tl.float64)).to(tl.float32)
        masses = tl.where(own == float("-inf"), 0.0, tl.exp(own - chunk_top))
        masses *= tl.load(sums + row * parts + chunk * PARTS + j, mask=inside, other=0.0)
        found = _find(masses, j, target, PARTS)
        target -= tl.sum(tl.where(j < found, masses, 0.0), axis=0)
        part_top = tl.load(peaks + row * parts + chunk * PARTS + found)
        target /= tl.exp(part_top - chunk_top)
        start = (chunk * PARTS + found) * PART
    x = _remade_logits(
        hidden_states, head, row, start, V, D, row_stride, head_stride, PART, COPIES, BLOCK_D, STAGES
    )
    if GREEDY:
        found = tl.min(tl.where(x == tl.max(x, axis=0), lane, PART), axis=0)
    else:
        found = _find(tl.exp(_scaled(x, temperature, GREEDY) - part_top), lane, target, PART)
    drawn = _scaled(tl.sum(tl.where(lane == found, x, 0.0), axis=0), temperature, GREEDY)
    tl.store(tokens + row, tl.minimum(start + found, V - 1).to(tl.int64))
    tl.store(logprobs + row, drawn - top - tl.log(total.to(tl.float32)))


def _slices(V, rows, slice_bytes):
    """(start, stop) of slices of the vocabulary, of nearly equal numbers of chunks."""
    chunks = triton.cdiv(V, CHUNK)
    count = triton.cdiv(chunks, max(1, slice_bytes // (4 * CHUNK * rows)))
    size = CHUNK * triton.cdiv(chunks, count)
    return [(start, min(start + size, V)) for start in range(0, V, size)]


def _sample_from_head_triton(
    hidden_states: torch.Tensor, head: torch.Tensor, uniforms: torch.Tensor | None, keys: list[torch.Tensor],
    temperature: float, slice_bytes: int,
) -> list[torch.Tensor]:  # fmt: skip
    tokens, logprobs = _fake(hidden_states, head, uniforms, keys, temperature, slice_bytes)
    (R, D), V, greedy = hidden_states.shape, len(head), temperature == 0
    if not R:
        return [tokens, logprobs]
    parts = triton.cdiv(V, PART)
    peaks, sums = torch.empty(2, R, parts, dtype=torch.float32, device=head.device)
    noise = logprobs if uniforms is None else uniforms.contiguous()  # whatever is not read is any tensor
    seed, *others = keys or [tokens] * 4
    others = [t.contiguous() for t in others]
    launch = dependent_launch(head)
    half = {"out_dtype": torch.float32} if head.is_cuda and head.dtype != torch.float32 else {}
    with _runtime.launch_on(head):
        for start, stop in _slices(V, R, slice_bytes):
            logits = torch.mm(hidden_states, head[start:stop].T, **half).float()
            chunks = triton.cdiv(stop - start, CHUNK)
            _slice_kernel[(R * chunks,)](
                logits, peaks, sums, stop - start, start // PART, parts, chunks, logits.stride(0), temperature,
                GREEDY=greedy, CHUNK=CHUNK, PART=PART, num_warps=STATS_WARPS, **launch,
            )  # fmt: skip
            del logits  # its room is the next one's
        _draw_part_kernel[(R,)](
            hidden_states, head, peaks, sums, noise, seed, *others, tokens, logprobs, V, parts,
            hidden_states.stride(0), head.stride(0), 0 if len(seed) == 1 else seed.stride(0), temperature,
            D=D, GREEDY=greedy, KEYED=bool(keys), CHUNKS=max(2, triton.next_power_of_2(triton.cdiv(V, CHUNK))),
            PARTS=PARTS, PART=PART, COPIES=COPIES,
            BLOCK_D=max(16, min(BLOCK_BYTES // head.element_size(), triton.next_power_of_2(D))), STAGES=STAGES,
            num_warps=DRAW_WARPS, **launch,
        )  # fmt: skip
    return [tokens, logprobs]


def _sample_from_head_torch(hidden_states, head, uniforms, keys, temperature, slice_bytes):
    if keys and temperature > 0:
        uniforms = counter_uniform_ref(*torch.broadcast_tensors(*keys))
    return list(sample_from_head_ref(hidden_states, head, uniforms, temperature))


def _fake(hidden_states, head, uniforms, keys, temperature, slice_bytes):
    R = len(hidden_states)
    dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
    return [head.new_empty(R, dtype=torch.int64), head.new_empty(R, dtype=dtype)]


_op = _runtime.register(
    "sample_from_head", triton_impl=_sample_from_head_triton, torch_impl=_sample_from_head_torch, fake=_fake
)


def sample_from_head(hidden_states, head, temperature, *, uniforms=None, keys=None, slice_bytes=SLICE_BYTES):
    """Draw R tokens from the distributions over the whole vocabulary that a head gives of R hidden states.

    Args:
        hidden_states: (R, D) float32, float16 or bfloat16 (float64 on the CPU).
        head: (V, D), of its dtype.
        temperature: >= 0; 0 takes the largest logit, the first of equal ones.
        uniforms: (R,) float64 in (0, 1).
        keys: instead of ``uniforms``, (seed, prompt_index, group_index, position) as ``counter_uniform`` takes them,
            each (R,); the seed also (1,) or an int. Temperature 0 needs neither.
        slice_bytes: of logits that exist at once, unless CHUNK tokens have more.

    Returns:
        tokens (R,) int64; logprobs (R,) float32 at the temperature, at 1 where it is 0, over the full vocabulary. A
        row whose logits hold NaN gives a token below V and the log-probability NaN.

    Raises:
        ValueError: a shape, dtype, device or the temperature is not as above, or the noise has not one source.
    """
    R, device = len(hidden_states), head.device
    if (
        hidden_states.ndim != 2
        or head.ndim != 2
        or hidden_states.shape[1] != head.shape[1]
        or not head.numel()
    ):
        raise ValueError(
            f"hidden_states is {tuple(hidden_states.shape)} and the head {tuple(head.shape)}, expected (R, D), (V, D)"
        )
    check_floating("the head", head)
    if hidden_states.dtype != head.dtype or hidden_states.device != device:
        raise ValueError(
            f"hidden_states is {hidden_states.dtype} on {hidden_states.device}, the head {head.dtype} on {device}, "
            "expected one dtype on one device"
        )
    keys = checked_noise(R, device, temperature, uniforms, keys)
    hidden_states, head = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden_states, head))
    tokens, logprobs = _op(
        hidden_states.detach(), head.detach(), uniforms, keys, float(temperature), slice_bytes
    )
    return tokens, logprobs
