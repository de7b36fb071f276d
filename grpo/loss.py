"""The policy losses of GRPO and its relatives, as a product of four pure functions on per-token log-probabilities.

    ratio       rho   how far the policy has moved from the one that wrote the token    ``RATIOS``
    surrogate   phi   what that move is worth, given the advantage                      ``SURROGATES``
    weights     w     corrections of the policy-gradient term alone                     ``token_weights``
    aggregate         sum over tokens of (w phi + kl_coef KL), over a denominator       ``AGGREGATES``

A published loss is a ``LossConfig``, a point in that product; ``PRESETS`` names some. Rows i of (B, T) are
completions, columns t tokens, |o_i| the tokens of row i that the mask selects; l, l_old, l_ref, l_sampler are
log-probabilities of the sampled token under the policy, the policy at rollout as the trainer computes it, the
reference and the sampler; p = exp(l); sg stops the gradient. The loss is minimised.

Whatever looks at a whole batch is an argument: ``denominator`` and ``entropy_threshold``. Computed once over the
batch and given to each of its micro-batches, they make the losses of the micro-batches sum to that of the batch.

The mask selects before any arithmetic and again before the sum, so NaN or infinity at a masked position reaches
neither value nor gradient; multiplying by the mask would let both through. Half precision is raised to float32.
Log-ratios are not clamped, VESPO's apart: an overflow shows as inf instead of passing for a number. Packed log-probs
are scattered to (B, T) first, one scalar a token.
"""

import difflib
import itertools
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch


def _check(condition, message):
    if not condition:
        raise ValueError(message)


def _check_choice(what, got, options):
    if not isinstance(got, str) or got not in options:
        nearest = difflib.get_close_matches(str(got), list(options), n=1, cutoff=0.0)[0]
        raise ValueError(f"{what}: got {got!r}, nearest is {nearest!r}, expected one of {list(options)}")


class Tokens(NamedTuple):
    """What ratios, surrogates and weights look at: (B, T) each, 0 where masked. Only logprobs have gradient.

    ``lengths`` (B,): tokens a row. ``correction``: ``sampler_correction``. The last three are None where not given.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    log_ratio: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    sampler_logprobs: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    def row_mean(self, values):
        """(B, T) -> (B, 1), the mean over o_i of values that are 0 where masked; 0 for an empty row."""
        return values.sum(dim=1, keepdim=True) / self.lengths[:, None].clamp(min=1)


def token_ratio(tokens, config):
    """One ratio a token (PPO, arXiv 1707.06347)."""
    return tokens.log_ratio.exp()


def sequence_ratio(tokens, config):
    """One ratio a row, the geometric mean of its tokens' (GSPO, arXiv 2507.18071). An empty row has ratio 1."""
    return tokens.row_mean(tokens.log_ratio).exp().expand_as(tokens.log_ratio)


def sequence_token_ratio(tokens, config):
    """The value of ``sequence_ratio`` with the gradient of the token's own log-prob (GSPO-token, same paper)."""
    straight_through = tokens.logprobs - tokens.logprobs.detach()
    return (tokens.row_mean(tokens.log_ratio.detach()) + straight_through).exp()


def sequence_sum_ratio(tokens, config):
    """One ratio a row, the product of its tokens': the unbiased one, of large variance (RLOO, arXiv 2402.14740)."""
    return tokens.log_ratio.sum(dim=1, keepdim=True).exp().expand_as(tokens.log_ratio)


def geometric_mean_ratio(tokens, config):
    """exp(mean_t c), with c the log-ratio clipped to [-clip_low, clip_high] on the side where going on would pay:
    above for A > 0, below otherwise (GMPO, arXiv 2507.20673). One ratio a row where the advantage is one a row."""
    log_ratio, low, high = tokens.log_ratio, -config.clip_low, config.clip_high
    clipped = torch.where(tokens.advantages > 0, log_ratio > high, log_ratio < low)
    one_sided = torch.where(clipped, log_ratio.detach().clamp(low, high), log_ratio)
    return tokens.row_mean(one_sided).exp().expand_as(log_ratio)


def _unclipped(phi):
    return phi, *[torch.zeros_like(phi, dtype=torch.bool)] * 2


def clip_surrogate(ratio, tokens, config):
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), PPO's pessimistic bound (arXiv 1707.06347).

    ``dual_clip`` c bounds rho from above where A < 0, where the min leaves it unbounded (arXiv 1912.09729).
    Every surrogate returns (phi, clipped_low, clipped_high), each (B, T); the masks tell on which tokens it acted.
    """
    cost = -tokens.advantages
    free = (ratio if config.dual_clip is None else ratio.clamp(max=config.dual_clip)) * cost
    bound = ratio.detach().clamp(1 - config.clip_low, 1 + config.clip_high) * cost
    # Not torch.maximum: its backward launches ten kernels to share the gradient of ties, here every token inside.
    clipped = bound > free
    clipped_high = clipped & (tokens.advantages > 0)
    return torch.where(clipped, bound, free), clipped ^ clipped_high, clipped_high


def cispo_surrogate(ratio, tokens, config):
    """-sg(min(rho, clip_high)) A l: every token keeps a gradient; clip_high bounds rho itself (arXiv 2506.13585)."""
    phi, nowhere, _ = _unclipped(
        -ratio.detach().clamp(max=config.clip_high) * tokens.advantages * tokens.logprobs
    )
    return phi, nowhere, (ratio > config.clip_high) & tokens.mask


def sapo_surrogate(ratio, tokens, config):
    """-(4 / tau) sigmoid(tau (rho - 1)) A, a soft clip of slope 1 at rho = 1 (arXiv 2511.20347)."""
    positive, other = config.sapo_temperatures
    tau = torch.full_like(tokens.advantages, other).masked_fill(tokens.advantages > 0, positive)
    return _unclipped(-torch.sigmoid(tau * (ratio - 1)) * 4 / tau * tokens.advantages)


def vespo_surrogate(ratio, tokens, config):
    """-sg(exp(lambda + k log R - lambda R)) A l with R the product of a row's ratios (arXiv 2602.10693).

    l - l_old is clamped to 20 either way a token, log R to [log 1e-8, 20]. A sampler correction is a factor of
    R, clamped likewise, and no weight. ``ratio`` only serves the KL term.
    """
    lowest = math.log(1e-8)
    log_r = tokens.log_ratio.detach().clamp(-20, 20)
    if tokens.correction is not None:
        log_r = log_r + torch.where(tokens.mask, tokens.correction.log().clamp(lowest, 20), 0.0)
    log_r = log_r.sum(dim=1, keepdim=True).clamp(lowest, 20)
    positive = tokens.advantages >= 0
    k, rate = (
        torch.full_like(tokens.advantages, other).masked_fill(positive, value)
        for value, other in zip(config.vespo_positive, config.vespo_negative, strict=True)
    )
    return _unclipped(-(rate + k * log_r - rate * log_r.exp()).exp() * tokens.advantages * tokens.logprobs)


def gmpo_surrogate(ratio, tokens, config):
    """-rho A; the clip stands inside the ratio, ``geometric_mean_ratio`` (arXiv 2507.20673)."""
    low, high = tokens.log_ratio < -config.clip_low, tokens.log_ratio > config.clip_high
    return -ratio * tokens.advantages, low & (tokens.advantages <= 0), high & (tokens.advantages > 0)


def policy_gradient_surrogate(ratio, tokens, config):
    """-A l, the score function estimator without any ratio (Williams 1992)."""
    return _unclipped(-tokens.advantages * tokens.logprobs)


def _dppo_surrogate(ratio, tokens, too_high, too_low, config):
    too_high, too_low = too_high & (tokens.advantages > 0), too_low & (tokens.advantages <= 0)
    weight = ratio.detach() if config.ratio_max is None else ratio.detach().clamp(max=config.ratio_max)
    phi = torch.where(too_high | too_low, 0.0, -weight * tokens.advantages * tokens.logprobs)
    return phi, too_low, too_high


def dppo_tv_surrogate(ratio, tokens, config):
    """-sg(min(rho, ratio_max)) A l while p - p_old <= clip_high for A > 0, >= -clip_low otherwise; else 0.

    p and p_old are probabilities: |p - p_old| is the total variation of "this token or another" (arXiv 2602.04879).
    """
    gap = (tokens.logprobs.exp() - tokens.old_logprobs.exp()).detach()
    return _dppo_surrogate(ratio, tokens, gap > config.clip_high, gap < -config.clip_low, config)


def dppo_kl_surrogate(ratio, tokens, config):
    """As ``dppo_tv_surrogate``, bounding KL(p_old || p) of "this token or another" on the side that A pushes to."""
    new, old = tokens.logprobs.detach(), tokens.old_logprobs
    p, p_old = new.exp(), old.exp()
    # 1e-8 keeps the logarithm finite at p = 1.
    kl = p_old * (old - new) + (1 - p_old) * torch.log((1 - p_old + 1e-8) / (1 - p + 1e-8))
    too_high, too_low = (kl > config.clip_high) & (p > p_old), (kl > config.clip_low) & (p < p_old)
    return _dppo_surrogate(ratio, tokens, too_high, too_low, config)


def sampler_correction(tokens, config):
    """p_old / p_sampler bounded to [sampler_min, sampler_max], (B, T) without gradient; None if not configured.

    "token" takes each token's, "sequence" the product over the row; "truncate" clamps to the bounds (TIS, Yao et al.
    2025), "mask" sets to 0 what lies outside (IcePop). Valid where the sampler's log-probs are over the full
    vocabulary at the trainer's temperature: a nucleus renormalises them and biases the ratio.
    """
    if config.sampler_correction is None:
        return None
    level, mode = config.sampler_correction.split("-")
    log_ratio = tokens.old_logprobs - tokens.sampler_logprobs
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    ratio, low, high = log_ratio.exp(), config.sampler_min, config.sampler_max
    if mode == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def off_policy_mask(tokens, config):
    """Keep A >= 0, and rows whose mean_t(l_sampler - l) <= off_policy_threshold (DeepSeek-V3.2, arXiv 2512.02556).

    (B, T) bool; l_old stands in where no sampler log-probs are given.
    """
    behaviour = tokens.old_logprobs if tokens.sampler_logprobs is None else tokens.sampler_logprobs
    drift = tokens.row_mean(behaviour - tokens.logprobs.detach())
    return (tokens.advantages >= 0) | (drift <= config.off_policy_threshold)


def token_weights(tokens, config, threshold=None):
    """Factors w on the policy-gradient term, (B, T), without gradient; neither the KL nor the denominator sees them.

    ``sampler_correction`` times ``off_policy_mask`` times, with top_entropy < 1, entropy >= ``threshold``; None where
    the config asks for none of them.
    """
    weights = None if config.surrogate == "vespo" else tokens.correction
    if weights is None and (config.off_policy_threshold is not None or config.top_entropy < 1):
        weights = torch.ones_like(tokens.old_logprobs)
    if config.off_policy_threshold is not None:
        weights = torch.where(off_policy_mask(tokens, config), weights, 0.0)
    if config.top_entropy < 1:
        weights = torch.where(tokens.entropy >= threshold, weights, 0.0)
    return weights


def aggregate(per_token, mask, config, denominator):
    """Sum the selected tokens over ``denominator``, a scalar or one a row; "seq-mean-token-mean": sum row means."""
    return _aggregate(torch.where(mask, per_token, 0.0), mask.sum(dim=1), config, denominator)


def _aggregate(selected, lengths, config, denominator):
    if config.aggregate == "seq-mean-token-mean":
        if isinstance(denominator, float):  # times int64 it would be float32, whatever the loss is
            denominator = selected.new_full((), denominator)
        denominator = lengths.clamp(min=1) * denominator
    if isinstance(denominator, torch.Tensor) and denominator.ndim:
        return (selected.sum(dim=1) / denominator).sum()
    return selected.sum() / denominator


def kl_penalty(logprobs, ref_logprobs, estimator, *, gradient="plain", ratio=None):
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled, differentiable.

    With d = l - l_ref: "k1" d, unbiased, any sign; "k2" d^2 / 2, biased, small variance; "k3" exp(-d) + d - 1,
    unbiased and never negative (Schulman, http://joschu.net/blog/kl-approx.html). Two tensors of one shape -> that
    shape. ``gradient`` chooses what backward sees (``LossConfig.kl_gradient``): "plain" the estimate's own,
    "corrected" that of ``ratio`` times the estimate, "straight-through" that of k2 under the estimate's value.
    """
    _check_choice("estimator", estimator, KL_ESTIMATORS)
    _check_choice("gradient", gradient, CHOICES["kl_gradient"])
    _check(
        logprobs.shape == ref_logprobs.shape,
        f"ref_logprobs: got shape {tuple(ref_logprobs.shape)}, expected {tuple(logprobs.shape)} as logprobs",
    )
    _check(gradient != "corrected" or ratio is not None, "ratio: got None, 'corrected' multiplies by it")
    difference = logprobs - ref_logprobs
    return _kl_term(KL_ESTIMATORS[estimator](difference), difference, gradient, ratio)


def _kl_term(estimate, difference, gradient, ratio):
    if gradient == "corrected":
        return ratio * estimate
    if gradient == "straight-through":
        k2 = KL_ESTIMATORS["k2"](difference)
        return k2 + (estimate - k2).detach()
    return estimate


def kl_reward_penalty(logprobs, ref_logprobs, mask, config):
    """kl_coef KL for ``kl_place`` "reward": (B, T) without gradient, 0 where masked, to be subtracted from rewards.

    ``.sum(dim=1)`` is the penalty of a completion's reward (RLOO), as it stands that of token rewards (PPO). With
    k1 and log-probs of the policy that sampled, the score function then descends the reverse KL.
    """
    new, ref = (torch.where(mask, values.detach(), 0.0) for values in (logprobs, ref_logprobs))
    return config.kl_coef * torch.where(mask, kl_penalty(new, ref, config.kl_estimator), 0.0)


# name: (function, how ``formula`` writes it, from the fields: a surrogate's phi, then what stands in it)
RATIOS = {
    "token": (token_ratio, "exp(l - l_old)"),
    "sequence": (sequence_ratio, "exp(mean_t(l - l_old))"),
    "sequence-token": (sequence_token_ratio, "sg(exp(mean_t(l - l_old))) exp(l - sg(l))"),
    "sequence-sum": (sequence_sum_ratio, "exp(sum_t(l - l_old))"),
    "geometric-mean": (
        geometric_mean_ratio,
        "exp(mean_t(min(l - l_old, {clip_high:g}) if A > 0 else max(l - l_old, -{clip_low:g})))",
    ),
}
SURROGATES = {
    "clip": (clip_surrogate, "-min({bounded} A, clip(rho, {low:g}, {high:g}) A)"),
    "cispo": (cispo_surrogate, "-sg(min(rho, {clip_high:g})) A l"),
    "sapo": (
        sapo_surrogate,
        "-(4 / tau) sigmoid(tau (rho - 1)) A; tau = {sapo_temperatures[0]:g} if A > 0 else {sapo_temperatures[1]:g}",
    ),
    "vespo": (
        vespo_surrogate,
        "-sg(exp(lambda + k log R - lambda R)) A l; R = exp(sum_t(l - l_old)); "
        "(k, lambda) = {vespo_positive} if A >= 0 else {vespo_negative}",
    ),
    "gmpo": (gmpo_surrogate, "-rho A"),
    "policy-gradient": (policy_gradient_surrogate, "-A l"),
    "dppo-tv": (
        dppo_tv_surrogate,
        "-sg({bounded}) A l [p - p_old <= {clip_high:g} if A > 0 else p - p_old >= -{clip_low:g}]",
    ),
    "dppo-kl": (
        dppo_kl_surrogate,
        "-sg({bounded}) A l [p <= p_old or KL <= {clip_high:g} if A > 0 else p >= p_old or KL <= {clip_low:g}]; "
        "KL = KL(p_old || p) of this token or another",
    ),
}
KL_ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
}
AGGREGATES = {
    "token-mean": "1/sum_i|o_i| sum_it",
    "seq-mean-token-mean": "1/N sum_i 1/|o_i| sum_t",
    "seq-mean-token-sum-norm": "1/(N L) sum_it",
    "seq-mean-token-sum": "1/N sum_it",
    "prompt-mean": "1/P sum_p 1/sum_(i in p)|o_i| sum_(i in p)t",
}
CHOICES = {
    "ratio_level": RATIOS,
    "surrogate": SURROGATES,
    "sampler_correction": ("token-truncate", "token-mask", "sequence-truncate", "sequence-mask"),
    "kl_estimator": KL_ESTIMATORS,
    "kl_gradient": ("corrected", "plain", "straight-through"),
    "kl_place": ("loss", "reward"),
    "aggregate": AGGREGATES,
    "denominator_scope": ("batch", "micro-batch"),
}
# Presets that are what they are by their ratio level.
PRESET_LEVELS = {
    "gspo": "sequence",
    "gspo_token": "sequence-token",
    "gmpo": "geometric-mean",
    "rloo": "sequence-sum",
}


@dataclass(frozen=True)
class LossConfig:
    """One policy loss; ``formula`` writes it out. Raises ValueError for a field out of its range.

    ratio_level: a key of ``RATIOS``; "geometric-mean" goes with the surrogate "gmpo" alone.
    surrogate: a key of ``SURROGATES``; "dppo-tv" and "dppo-kl" go with ratio_level "token" alone.
    clip_low, clip_high: where the surrogate's bound acts. "clip": rho in [1 - clip_low, 1 + clip_high]; "cispo": rho
        below clip_high, which must be >= 1; "gmpo": log rho in [-clip_low, clip_high]; "dppo-*": the distance.
    dual_clip: "clip" only: upper bound on rho where the advantage is negative, > 1 + clip_high; None is no bound.
    ratio_max: "dppo-*" only: rho is truncated there; None is no bound.
    sapo_temperatures: tau for A > 0 and otherwise.
    vespo_positive, vespo_negative: (k, lambda) for A >= 0 and otherwise.
    sampler_correction: None or one of ``CHOICES``, with sampler_min <= sampler_max as bounds of the ratio
        p_old / p_sampler; "vespo" takes the token ones alone.
    off_policy_threshold: in nats a token, for ``off_policy_mask``; None keeps every row.
    top_entropy: share of the tokens, those of highest entropy, that keep their policy gradient (arXiv 2506.01939).
        The rest still count in the denominator.
    kl_coef: weight of the KL term, which needs ref_logprobs; 0 is no term.
    kl_estimator: "k1", "k2" or "k3" (``kl_penalty``).
    kl_gradient: what the KL term descends, in expectation over the rollout policy's tokens.
        "corrected" multiplies by the differentiable rho (DeepSeek-V3.2, arXiv 2512.02556). With token ratios that is
        the gradient of E_policy[estimator]: the reverse KL(policy || reference) for k1 and k3, also off-policy.
        With "geometric-mean", whose rho is clipped, it is the token ratio.
        "plain" has no rho. At rho = 1 it descends: k1 nothing (zero in expectation), k2 the reverse KL,
        k3 the forward KL(reference || policy), which is what DeepSeekMath's objective does.
        "straight-through" has k2's gradient under the estimator's value: the reverse KL at rho = 1.
    kl_place: "loss", or "reward": the loss has no KL term then; subtract ``kl_reward_penalty`` from the rewards.
    aggregate: a key of ``AGGREGATES``, with N rows (masked ones too), P prompts, L = max_completion_length.
    denominator_scope: the rows that a trainer's denominator counts when it splits a batch into M micro-batches.
        "batch": ``loss_denominator(mask of the whole batch)``; the M losses sum to the batch's loss exactly.
        "micro-batch": ``M * loss_denominator(mask of the micro-batch)``; the result depends on the split.
    max_completion_length: L in tokens, a constant of the run; the padded width of a batch would be none.
    name, paper, estimator: labels, not read by the loss; ``estimator`` is the advantage that the paper pairs it with.
    """

    ratio_level: str = "token"
    surrogate: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio_max: float | None = None
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    sampler_correction: str | None = None
    sampler_min: float = 0.0
    sampler_max: float = 3.0
    off_policy_threshold: float | None = None
    top_entropy: float = 1.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str = "corrected"
    kl_place: str = "loss"
    aggregate: str = "token-mean"
    denominator_scope: str = "batch"
    max_completion_length: int | None = None
    name: str = "custom"
    paper: str = ""
    estimator: str = "grpo"

    def __post_init__(self):
        for field, options in CHOICES.items():
            if (field, getattr(self, field)) != ("sampler_correction", None):
                _check_choice(field, getattr(self, field), options)
        for field in ("clip_low", "clip_high", "sampler_min", "sampler_max", "top_entropy", "kl_coef"):
            got = getattr(self, field)
            _check(isinstance(got, (int, float)), f"{field}: got {got!r}, expected a number")
        for field, expected, holds in self._rules():
            _check(holds, f"{field}: got {getattr(self, field)!r}, expected {expected}")

    def _rules(self):
        """(field, what is expected of it, whether that holds)"""
        high, dual, length = self.clip_high, self.dual_clip, self.max_completion_length
        drift, surrogate, level = self.off_policy_threshold, self.surrogate, self.ratio_level
        yield "clip_low", "a number in [0, 1]", 0 <= self.clip_low <= 1
        yield "clip_high", "a number >= 0", high >= 0
        yield "clip_high", "a bound >= 1 on the ratio itself for 'cispo'", surrogate != "cispo" or high >= 1
        yield "dual_clip", f"None or > {1 + high:g}", dual is None or dual > 1 + high or surrogate != "clip"
        yield "ratio_max", "None or >= 1", self.ratio_max is None or self.ratio_max >= 1
        for field in ("sapo_temperatures", "vespo_positive", "vespo_negative"):
            pair = getattr(self, field)
            yield field, "two numbers > 0", len(pair) == 2 and all(0 < value < math.inf for value in pair)
        yield "sampler_min", "a number in [0, 1]", 0 <= self.sampler_min <= 1
        yield "sampler_max", "a number >= 1", self.sampler_max >= 1
        token_wise = str(self.sampler_correction).startswith(("None", "token"))
        yield "sampler_correction", "one by token for 'vespo'", surrogate != "vespo" or token_wise
        yield "off_policy_threshold", "None or >= 0", drift is None or drift >= 0
        yield "top_entropy", "a number in (0, 1]", 0 < self.top_entropy <= 1
        yield "kl_coef", "a finite number >= 0", 0 <= self.kl_coef < math.inf
        valid = length is None or (type(length) is int and length > 0)
        yield "max_completion_length", "None or an int >= 1", valid
        yield "ratio_level", f"'token' for {surrogate!r}", "dppo" not in surrogate or level == "token"
        paired = (surrogate == "gmpo") == (level == "geometric-mean")
        yield "ratio_level", "'geometric-mean' for the surrogate 'gmpo' and for no other", paired

    @property
    def formula(self):
        """The loss as one line of mathematics, written from the fields."""
        rho = "exp(l - l_old)" if self.ratio_level == "geometric-mean" else "rho"
        before = {"corrected": f"{rho} ", "plain": "", "straight-through": "k2-gradient "}[self.kl_gradient]
        in_loss = self.kl_coef and self.kl_place == "loss"
        kl = f" + {self.kl_coef:g} {before}{self.kl_estimator}(l, l_ref)" if in_loss else ""
        bound = self.dual_clip if self.surrogate == "clip" else self.ratio_max
        words = vars(self) | {"low": 1 - self.clip_low, "high": 1 + self.clip_high}
        words["bounded"] = "rho" if bound is None else f"min(rho, {bound:g})"
        phi, *where = SURROGATES[self.surrogate][1].format(**words).split("; ")
        if "rho" in phi + kl:
            where.append("rho = " + RATIOS[self.ratio_level][1].format(**words))
        weighted = self.sampler_correction or self.off_policy_threshold is not None or self.top_entropy < 1
        return ", ".join([f"{AGGREGATES[self.aggregate]} [{'w ' if weighted else ''}{phi}{kl}]", *where])

    @property
    def warnings(self):
        """What is legal and probably not meant: a tuple of "name: explanation", repeated in ``LossOutput``."""
        found, kl_in_loss = [], self.kl_coef > 0 and self.kl_place == "loss"
        if kl_in_loss and self.kl_estimator == "k1" and self.kl_gradient == "plain":
            found.append("k1-in-loss: the gradient of k1 without rho is 0 in expectation; it only adds noise")
        if self.kl_coef > 0 and self.kl_place == "reward":
            found.append("kl-in-reward: no KL term in this loss; subtract kl_reward_penalty from the rewards")
        if self.name == "luspo" and self.ratio_level != "sequence":
            found.append("luspo-level: LUSPO is defined on sequence ratios")
        if self.dual_clip is not None and self.surrogate != "clip":
            found.append(f"dual-clip-unused: the surrogate {self.surrogate!r} does not read it")
        return tuple(found)


# kl_coef is 0 in every preset, so that none needs a reference policy unasked; DeepSeekMath used 0.04 with "plain".
_ROW_MEAN = {"aggregate": "seq-mean-token-mean"}
_GSPO = {"paper": "arXiv 2507.18071", "clip_low": 3e-4, "clip_high": 4e-4, **_ROW_MEAN}
_GMPO = {"surrogate": "gmpo", "ratio_level": "geometric-mean", "clip_low": 0.4, "clip_high": 0.4, **_ROW_MEAN}
_RLOO = {"ratio_level": "sequence-sum", "estimator": "rloo", **_ROW_MEAN}
_K1_IN_REWARD = {"kl_estimator": "k1", "kl_gradient": "plain", "kl_place": "reward"}
_K2_IN_LOSS = {"kl_estimator": "k2", "kl_gradient": "plain"}
PRESETS = {
    name: LossConfig(name=name, **values)
    for name, values in {
        "grpo": {"paper": "arXiv 2402.03300 (DeepSeekMath)", **_ROW_MEAN},
        # Differs from dapo in whose tokens the denominator counts; shares only its name with arXiv 2506.02864.
        "bnpo": {"paper": "TRL, loss_type='bnpo'", "denominator_scope": "micro-batch"},
        "dr_grpo": {
            "paper": "arXiv 2503.20783",
            "aggregate": "seq-mean-token-sum-norm",
            "estimator": "dr_grpo",
        },
        # The paper's mean over a group's tokens is aggregate="prompt-mean"; like other trainers, this is the batch's.
        "dapo": {"paper": "arXiv 2503.14476", "clip_high": 0.28},
        "gspo": {"ratio_level": "sequence", **_GSPO},
        "gspo_token": {"ratio_level": "sequence-token", **_GSPO},
        # The bound is that of ScaleRL, arXiv 2510.13786.
        "cispo": {"paper": "arXiv 2506.13585 (MiniMax-M1)", "surrogate": "cispo", "clip_high": 5.0},
        "sapo": {"paper": "arXiv 2511.20347", "surrogate": "sapo", **_ROW_MEAN},
        "luspo": {"paper": "arXiv 2602.05261", "ratio_level": "sequence", "aggregate": "seq-mean-token-sum"},
        "vespo": {"paper": "arXiv 2602.10693", "surrogate": "vespo"},
        "gmpo": {"paper": "arXiv 2507.20673", **_GMPO},
        "rloo": {"paper": "arXiv 2402.14740", **_RLOO, **_K1_IN_REWARD},
        "reinforce": {"paper": "Williams 1992", "surrogate": "policy-gradient", "estimator": "dr_grpo"},
        "reinforce_pp": {"paper": "arXiv 2501.03262", "estimator": "reinforce_pp", **_K1_IN_REWARD},
        "reinforce_pp_baseline": {
            "paper": "arXiv 2501.03262",
            "estimator": "reinforce_pp_baseline",
            **_K2_IN_LOSS,
        },
        "ppo": {"paper": "arXiv 1707.06347", "estimator": "gae", **_K1_IN_REWARD},
        "dppo": {"paper": "arXiv 2602.04879", "surrogate": "dppo-tv", "ratio_max": 20.0},
    }.items()
}


def preset(name, /, **overrides):
    """The ``LossConfig`` called ``name`` in ``PRESETS``, with some fields replaced.

    Raises ValueError for an unknown name or field, with the nearest one there is, and for a ratio_level that makes
    the preset another one (``PRESET_LEVELS``).
    """
    _check_choice("preset", name, PRESETS)
    for field in overrides:
        _check_choice("LossConfig field", field, [known.name for known in fields(LossConfig)])
    level = overrides.get("ratio_level")
    _check(
        level is None or level not in RATIOS or level == PRESET_LEVELS.get(name, level),
        f"ratio_level: got {level!r}, but {PRESET_LEVELS.get(name)!r} is what makes {name!r}: use LossConfig",
    )
    return replace(PRESETS[name], **overrides)


@dataclass(frozen=True)
class LossOutput:
    """The loss and its parts. Only ``loss`` carries gradient; per-token terms are 0 where masked.

    loss: scalar, float32 or float64.
    surrogate: (B, T) phi, before the weights. weights: (B, T) w.
    kl: (B, T) the KL term as it enters the loss, before kl_coef; None without ref_logprobs.
    ratio: (B, T) rho.
    clipped_low, clipped_high: (B, T) bool, where the surrogate's bound acted ("clip": A < 0 below, A > 0 above).
    metrics: scalar tensors on the device, made when first read, over the selected tokens: surrogate, ratio_mean,
        ratio_max, ratio_p01, ratio_p50, ratio_p99, ess (effective share: (sum rho)^2 / (n sum rho^2)), weight_mean,
        clip_low_fraction, clip_high_fraction, new_old_mean and new_old_max (|l - l_old|, 0 on a first on-policy
        step), zero_advantage_share (of the rows with a token), and where given: kl, kl_k1 and kl_k3 (estimates of
        KL(policy || reference) without rho), entropy, old_sampler_mean and old_sampler_max (|l_old - l_sampler|),
        new_sampler_mean and new_sampler_max (|l - l_sampler|).
    measure: makes the metrics. warnings: ``config.warnings``.
    """

    loss: torch.Tensor
    surrogate: torch.Tensor
    weights: torch.Tensor
    kl: torch.Tensor | None
    ratio: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    measure: Any
    warnings: tuple[str, ...] = ()

    @cached_property
    def metrics(self):
        return self.measure()


def loss_denominator(mask, config, group_ids=None):
    """What ``config.aggregate`` divides by, for the rows of ``mask`` (B, T) bool; int64, >= 1, without a host sync.

    A scalar: tokens ("token-mean"), rows ("seq-mean-token-mean", "seq-mean-token-sum") or rows times
    max_completion_length ("seq-mean-token-sum-norm", ValueError where that is None). "prompt-mean": (B,), the number
    of prompts times the tokens of the row's prompt, with ``group_ids`` (B,) int64 naming the prompts; a micro-batch
    takes its rows of it. Over ranks the scalars add up; for "prompt-mean" gather mask and group_ids first.
    """
    got = f"{mask.dtype} of shape {tuple(mask.shape)}"
    _check(mask.ndim == 2 and mask.dtype == torch.bool, f"mask: got {got}, expected torch.bool (B, T)")
    count = _denominator(mask, config, group_ids)
    is_tensor = isinstance(count, torch.Tensor)
    return count if is_tensor else torch.full((), count, dtype=torch.int64, device=mask.device)


def _denominator(mask, config, group_ids):
    """``loss_denominator`` as an int where the shape of the mask tells it: then it costs the device nothing."""
    if config.aggregate == "token-mean":
        return mask.sum().clamp(min=1)
    count = max(mask.shape[0], 1)
    if config.aggregate == "prompt-mean":
        got = None if group_ids is None else (group_ids.dtype, tuple(group_ids.shape))
        expected = (torch.int64, (mask.shape[0],))
        _check(got == expected, f"group_ids: got {got}, expected {expected}, naming each row's prompt")
        same = group_ids[:, None] == group_ids
        prompts = (same.tril(-1).sum(dim=1) == 0).sum()
        return (prompts * (same * mask.sum(dim=1)).sum(dim=1)).clamp(min=1)
    if config.aggregate == "seq-mean-token-sum-norm":
        length = config.max_completion_length
        _check(
            length is not None, f"max_completion_length: got None, expected an int for {config.aggregate!r}"
        )
        count *= length
    return count


def entropy_quantile(entropy, mask, config):
    """The entropy above which a token is among the ``config.top_entropy`` share, scalar, for a whole batch.

    entropy (B, T) floating, mask (B, T) bool. All micro-batches and ranks must share one threshold.
    """
    got = tuple(entropy.shape)
    _check(got == tuple(mask.shape), f"entropy: got shape {got}, expected {tuple(mask.shape)} as mask")
    entropy = entropy.detach().to(torch.promote_types(entropy.dtype, torch.float32))
    if mask.numel() == 0:
        return entropy.new_zeros(())
    ordered = torch.where(mask, entropy, math.inf).flatten().sort().values
    position = entropy.new_full((1,), 1 - config.top_entropy) * (mask.sum() - 1).clamp(min=0)
    below, above = ordered[position.long()], ordered[position.ceil().long()]
    return torch.where(mask.any(), torch.lerp(below, above, position.frac()), 0.0)[0]


def _ratio_quantiles(ratio, tokens):
    """The 0.01, 0.5 and 0.99 quantiles over ``tokens`` (scalar >= 1) tokens, (3,), interpolated linearly."""
    if ratio.numel() < 2:
        return ratio.sum().expand(3)
    ordered = ratio.flatten().sort(descending=True).values  # the masked are 0, so the selected come first
    position = torch.linspace(0.99, 0.01, 3, dtype=ratio.dtype, device=ratio.device) * (tokens - 1)
    above, below = ordered.unfold(0, 2, 1)[position.long()].unbind(1)
    return torch.lerp(above, below, position.frac())


def _metrics(terms, selected, advantages, lengths):
    """``LossOutput.metrics`` from the names ``terms`` and values ``selected`` (K, B, T), two reductions for all."""
    present = lengths.clamp(max=1)
    silent = present ^ advantages.any(dim=1)  # only a row with a token can have a non-zero one
    counts = torch.stack([lengths, present, silent]).sum(dim=1)
    tokens, rows, _ = counts.clamp(min=1).unbind()
    means = selected.sum(dim=(1, 2)) / tokens
    peaks = selected.amax(dim=(1, 2)) if selected.numel() else means
    mean, peak = (dict(zip(terms, values.unbind(), strict=True)) for values in (means, peaks))
    metrics = {
        "surrogate": mean["surrogate"],
        "weight_mean": mean["weight"],
        "ratio_mean": mean["ratio"],
        "ratio_max": peak["ratio"],
        "ess": mean["ratio"].square() / mean["ratio_square"].clamp(min=torch.finfo(selected.dtype).tiny),
        "clip_low_fraction": mean["clip_low"],
        "clip_high_fraction": mean["clip_high"],
        "zero_advantage_share": counts[2] / rows,
    }
    names = ("ratio_p01", "ratio_p50", "ratio_p99")
    metrics |= zip(names, _ratio_quantiles(selected[terms.index("ratio")], tokens).unbind(), strict=True)
    for name in ("new_old", "old_sampler", "new_sampler"):
        if name in mean:
            metrics |= {f"{name}_mean": mean[name], f"{name}_max": peak[name]}
    return metrics | {name: mean[name] for name in ("kl", "kl_k1", "kl_k3", "entropy") if name in mean}


def _check_inputs(logprobs, advantages, mask, inputs, required, denominator, per_row):
    shape = tuple(logprobs.shape)
    _check(
        logprobs.ndim == 2 and logprobs.is_floating_point(),
        f"logprobs: got {logprobs.dtype} of shape {shape}, expected a floating dtype (B, T)",
    )
    _check(mask.dtype == torch.bool, f"mask: got {mask.dtype}, expected torch.bool")
    for name, value in {"mask": mask, **inputs}.items():
        got = None if value is None else tuple(value.shape)
        _check(
            got == shape or (got is None and name not in required),
            f"{name}: got shape {got}, expected {shape} as logprobs",
        )
    got = tuple(advantages.shape)
    _check(got in (shape[:1], shape), f"advantages: got shape {got}, expected {shape[:1]} or {shape}")
    if isinstance(denominator, torch.Tensor):
        got = tuple(denominator.shape)
        if per_row:
            _check(got == shape[:1], f"denominator: got shape {got}, expected {shape[:1]}, one a row")
        _check(per_row or denominator.numel() == 1, f"denominator: got shape {got}, expected a scalar")
    elif denominator is not None:
        _check(0 < denominator < math.inf, f"denominator: got {denominator}, expected a finite number > 0")


def policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    config,
    *,
    ref_logprobs=None,
    sampler_logprobs=None,
    entropy=None,
    denominator=None,
    entropy_threshold=None,
    group_ids=None,
):
    """The loss of ``config`` (its ``formula``) on one batch or micro-batch.

    Args:
        logprobs: (B, T) floating; the policy's log-probs of the sampled tokens. The only input that gets gradient.
        old_logprobs: (B, T); the policy's at rollout, recomputed by the trainer. ``logprobs.detach()`` on policy.
        advantages: (B,) one a completion, or (B, T) one a token.
        mask: (B, T) bool; True for the tokens that count. What stands elsewhere is never read.
        config: ``LossConfig``.
        ref_logprobs: (B, T); the reference policy's. Needed for kl_coef > 0 in the loss, else only measured.
        sampler_logprobs: (B, T); those the sampler recorded. Needed for ``sampler_correction``, read by
            ``off_policy_threshold``, else only measured.
        entropy: (B, T); of the policy's next-token distribution. Needed for top_entropy < 1, else only measured.
        denominator: number or scalar tensor > 0, or (B,) for "prompt-mean"; default loss_denominator(mask, config).
            With that of the whole batch, losses and gradients of its micro-batches sum to the batch's.
        entropy_threshold: scalar tensor instead of ``entropy_quantile(entropy, mask, config)``, of the whole batch.
            Where top_entropy < 1 it must come with ``denominator``.
        group_ids: (B,) int64; the prompt of each row, for "prompt-mean" without a denominator.

    Returns ``LossOutput``. Nothing waits for the device. A batch without a selected token has loss 0, gradient 0.
    Raises ValueError for a wrong shape or dtype and for a missing ref_logprobs, sampler_logprobs, entropy, threshold,
    group_ids or max_completion_length.
    """
    kl_in_loss = config.kl_coef > 0 and config.kl_place == "loss"
    inputs = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    inputs |= {"sampler_logprobs": sampler_logprobs, "entropy": entropy}
    needed = (True, kl_in_loss, config.sampler_correction is not None, config.top_entropy < 1)
    required, per_row = [*itertools.compress(inputs, needed)], config.aggregate == "prompt-mean"
    _check_inputs(logprobs, advantages, mask, inputs, required, denominator, per_row)
    if config.top_entropy < 1 and entropy_threshold is None:
        _check(
            denominator is None,
            "entropy_threshold: got None beside a denominator, expected entropy_quantile of the same rows",
        )
        entropy_threshold = entropy_quantile(entropy, mask, config)
    if denominator is None:
        denominator = _denominator(mask, config, group_ids)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    if isinstance(denominator, torch.Tensor):
        denominator = (denominator if per_row else denominator.reshape(())).to(dtype)

    zero = logprobs.new_zeros((), dtype=dtype)
    new = torch.where(mask, logprobs.to(dtype), zero)
    inputs["advantages"] = (advantages if advantages.ndim == 2 else advantages[:, None]).expand_as(mask)
    given = {name: values.detach().to(dtype) for name, values in inputs.items() if values is not None}
    inputs |= zip(given, torch.where(mask, torch.stack(list(given.values())), zero).unbind(), strict=True)
    old, ref, sampler, entropy, advantages = inputs.values()
    lengths = mask.sum(dim=1)
    tokens = Tokens(new, old, new - old, advantages, mask, lengths, sampler, None, entropy)
    tokens = tokens._replace(correction=sampler_correction(tokens, config))

    ratio = RATIOS[config.ratio_level][0](tokens, config)
    surrogate, clipped_low, clipped_high = SURROGATES[config.surrogate][0](ratio, tokens, config)
    weights = token_weights(tokens, config, entropy_threshold)
    per_token, kl = surrogate if weights is None else weights * surrogate, None
    if ref is not None:
        with torch.set_grad_enabled(kl_in_loss and torch.is_grad_enabled()):
            difference = new - ref
            estimates = {name: KL_ESTIMATORS[name](difference) for name in {"k1", "k3", config.kl_estimator}}
            rho = token_ratio(tokens, config) if config.ratio_level == "geometric-mean" else ratio
            kl = _kl_term(estimates[config.kl_estimator], difference, config.kl_gradient, rho)
    if kl_in_loss:
        per_token = torch.add(per_token, kl, alpha=config.kl_coef)
    loss = _aggregate(torch.where(mask, per_token, zero), lengths, config, denominator)

    with torch.no_grad():
        weights = torch.ones_like(ratio) if weights is None else weights
        parts = {"surrogate": surrogate, "ratio": ratio, "weight": weights}
        parts |= {} if kl is None else {"kl": kl, "kl_k1": estimates["k1"], "kl_k3": estimates["k3"]}
        selected = torch.where(mask, torch.stack(list(parts.values())), zero)
        parts = dict(zip(parts, selected.unbind(), strict=True))
        log_ratio = tokens.log_ratio.detach()

    @torch.no_grad()
    def measure():
        terms = {
            "ratio_square": parts["ratio"].square(),
            "clip_low": torch.where(mask, clipped_low, zero),
            "clip_high": torch.where(mask, clipped_high, zero),
            "new_old": log_ratio.abs(),
        }
        terms |= {} if entropy is None else {"entropy": entropy}
        if sampler is not None:
            terms |= {"old_sampler": (old - sampler).abs(), "new_sampler": (new.detach() - sampler).abs()}
        values = torch.cat([selected, torch.stack(list(terms.values()))])
        return _metrics([*parts, *terms], values, advantages, lengths)

    outputs = parts["surrogate"], parts["weight"], parts.get("kl"), parts["ratio"], clipped_low, clipped_high
    return LossOutput(loss, *outputs, measure, config.warnings)
