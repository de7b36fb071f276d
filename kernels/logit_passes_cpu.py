"""The CPU path of ``linear_logprob``: the passes of ``logit_passes`` in plain torch, tile after tile."""

import math

import torch

from . import output_head
from .logit_passes import addmm_, allocate, blocks

TILE = (512, 1024, 2**19)  # rows, words and elements of a tile, at most
LOWEST = -3.0e38  # in place of -inf, where -inf minus -inf or -inf times 0 would give NaN


def _logits(hidden, weight, bias, temperature, softcap):
    with torch.autocast("cpu", enabled=False):
        x = hidden @ weight.to(hidden.dtype).T
    if bias is not None:
        x += bias
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    return x if temperature == 1 else x.div_(temperature)


def _locate(target_ids, first_col, size):
    """Columns (N, 1) of the targets in the tile that starts at ``first_col``, and which of them lie in it."""
    col = target_ids[:, None] - first_col
    return col.clamp(0, size - 1), (col >= 0) & (col < size)


def forward(
    hidden, weight, scales, quant_block, first_block, bias, target_ids, temperature, softcap, entropy, gradient,
    workspace,
):  # fmt: skip
    """As ``logit_passes.forward``, in nats, with a running maximum in place of the reference."""
    head = output_head.from_operands(weight, scales, quant_block, first_block)
    outputs = logprobs, entropies, stats, direction, _ = allocate(hidden, len(hidden), entropy, gradient)
    wide, (row_step, col_step, _) = stats.dtype, TILE
    m, s = stats[0].fill_(LOWEST), stats[1].zero_()
    t, x_target = torch.zeros_like(s), torch.full_like(s, math.nan)
    direction.zero_()
    for cols in blocks(head.shape[0], col_step):
        w, b = output_head.rows(head, cols, hidden.dtype).to(wide), None if bias is None else bias[cols]
        for rows in blocks(len(hidden), row_step):
            x = _logits(hidden[rows].to(wide), w, b, temperature, softcap)
            col, inside = _locate(target_ids[rows], cols.start, x.shape[1])
            found = x.gather(1, col)
            x_target[rows] = torch.where(inside, found, x_target[rows, None]).squeeze(1)
            slope = None if softcap is None or not gradient else 1 - (x * (temperature / softcap)).square_()
            top = torch.maximum(m[rows], x.amax(1))
            x -= top[:, None]
            e = x.exp() if entropy else x.exp_()
            shift = m[rows] - top
            decay = shift.exp()
            if entropy:
                t_tile = x.clamp_(min=LOWEST).mul_(e).sum(1)
                t[rows] = (t[rows] + shift * s[rows]) * decay + t_tile
            s[rows] = s[rows] * decay + e.sum(1)
            m[rows] = top
            if gradient:
                e.scatter_(1, col, e.gather(1, col).masked_fill_(inside, 0))
                e = e if slope is None else e.mul_(slope)
                with torch.autocast("cpu", enabled=False):
                    addmm_(direction[rows].mul_(decay[:, None]), e, w)
    log_s = s.log()
    torch.sub(x_target - m, log_s, out=logprobs)
    if entropy:
        torch.sub(log_s, t / s, out=entropies)
    if gradient:
        own = -torch.expm1(logprobs) / temperature
        own = own if softcap is None else own * (1 - (x_target * (temperature / softcap)).square())
        for rows in blocks(len(hidden), row_step):
            target_weight = output_head.gather(head, target_ids[rows].clamp(0, head.shape[0] - 1), wide)
            others = direction[rows].div_(s[rows, None] * -temperature)
            others.addcmul_(own[rows, None], target_weight)
    s.copy_(log_s)
    return outputs


def forward_kept(
    hidden, weight, scales, quant_block, first_block, bias, target_ids, mask, temperature, softcap, entropy, gradient,
    workspace,
):  # fmt: skip
    """As ``logit_passes.forward_kept``."""
    rows = mask.nonzero()[:, 0]
    logprobs, entropies, *others = forward(
        hidden.index_select(0, rows), weight, scales, quant_block, first_block, bias,
        target_ids.index_select(0, rows), temperature, softcap, entropy, gradient, workspace,
    )  # fmt: skip
    scattered = lambda values: values.new_zeros(len(mask)).index_copy_(0, rows, values)
    return (scattered(logprobs), scattered(entropies) if entropy else entropies, *others), rows


def coefficients(hidden, weight, bias, target_ids, first_col, stats, upstream, temperature, softcap):
    x = _logits(hidden.to(stats.dtype), weight, bias, temperature, softcap)
    slope = None if softcap is None else 1 - (x * (temperature / softcap)).square_()
    log_p = x.sub_(stats[0, :, None]).sub_(stats[1, :, None])
    p, g = log_p.exp(), upstream[0, :, None]
    dz = p * -g
    col, inside = _locate(target_ids, first_col, dz.shape[1])
    dz.scatter_add_(1, col, torch.where(inside, g, 0))
    if len(upstream) == 2:
        dz -= log_p.clamp_(min=LOWEST).add_(stats[2, :, None]).mul_(p).mul_(upstream[1, :, None])
    return dz if slope is None else dz.mul_(slope)
