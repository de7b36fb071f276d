"""Draw tokens from logits in two launches, with noise that depends on a counter alone.

    p = softmax(logits / temperature)                     logits (R, V)
    token = the least t with p_0 + ... + p_t > u          u from ``uniforms``, or from ``counter_uniform`` of the keys
    logprob = log p_token

and at temperature 0: token = argmax(logits), the lowest of equal ones, and logprob at temperature 1.

The vocabulary is cut into chunks of CHUNK. The first kernel takes the maximum and the sum of exponentials of each
chunk; the second merges them for each draw, finds the chunk in which the cumulative sum passes u, the part of that
chunk and the token in that part. Bytes: one read of the logits, and B (4 CHUNK + 8 V / CHUNK). FLOPs: 3 R V. Memory
beside the outputs: 8 R ceil(V / CHUNK). Nothing waits for the device and no shape depends on values: both launches
can be captured in a CUDA graph, where tokens and keys are read live.

Precision: exponentials in float32, sums inside a chunk in float32, sums of chunks in float64. A token differs from
the float64 inverse of the cumulative distribution only where u is within rounding (8 units of float32 times
1 + max|logits / temperature|) of a border between two tokens; it never has probability 0. Sums run in fixed order: a
draw depends on its row of logits, its noise and the temperature, and on nothing else in the batch.

``counter_uniform`` chains the finaliser of SplitMix64 (Steele et al., OOPSLA 2014) over its keys.
"""

import torch
import triton
import triton.language as tl

from . import _runtime
from .dependent_launch import dependent_launch, wait_for_inputs

CHUNK = 2048
PART = 64  # tokens of a chunk that the last of the three searches covers
CHUNK_WARPS, DRAW_WARPS = 4, 4
KEY_BLOCK = 256
KEYS = ("prompt_index", "group_index", "position")
# SplitMix64's increment and the two factors of its finaliser.
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)


def _signed(value):
    """A 64-bit integer as int64 holds it: torch has no uint64 arithmetic."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x, bits):
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def counter_uniform_ref(seed, prompt_index, group_index, position):
    """Specification of :func:`counter_uniform` on int64 tensors of one shape."""

    def mix(x):
        x = (x ^ _shift_right(x, 30)) * _signed(MIX_1.value)
        x = (x ^ _shift_right(x, 27)) * _signed(MIX_2.value)
        return x ^ _shift_right(x, 31)

    state = seed
    for key in (prompt_index, group_index, position):
        state = mix(state + _signed(GOLDEN.value) * (key + 1))
    # 52 bits: with 53 the half would be rounded, and the largest draw to 1.
    return (_shift_right(mix(state), 12).double() + 0.5) * 2.0**-52


def sample_tokens_ref(logits, rows, uniforms, temperature):
    """Specification of :func:`sample_tokens`; also in float64."""
    scaled = logits / temperature if temperature > 0 else logits
    centred = scaled - scaled.amax(-1, keepdim=True)
    weights = centred.exp()
    log_total = weights.sum(-1, keepdim=True).log()
    if temperature == 0:
        tokens = logits.argmax(-1)[rows]
    else:
        cumulative = weights.cumsum(-1, dtype=torch.float64)[rows]
        threshold = uniforms[:, None] * cumulative[:, -1:]
        # At most the last token that adds to the sum, whatever is behind it.
        last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
        tokens = torch.searchsorted(cumulative, threshold, right=True).minimum(last)[:, 0]
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)  # where the sums are NaN
    return tokens, centred[rows, tokens] - log_total[rows, 0]


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def _counter_uniform(seed, prompt_index, group_index, position):
    """Float64 in (0, 1) of int64 values."""
    state = seed.to(tl.uint64)
    state = _mix(state + (prompt_index.to(tl.uint64) + 1) * GOLDEN)
    state = _mix(state + (group_index.to(tl.uint64) + 1) * GOLDEN)
    state = _mix(state + (position.to(tl.uint64) + 1) * GOLDEN)
    return ((_mix(state) >> 12).to(tl.int64).to(tl.float64) + 0.5) * 2.0**-52


@triton.jit
def _counter_uniform_kernel(seed, prompt_index, group_index, position, out, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < N
    s, p = tl.load(seed + i, mask=mask, other=0), tl.load(prompt_index + i, mask=mask, other=0)
    g, t = tl.load(group_index + i, mask=mask, other=0), tl.load(position + i, mask=mask, other=0)
    tl.store(out + i, _counter_uniform(s, p, g, t), mask=mask)


@triton.jit
def _scaled(logits, temperature, GREEDY: tl.constexpr):
    return logits if GREEDY else logits / temperature


@triton.jit
def _chunk_kernel(
    logits, peaks, sums, V, chunks, row_stride, temperature,
    GREEDY: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """peaks and sums (R, chunks) float32: maximum of logits / temperature, and sum of exponentials less it."""
    wait_for_inputs(PDL)
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + token, mask=token < V, other=float("-inf"))
    x = _scaled(x, temperature, GREEDY)
    peak = tl.max(x, axis=0)
    total = tl.sum(tl.exp(x - tl.where(peak == float("-inf"), 0.0, peak)), axis=0)
    tl.store(peaks + row * chunks + chunk, peak)
    tl.store(sums + row * chunks + chunk, total)


@triton.jit
def _find(masses, index, target, COUNT: tl.constexpr):
    """First index whose cumulative mass passes target, else the last of positive mass, else 0."""
    passed = (tl.cumsum(masses, axis=0) > target) & (masses > 0)
    # One reduction for all three cases: the last of positive mass is the least in the order from COUNT on.
    order = tl.where(passed, index, tl.where(masses > 0, 2 * COUNT - 1 - index, 2 * COUNT))
    least = tl.min(order, axis=0)
    return tl.where(least < COUNT, least, tl.where(least < 2 * COUNT, 2 * COUNT - 1 - least, 0))


@triton.jit
def _draw_kernel(
    logits, peaks, sums, rows, uniforms, seed, prompt_index, group_index, position, tokens, logprobs,
    V, chunks, row_stride, seed_stride, temperature,
    GREEDY: tl.constexpr, KEYED: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """tokens and logprobs (B,), one draw a program."""
    wait_for_inputs(PDL)
    draw = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + draw)
    c = tl.arange(0, CHUNKS)
    peak = tl.load(peaks + row * chunks + c, mask=c < chunks, other=float("-inf"))
    top = tl.max(peak, axis=0)
    share = tl.where(peak == float("-inf"), 0.0, tl.exp(peak - top)).to(tl.float64)
    masses = share * tl.load(sums + row * chunks + c, mask=c < chunks, other=0.0).to(tl.float64)
    total = tl.sum(masses, axis=0)
    source = logits + row * row_stride
    parts: tl.constexpr = CHUNK // PART
    part, lane = tl.arange(0, parts), tl.arange(0, PART)
    if GREEDY:
        first = tl.min(tl.where(peak == top, c, CHUNKS), axis=0)
        begin = tl.minimum(first, chunks - 1) * CHUNK
        token = begin + tl.arange(0, CHUNK)
        x = tl.load(source + token, mask=token < V, other=float("-inf"))
        pick = tl.minimum(tl.min(tl.where(x == top, token, V), axis=0), V - 1)
    else:
        if KEYED:
            s, p = tl.load(seed + draw * seed_stride), tl.load(prompt_index + draw)
            u = _counter_uniform(s, p, tl.load(group_index + draw), tl.load(position + draw))
        else:
            u = tl.load(uniforms + draw)
        target = u * total
        chunk = _find(masses, c, target, CHUNKS)
        before = tl.sum(tl.where(c < chunk, masses, 0.0), axis=0)
        # From here on in units of exp(chunk's own maximum), which no underflow reaches.
        peak = tl.load(peaks + row * chunks + chunk)
        target = ((target - before) / tl.exp(peak - top).to(tl.float64)).to(tl.float32)
        token = chunk * CHUNK + part[:, None] * PART + lane[None, :]
        x = tl.load(source + token, mask=token < V, other=float("-inf"))
        masses = tl.sum(tl.exp(_scaled(x, temperature, GREEDY) - peak), axis=1)
        found = _find(masses, part, target, parts)
        target -= tl.sum(tl.where(part < found, masses, 0.0), axis=0)
        start = chunk * CHUNK + found * PART
        x = tl.load(source + start + lane, mask=start + lane < V, other=float("-inf"))
        found = _find(tl.exp(_scaled(x, temperature, GREEDY) - peak), lane, target, PART)
        pick = start + found
    drawn = _scaled(tl.load(source + pick), temperature, GREEDY)
    tl.store(tokens + draw, pick.to(tl.int64))
    tl.store(logprobs + draw, drawn - top - tl.log(total.to(tl.float32)))


def _counter_uniform_triton(
    seed: torch.Tensor, prompt_index: torch.Tensor, group_index: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    out = _uniform_fake(seed, prompt_index, group_index, position)
    if N := out.numel():
        keys = [t.contiguous() for t in (seed, prompt_index, group_index, position)]
        with _runtime.launch_on(out):
            _counter_uniform_kernel[(triton.cdiv(N, KEY_BLOCK),)](*keys, out, N, BLOCK=KEY_BLOCK, num_warps=4)
    return out


def _uniform_fake(seed, prompt_index, group_index, position):
    return torch.empty(seed.shape, dtype=torch.float64, device=seed.device)


def _sample_tokens_triton(
    logits: torch.Tensor, rows: torch.Tensor, uniforms: torch.Tensor | None, keys: list[torch.Tensor],
    temperature: float,
) -> list[torch.Tensor]:  # fmt: skip
    tokens, logprobs = _fake(logits, rows, uniforms, keys, temperature)
    if not len(rows):
        return [tokens, logprobs]
    (R, V), chunks, greedy = logits.shape, triton.cdiv(logits.shape[1], CHUNK), temperature == 0
    peaks, sums = torch.empty(2, R, chunks, dtype=torch.float32, device=logits.device)
    sizes = V, chunks, logits.stride(0)
    rows = rows.contiguous()
    noise = logprobs if uniforms is None else uniforms.contiguous()  # whatever is not read is any tensor
    seed, *others = keys or [rows] * 4
    others = [t.contiguous() for t in others]
    launch = dependent_launch(logits)
    with _runtime.launch_on(logits):
        _chunk_kernel[(R * chunks,)](
            logits, peaks, sums, *sizes, temperature, GREEDY=greedy, CHUNK=CHUNK, num_warps=CHUNK_WARPS,
            **launch,
        )  # fmt: skip
        _draw_kernel[(len(rows),)](
            logits, peaks, sums, rows, noise, seed, *others, tokens, logprobs,
            *sizes, 0 if len(seed) == 1 else seed.stride(0), temperature,
            GREEDY=greedy, KEYED=bool(keys), CHUNKS=max(16, triton.next_power_of_2(chunks)), CHUNK=CHUNK,
            PART=PART, num_warps=DRAW_WARPS, **launch,
        )  # fmt: skip
    return [tokens, logprobs]


def _sample_tokens_torch(logits, rows, uniforms, keys, temperature):
    if keys and temperature > 0:
        uniforms = counter_uniform_ref(*torch.broadcast_tensors(*keys))
    return list(sample_tokens_ref(logits, rows, uniforms, temperature))


def _fake(logits, rows, uniforms, keys, temperature):
    return [rows.new_empty(rows.shape), logits.new_empty(rows.shape)]


_uniform_op = _runtime.register(
    "counter_uniform", triton_impl=_counter_uniform_triton, torch_impl=counter_uniform_ref, fake=_uniform_fake
)
_op = _runtime.register(
    "sample_tokens", triton_impl=_sample_tokens_triton, torch_impl=_sample_tokens_torch, fake=_fake
)


def _key_tensors(seed, prompt_index, group_index, position):
    """The four keys as int64 tensors on the device of ``prompt_index``."""
    others = (prompt_index, group_index, position)
    for name, t in zip(KEYS, others, strict=True):
        if t.dtype != torch.int64 or t.device != prompt_index.device:
            raise ValueError(
                f"{name} is {t.dtype} on {t.device}, expected torch.int64 on {prompt_index.device}"
            )
    if isinstance(seed, int):
        # A fill, which a CUDA graph can hold; a copy from the host could not be captured.
        seed = torch.full((1,), _signed(seed), dtype=torch.int64, device=prompt_index.device)
    if seed.dtype != torch.int64 or seed.device != prompt_index.device:
        raise ValueError(
            f"the seed is {seed.dtype} on {seed.device}, expected torch.int64 on {prompt_index.device}"
        )
    return [seed, *others]


def counter_uniform(seed, prompt_index, group_index, position):
    """Uniforms in (0, 1) keyed by (seed, prompt, member of the group, position).

    Args:
        seed: an int, or an int64 tensor; its low 64 bits count. Inside a CUDA graph a tensor is read live.
        prompt_index, group_index, position: int64 tensors, not negative; all four broadcast.

    Returns:
        float64 of the broadcast shape, equal bit for bit on every device.

    Raises:
        ValueError: a dtype or device is not as above, or the shapes do not broadcast.
    """
    keys = _key_tensors(seed, prompt_index, group_index, position)
    try:
        keys = torch.broadcast_tensors(*keys)
    except RuntimeError as error:
        raise ValueError(
            f"the keys have shapes {[tuple(t.shape) for t in keys]}, expected ones that broadcast"
        ) from error
    return _uniform_op(*keys)


def checked_noise(count, device, temperature, uniforms, keys, others=None):
    """The tensors of ``keys``, where all that ``count`` draws ask for is as it must be; else ValueError.

    others: {name: (tensor, dtype)} of more that has ``count`` values.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"the temperature is {temperature}, expected >= 0 and finite")
    if (uniforms is not None) + (keys is not None) != 1 and not (
        uniforms is keys is None and temperature == 0
    ):
        raise ValueError("expected either uniforms or keys, not both (neither at temperature 0)")
    expected = dict(others or {})
    if uniforms is not None:
        expected["uniforms"] = uniforms, torch.float64
    keys = [] if keys is None else _key_tensors(*keys)
    if keys:
        expected |= {name: (t, torch.int64) for name, t in zip(KEYS, keys[1:], strict=True)}
    for name, (t, dtype) in expected.items():
        if t.shape != (count,) or t.dtype != dtype or t.device != device:
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}, expected {dtype} ({count},) on {device}"
            )
    if keys and keys[0].shape not in ((1,), (count,)):
        raise ValueError(f"the seed has shape {tuple(keys[0].shape)}, expected (1,) or ({count},)")
    return keys


def sample_tokens(logits, rows, temperature, *, uniforms=None, keys=None):
    """Draw B tokens from R distributions over the whole vocabulary.

    Args:
        logits: (R, V) float32; -inf excludes a token. A row with NaN or +inf, or of -inf alone, gives a token below V
            and the log-probability NaN.
        rows: (B,) int64, the row of logits that each draw is from; on CUDA nothing checks their range.
        temperature: >= 0; 0 takes the largest logit, the first of equal ones.
        uniforms: (B,) float64 in (0, 1).
        keys: instead of ``uniforms``, (seed, prompt_index, group_index, position) as ``counter_uniform`` takes them,
            each (B,); the seed also (1,) or an int. Temperature 0 needs neither.

    Returns:
        tokens (B,) int64; logprobs (B,) float32 at the temperature, at 1 where it is 0, over the full vocabulary.

    Raises:
        ValueError: a shape, dtype, device, row or the temperature is not as above, or the noise has not one source.
    """
    if logits.ndim != 2 or logits.dtype != torch.float32 or not logits.shape[1]:
        raise ValueError(f"logits is {logits.dtype} {tuple(logits.shape)}, expected torch.float32 (R, V)")
    device, B = logits.device, rows.numel()
    keys = checked_noise(B, device, temperature, uniforms, keys, {"rows": (rows, torch.int64)})
    if device.type == "cpu" and not torch.compiler.is_compiling() and B:
        low, high = rows.min().item(), rows.max().item()
        _runtime.check(
            0 <= low and high < len(logits), f"rows is {low} to {high}, expected [0, {len(logits)})"
        )
    logits = logits.detach()
    tokens, logprobs = _op(
        logits if logits.stride(1) == 1 else logits.contiguous(), rows, uniforms, keys, float(temperature)
    )
    return tokens, logprobs
