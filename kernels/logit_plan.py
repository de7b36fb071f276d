"""How many rows and words ``logit_passes`` takes at a time: the least time by a count of waves, within a budget."""

import functools
import math

import triton

ROW_UNIT, COL_UNIT = 128, 256  # chunks are multiples of these, and these of every tile
LOST = 0.2  # of the half wave that the second matmul does not fill
TOLD = 1.01  # times closer than this are equal: so far apart lie this count and measured times
HOST = 16_000  # what the host takes for the launches of a chunk: the device is never faster than that


def forward_bytes(R, C, V, D, itemsize, *, entropy, gradient, packed, copied, block_v=COL_UNIT):
    """Bytes alive in a forward pass over chunks of R rows and C words, besides its results (``linear_logprob``)."""
    statistics = (3 if entropy else 2) * 4 * R * triton.cdiv(V, block_v) + 24 * R
    copy = C * D * itemsize if copied else 0  # of a weight that is 4-bit or of another dtype
    if not gradient:
        return statistics + copy
    # The target's weights of each row: gathered, then converted.
    targets = 3 * R * D * itemsize if copied else 0
    return statistics + copy + targets + R * C * itemsize + (4 * R * D if packed else 0)


@functools.lru_cache(maxsize=256)
def plan(N, V, D, itemsize, budget, processors, *, entropy, gradient, packed, copied, block_v):
    """(R, C) within ``budget`` bytes that take the least time by a count of waves; at least one pair must fit."""
    size = functools.partial(
        forward_bytes, V=V, D=D, itemsize=itemsize, entropy=entropy, gradient=gradient, packed=packed,
        copied=copied, block_v=block_v,
    )  # fmt: skip
    how = {"D": D, "processors": processors, "gradient": gradient, "copied": copied}
    breadth, words, total = triton.cdiv(D, 256), triton.cdiv(V, COL_UNIT), triton.cdiv(N, ROW_UNIT)
    # Equal parts, and heights at which the second matmul fills whole waves.
    heights = {triton.cdiv(total, parts) for power in range(12) for parts in (2**power, 3 * 2**power)}
    heights |= {min(total, max(1, waves * processors // breadth)) for waves in range(1, 5)}
    plans = []
    for height in sorted(heights | {1}):
        fixed = size(height * ROW_UNIT, 0)
        widest = (budget - fixed) // max(1, size(height * ROW_UNIT, 1) - fixed) // COL_UNIT
        widest = words if size(height * ROW_UNIT, V) <= budget else min(widest, words)
        full, rest = divmod(total, height)
        if widest < 1 or (full and 0 < rest < height / 2):  # so short a rest takes longer than by this count
            continue
        for width in _widths(height, widest, words, processors):
            time = full * _time(height, width, words, **how) + (
                _time(rest, width, words, **how) if rest else 0
            )
            chunks = triton.cdiv(total, height) * triton.cdiv(words, width)
            plans.append((time, chunks, height * ROW_UNIT, min(width * COL_UNIT, V)))
    return _fewest(plans)[2:]


def _fewest(plans):
    """Of (time, chunks, ...) the one with the fewest chunks among those as fast as any, as far as one can tell."""
    limit = TOLD * min(plans)[0]
    return min((chunks, time, *rest) for time, chunks, *rest in plans if time <= limit)


def _widths(height, widest, words, processors):
    """Widths of chunks up to ``widest``: that, equal parts of ``words``, and some whose tiles fill whole waves."""
    waves = height * widest // processors
    widths = {max(1, wave * processors // height) for wave in range(max(1, waves - 3), waves + 1)}
    return widths | {widest, triton.cdiv(words, triton.cdiv(words, widest))}


@functools.lru_cache(maxsize=256)
def width_of(height, widest, words, **how):
    """The width of the best chunks of at most ``widest`` tiles for ``height`` row blocks and ``words`` tiles."""
    widths = _widths(height, widest, words, how["processors"])
    return _fewest(
        [(_time(height, width, words, **how), triton.cdiv(words, width), width) for width in widths]
    )[2]


def _time(height, width, words, *, D, processors, gradient, copied):
    """Time of ``height`` row blocks over ``words`` tiles of words in chunks of ``width``.

    The unit is one word or one hidden dimension of a 128 x 256 tile, 11 ns on an H200. A wave of logits takes D + 768
    of them, one of the second matmul C + 512 (its float32 output is read and written), the ends of a chunk 1800.
    """

    def chunk(width):
        C = width * COL_UNIT
        time = triton.cdiv(height * width, processors) * (D + 768) + 1800
        if gradient:
            # The library cuts this product to fit the card, so that little of a last wave's rest is lost.
            waves = height * triton.cdiv(D, 256) / processors
            waves += LOST * (math.ceil(2 * waves) / 2 - waves) + 0.04
            time += waves * (C + 512)
        return max(time + (C * D // 2**14 if copied else 0), HOST)

    full, rest = divmod(words, width)
    return full * chunk(width) + (chunk(rest) if rest else 0)
