"""Products of a linear layer with low-rank adapters on many rows, most by a library: y, and the gradients.

With the names of ``lora_linear``: 5 + P launches forward, of which two round A and B and one dequantises, and 5 + 2 P
backward, beside those by which a library splits a sum. On Hopper base and adapter are one product for y and for dx
(``hopper_linear``), of enough rows unless the base's is long: 5 launches, for W in one piece, and 4 + 2 P. Elsewhere
the adapter's part of y, and of dx, is written first, and the base product adds itself to it: a pass over y less than
the other way round. There, where W is 4-bit and dx at least ``WIDE`` times as wide as dy, dx = [dy, scaling g] [W; A]
is one product of a library: a launch more, and two passes over dx less. (y = [x, scaling h] [W, B]^T does not pay:
libraries are slower at rows of K + r values.)

FLOPs of the adapters: 2 M r (N + K) forward, 2 M r (2 N + 3 K) backward for P = 1; h is made again. Memory beside the
outputs, in values of x's dtype: P r K + N r for the rounded A and B, 2 M P r for h and g, and, while a product with a
4-bit W runs, its N K values; of two ``pieces`` one, and in backward M K float32 sums. As a library's one product: a
copy of dy, and P r rows of A below W.

Precision: sums are float32. scaling * h and scaling * g are rounded to x's dtype once, where they enter the next
product, and so are the adapter's parts of y and dx where they are written first. dA and dB come in the dtype that is
asked for, from float32 sums.
"""

import torch

from .code_words import aligned
from .hopper_linear import fits, hopper_linear
from .logit_passes import addmm_
from .lora_decode import MAX_ROWS
from .quantization import dense, dense_into, pieces

WIDE = 2  # a copy of dy then costs less than two passes over dx


def spans_of(columns):
    """(first output, last output + 1, first row of B) of each part."""
    spans, row = [], 0
    for start, stop in zip(columns[::2], columns[1::2], strict=True):
        spans.append((start, stop, row))
        row += stop - start
    return spans


def _columns(matrix, start, stop):
    return matrix if stop - start == matrix.shape[1] else matrix[:, start:stop]


def _product(a, b, dtype):
    """a @ b, summed in float32, in ``dtype``."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    # In the parameter's dtype, so that half-precision sums are not rounded on their way.
    return torch.mm(a.to(dtype), b.to(dtype))


def _one_product(x, weight, a, b, y, spans, scaling, bias, quant_block, first_block):
    """y by ``hopper_linear`` where that fits each of the pieces in which W is dense; whether it did."""
    r, owned, given = b.shape[1], [], () if quant_block else weight
    for rows in pieces(y.shape[1], x.shape[1], quant_block):
        parts = [part for part, span in enumerate(spans) if span[0] < rows.stop and span[1] > rows.start]
        starts = [max(0, spans[part][0] - rows.start) for part in parts]
        if not fits(x, y[:, rows], r, b, *given, starts=starts):
            return False
        owned.append((rows, slice(parts[0] * r, (parts[-1] + 1) * r), starts))
    h = torch.addmm(x.new_empty(1), x, a.t(), beta=0, alpha=scaling)
    for rows, ranks, starts in owned:
        w = dense(weight, quant_block, first_block, x.dtype, rows)
        hopper_linear(x, w, h[:, ranks], b[rows], y[:, rows], None if bias is None else bias[rows], starts)
        del w  # before the next piece is made
    return True


def many_rows(x, weight, lora_a, lora_b, columns, scaling, bias, quant_block, first_block):
    """``few_rows``, without what may follow it, for more rows: y (M, N)."""
    M, N, x = len(x), len(weight[0]), aligned(x)  # where a view starts must not choose the product
    a, b, r, spans = lora_a.to(x.dtype), lora_b.to(x.dtype), lora_b.shape[1], spans_of(columns)
    whole = b.shape[0] == N  # no output is without an adapter
    if whole:
        y = x.new_empty(M, N)
    else:
        y = x.new_zeros(M, N) if bias is None else bias.expand(M, N).contiguous()
    if whole and _one_product(x, weight, a, b, y, spans, scaling, bias, quant_block, first_block):
        return y
    h = torch.mm(x, a.t())
    for part, (start, stop, first) in enumerate(spans):
        target = _columns(y, start, stop)
        operands = _columns(h, part * r, part * r + r), b[first : first + stop - start].t()
        if whole and bias is not None:
            torch.addmm(bias[start:stop], *operands, alpha=scaling, out=target)
        else:
            target.addmm_(*operands, beta=0 if whole else 1, alpha=scaling)
    for rows in pieces(N, x.shape[1], quant_block):
        y[:, rows].addmm_(x, dense(weight, quant_block, first_block, x.dtype, rows).t())
    return y


def gradients(
    dy, x, weight, lora_a, lora_b, columns, scaling, quant_block, first_block, needs_x, needs_lora, a_dtype, b_dtype
):  # fmt: skip
    """[dx, dA, dB of each part] from dy (M, N), which is not empty; empty tensors for what is not needed."""
    x, dy, a, b, r = aligned(x), aligned(dy), lora_a.to(x.dtype), lora_b.to(x.dtype), lora_b.shape[1]
    (N, K), ranks, spans = (dy.shape[1], x.shape[1]), len(lora_a), spans_of(columns)
    parts, given = pieces(N, K, quant_block), () if quant_block else weight
    whole = needs_x and len(parts) == 1 and fits(dy, x, ranks, a, *given)  # dx is shaped as x
    one_product = needs_x and not whole and quant_block and K >= WIDE * N and len(x) > MAX_ROWS
    both = dy.new_empty(len(dy), N * one_product + ranks)
    g = both[:, N * one_product :]  # g and h with the scaling in them
    for part, (start, stop, first) in enumerate(spans):
        target = _columns(g, part * r, part * r + r)
        operands = _columns(dy, start, stop), b[first : first + stop - start]
        target.addmm_(*operands, beta=0, alpha=scaling)
    dx, grads = dy.new_empty(0), [dy.new_empty(0) for _ in range(0 if needs_lora else 1 + len(spans))]
    if whole:
        w = dense(weight, quant_block, first_block, x.dtype)
        dx = hopper_linear(dy, w, g, a, torch.empty_like(x), by_rows=False)
        del w
    elif one_product:
        both[:, :N] = dy
        right = x.new_empty(N + ranks, K)
        dense_into(right[:N], weight, quant_block, first_block)
        right[N:] = a
        dx = torch.mm(both, right)
    elif needs_x:
        # between two parts the sum stays float32
        dx = _product(g, a, torch.float32 if len(parts) > 1 else x.dtype)
        for rows in parts:
            addmm_(dx, dy[:, rows], dense(weight, quant_block, first_block, x.dtype, rows))
        dx = dx.to(x.dtype)
    if needs_lora:
        h = torch.addmm(g, x, a.t(), beta=0, alpha=scaling)
        grads = [_product(g.t(), x, a_dtype)]
        for part, (start, stop, _) in enumerate(spans):
            factor = _columns(h, part * r, part * r + r)
            grads.append(_product(_columns(dy, start, stop).t(), factor, b_dtype))
    return [dx, *grads]
