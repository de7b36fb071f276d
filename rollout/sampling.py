"""From logits to tokens: filters, counter-based noise, and the log-probability of what was drawn."""

import math
import sys
from dataclasses import dataclass, field

import torch

from ..kernels import sample_from_head, sample_tokens

LOGIT_BYTES = 80 * 2**20  # logits that exist at once on a GPU where draws need all of a row's
SLICE_BYTES = 40 * 2**20  # and where they do not: more are made by slices of the vocabulary


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is drawn; the names and meanings are vLLM's.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. ``stop`` strings end a
    completion and are cut from its text; ``stop_token_ids`` end it beside the model's own end tokens, which
    ``ignore_eos`` disregards. ``logit_bias`` maps token ids to what is added to their logits. All noise comes from
    ``seed``.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self):
        rules = {
            "max_tokens must be at least 1": self.max_tokens >= 1,
            "min_tokens must be between 0 and max_tokens": 0 <= self.min_tokens <= self.max_tokens,
            "temperature must be >= 0 and finite": 0 <= self.temperature < math.inf,
            "top_k must be >= 0 (0: off)": self.top_k >= 0,
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "min_p must be in [0, 1]": 0 <= self.min_p <= 1,
            "repetition_penalty must be > 0": self.repetition_penalty > 0,
            "stop must be strings, none empty": not isinstance(self.stop, str) and all(self.stop),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{rule}, got {getattr(self, rule.split()[0])!r}")

    @property
    def filters(self):
        """Whether sampling is cut to part of the vocabulary."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def adjust_logits(logits, params, *, seen=None, bias=None):
    """Repetition penalty (arXiv 1909.05858) on the tokens ``seen`` (R, V) bool, then ``bias`` (V,) added."""
    if params.repetition_penalty != 1:
        factor = torch.where(logits > 0, 1 / params.repetition_penalty, params.repetition_penalty)
        logits = torch.where(seen, logits * factor, logits)
    return logits if bias is None else logits + bias


def filter_logits(logits, params):
    """Logits with -inf outside top-k, then top-p, then min-p, each over what the one before it kept."""
    if params.top_k and params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= params.top_p  # the first token past the mass is still kept
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    if params.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return logits


def sample(logits, rows, noise, params, *, seen=None, bias=None, banned=None):
    """Draw B tokens from R distributions by inverting the cumulative distribution.

    It waits for nothing and its shapes are those of its inputs, so that a CUDA graph can hold it.

    Args:
        logits: (R, V) float32, as the model gives them.
        rows: (B,) int64, the row of logits that each draw is from.
        noise: (seed (1,), prompt index, group index, position), the latter (B,), all int64; or the uniforms (B,)
            float64 that the kernels' ``counter_uniform`` makes of them.
        params: ``SamplingParams``.
        seen: (R, V) bool, the tokens so far of each row, for the repetition penalty.
        bias: (V,) float32, added to the logits (``logit_bias``), or None.
        banned: (R, V) bool, tokens that must not be drawn, or None.

    Returns:
        tokens (B,) int64; logprobs (B,) float32 of the unadjusted logits at the sampling temperature (1 if
        greedy) over the full vocabulary; kept (B,) float32, the share of that distribution inside the filters, or
        None where there are none.
    """
    noise = {"uniforms" if isinstance(noise, torch.Tensor) else "keys": noise}
    choice = adjust_logits(logits, params, seen=seen, bias=bias)
    if banned is not None:
        choice = choice.masked_fill(banned, -torch.inf)
    if choice is logits and (params.temperature == 0 or not params.filters):
        return *sample_tokens(logits, rows, params.temperature, **noise), None
    logprobs = (logits / params.temperature if params.temperature > 0 else logits).log_softmax(-1)
    kept = None
    if params.filters and params.temperature > 0:
        choice = filter_logits(choice / params.temperature, params)
        kept = (logprobs.exp() * choice.isfinite()).sum(-1)[rows]
        tokens, _ = sample_tokens(choice, rows, 1.0, **noise)
    else:
        tokens, _ = sample_tokens(choice, rows, params.temperature, **noise)
    return tokens, logprobs[rows, tokens], kept


class TokenSampler:
    """Draws tokens by ``SamplingParams``; what may differ between two of equal ``key`` stands in tensors."""

    def __init__(self, vocab_size, device):
        self.stops = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.bias = torch.zeros(vocab_size, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.params = None
        # The CPU takes all rows at once: rows that share a computation are drawn together.
        self.most_rows = self.most_whole = sys.maxsize
        if self.stops.is_cuda:
            self.most_whole = SLICE_BYTES // (4 * vocab_size)
            self.most_rows = 1 << max(0, (LOGIT_BYTES // (4 * vocab_size)).bit_length() - 1)

    def set(self, params, stop_ids):
        """params: ``SamplingParams``; stop_ids: the tokens that end a completion."""
        self.params = params
        self.stop_ids = sorted(stop_ids)
        self.seed.fill_((params.seed + 2**63) % 2**64 - 2**63)
        self.stops.zero_()
        if self.stop_ids:
            self.stops[torch.tensor(self.stop_ids, device=self.stops.device)] = True
        if params.logit_bias:
            self.bias.zero_()
            ids = torch.tensor(list(params.logit_bias), device=self.bias.device)
            self.bias[ids] = torch.tensor(list(params.logit_bias.values()), device=ids.device).to(self.bias)
        self.min_tokens = params.min_tokens if self.stop_ids else 0

    @property
    def plain(self):
        """Whether tokens are drawn from the logits as the model gives them."""
        p = self.params
        filtered = p.filters and p.temperature > 0
        return not (filtered or p.logit_bias or self.min_tokens or p.repetition_penalty != 1)

    @property
    def key(self):
        """What of the parameters is fixed in a captured step."""
        p = self.params
        return (
            p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, bool(p.logit_bias), self.min_tokens,
        )  # fmt: skip

    def __call__(self, logits, rows, members, counts, seen=None):
        """Draw from logits (R, V) float32: (tokens, logprobs, kept or None), each (B,).

        rows (B,) int64 names the row of each draw; members (2, B) int64: prompt and group index; counts (B,) int64:
        tokens generated so far, equal for draws from one row; seen (R, V) bool: for the repetition penalty.
        """
        banned = None
        if self.min_tokens:
            early = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
            banned = early.index_put_((rows,), counts < self.min_tokens)[:, None] & self.stops
        bias = self.bias if self.params.logit_bias else None
        noise = self.seed, *members, counts
        return sample(logits, rows, noise, self.params, seen=seen, bias=bias, banned=banned)

    def from_head(self, hidden_states, head, members, counts):
        """As ``__call__`` where ``plain``, tokens and logprobs of hidden states (B, D): the logits come in slices."""
        noise = None if self.params.temperature == 0 else (self.seed, *members, counts)
        return sample_from_head(
            hidden_states, head, self.params.temperature, keys=noise, slice_bytes=SLICE_BYTES
        )
