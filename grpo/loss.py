"""The policy loss of GRPO and its relatives, as a product of four pure functions on per-token log-probabilities.

    ratio       rho   how far the policy has moved from the one that wrote the token    ``RATIOS``
    surrogate   phi   what that move is worth, given the advantage                      ``SURROGATES``
    weights     w     corrections of the policy-gradient term alone                     ``token_weights``
    aggregate         sum over tokens of (w phi + kl_coef KL), over a denominator       ``aggregate``

A published loss is a ``LossConfig``, a point in that product; ``PRESETS`` names some. Rows i of (B, T) are
completions, columns t tokens, |o_i| the tokens of row i that the mask selects; l, l_old, l_ref are log-probabilities
of the sampled token under the policy, the policy at rollout and the reference. The loss is minimised.

The mask selects before any arithmetic and again before the sum, so NaN or infinity at a masked position reaches
neither value nor gradient; multiplying by the mask would let both through. Half precision is raised to float32.
Log-ratios are not clamped: an overflow shows as inf instead of passing for a number. Packed log-probs are scattered
to (B, T) first, one scalar a token.
"""

import difflib
import math
from dataclasses import dataclass, fields, replace

import torch


def _check(condition, message):
    if not condition:
        raise ValueError(message)


def _check_choice(what, got, options):
    if not isinstance(got, str) or got not in options:
        nearest = difflib.get_close_matches(str(got), list(options), n=1, cutoff=0.0)[0]
        raise ValueError(f"{what}: got {got!r}, nearest is {nearest!r}, expected one of {list(options)}")


def token_ratio(log_ratio, mask):
    """exp(l - l_old), one ratio a token (PPO, arXiv 1707.06347). (B, T) -> (B, T)."""
    return log_ratio.exp()


def sequence_ratio(log_ratio, mask):
    """exp(mean over o_i of l - l_old), one ratio a row, repeated along it (GSPO, arXiv 2507.18071).

    ``log_ratio`` (B, T) must be 0 where masked; an empty row has ratio 1.
    """
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (log_ratio.sum(dim=1, keepdim=True) / lengths).exp().expand_as(log_ratio)


def clip_surrogate(ratio, advantages, logprobs, config):
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), PPO's pessimistic bound (arXiv 1707.06347).

    ``dual_clip`` c bounds rho from above where A < 0, where the min leaves it unbounded (arXiv 1912.09729).
    Returns (phi, clipped_low, clipped_high), each (B, T): the masks tell where the clip has cut the gradient.
    """
    low, high = 1 - config.clip_low, 1 + config.clip_high
    bounded = ratio if config.dual_clip is None else ratio.clamp(max=config.dual_clip)
    phi = -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages)
    return phi, (advantages < 0) & (ratio < low), (advantages > 0) & (ratio > high)


def token_weights(old_logprobs, sampler_logprobs, mask, config):
    """Factors w on the policy-gradient term, (B, T), without gradient; neither the KL nor the denominator sees them.

    1 everywhere: no sampler correction is applied yet.
    """
    return torch.ones_like(old_logprobs)


def aggregate(per_token, mask, config, denominator):
    """Sum the selected tokens over ``denominator``; for "seq-mean-token-mean", of row means. Returns a scalar."""
    per_token = torch.where(mask, per_token, 0.0)
    if config.aggregate == "seq-mean-token-mean":
        per_token = per_token / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return per_token.sum() / denominator


def kl_penalty(logprobs, ref_logprobs, estimator):
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled, differentiable.

    With d = l - l_ref: "k1" d, unbiased, any sign; "k2" d^2 / 2, biased, small variance; "k3" exp(-d) + d - 1,
    unbiased and never negative (Schulman, http://joschu.net/blog/kl-approx.html). Two tensors of one shape -> that
    shape. The gradient of an estimate need not be the gradient of what it estimates: see ``LossConfig.kl_gradient``.
    """
    _check_choice("estimator", estimator, KL_ESTIMATORS)
    _check(
        logprobs.shape == ref_logprobs.shape,
        f"ref_logprobs: got shape {tuple(ref_logprobs.shape)}, expected {tuple(logprobs.shape)} as logprobs",
    )
    return KL_ESTIMATORS[estimator](logprobs - ref_logprobs)


RATIOS = {"token": token_ratio, "sequence": sequence_ratio}
SURROGATES = {"clip": clip_surrogate}
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
}
CHOICES = {
    "ratio_level": RATIOS,
    "surrogate": SURROGATES,
    "kl_estimator": KL_ESTIMATORS,
    "kl_gradient": ("corrected", "plain"),
    "aggregate": AGGREGATES,
    "denominator_scope": ("batch", "micro-batch"),
}


@dataclass(frozen=True)
class LossConfig:
    """One policy loss; ``formula`` writes it out. Raises ValueError for a field out of its range.

    ratio_level: "token" or "sequence".
    surrogate: "clip".
    clip_low, clip_high: the ratio keeps its gradient in [1 - clip_low, 1 + clip_high].
    dual_clip: upper bound on the ratio where the advantage is negative, > 1 + clip_high; None is no bound.
    kl_coef: weight of the KL term, which needs ref_logprobs; 0 is no term.
    kl_estimator: "k1", "k2" or "k3" (``kl_penalty``).
    kl_gradient: what the KL term descends, in expectation over the rollout policy's tokens.
        "corrected" multiplies by the differentiable rho (DeepSeek-V3.2, arXiv 2512.02556). With token ratios that is
        the gradient of E_policy[estimator]: the reverse KL(policy || reference) for k1 and k3, also off-policy.
        "plain" has no rho. At rho = 1 it descends: k1 nothing (zero in expectation), k2 the reverse KL,
        k3 the forward KL(reference || policy), which is what DeepSeekMath's objective does.
    aggregate: over tokens and rows, with N rows (fully masked rows count) and L = max_completion_length:
        "token-mean"               sum of all tokens / number of tokens
        "seq-mean-token-mean"      mean over rows of the row's token mean
        "seq-mean-token-sum-norm"  sum of all tokens / (N L)
        "seq-mean-token-sum"       sum of all tokens / N
    denominator_scope: the rows that a trainer's denominator counts when it splits a batch into M micro-batches.
        "batch": ``loss_denominator(mask of the whole batch)``; the M losses sum to the batch's loss exactly.
        "micro-batch": ``M * loss_denominator(mask of the micro-batch)``; the result depends on the split.
    max_completion_length: L in tokens, a constant of the run; the padded width of a batch would be none.
    name, paper: labels, not read by the loss.
    """

    ratio_level: str = "token"
    surrogate: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str = "corrected"
    aggregate: str = "token-mean"
    denominator_scope: str = "batch"
    max_completion_length: int | None = None
    name: str = "custom"
    paper: str = ""

    def __post_init__(self):
        for field, options in CHOICES.items():
            _check_choice(field, getattr(self, field), options)
        for field in ("clip_low", "clip_high", "kl_coef"):
            got = getattr(self, field)
            _check(isinstance(got, (int, float)), f"{field}: got {got!r}, expected a number")
        low, high, dual, length = self.clip_low, self.clip_high, self.dual_clip, self.max_completion_length
        _check(0 <= low <= 1, f"clip_low: got {low}, expected a number in [0, 1]")
        _check(high >= 0, f"clip_high: got {high}, expected a number >= 0")
        _check(dual is None or dual > 1 + high, f"dual_clip: got {dual}, expected None or > {1 + high}")
        _check(0 <= self.kl_coef < math.inf, f"kl_coef: got {self.kl_coef}, expected a finite number >= 0")
        _check(
            length is None or (type(length) is int and length > 0),
            f"max_completion_length: got {length!r}, expected None or an int >= 1",
        )

    @property
    def formula(self):
        """The loss as one line of mathematics, written from the fields."""
        move = "l - l_old" if self.ratio_level == "token" else "mean_t(l - l_old)"
        bounded = "rho" if self.dual_clip is None else f"min(rho, {self.dual_clip:g})"
        clipped = f"clip(rho, {1 - self.clip_low:g}, {1 + self.clip_high:g})"
        correction = "rho " if self.kl_gradient == "corrected" else ""
        kl = f" + {self.kl_coef:g} {correction}{self.kl_estimator}(l, l_ref)" if self.kl_coef else ""
        return f"{AGGREGATES[self.aggregate]} [-min({bounded} A, {clipped} A){kl}], rho = exp({move})"


# kl_coef is 0 in every preset, so that none needs a reference policy unasked; DeepSeekMath used 0.04 with "plain".
PRESETS = {
    config.name: config
    for config in (
        LossConfig(name="grpo", paper="arXiv 2402.03300 (DeepSeekMath)", aggregate="seq-mean-token-mean"),
        LossConfig(name="dr_grpo", paper="arXiv 2503.20783", aggregate="seq-mean-token-sum-norm"),
        # The paper normalises by the tokens of a group; like other trainers, this by those of the whole batch.
        LossConfig(name="dapo", paper="arXiv 2503.14476", aggregate="token-mean", clip_high=0.28),
        # Differs from dapo in whose tokens the denominator counts; shares only its name with arXiv 2506.02864.
        LossConfig(
            name="bnpo",
            paper="TRL, loss_type='bnpo'",
            aggregate="token-mean",
            denominator_scope="micro-batch",
        ),
    )
}


def preset(name, /, **overrides):
    """The ``LossConfig`` called ``name`` in ``PRESETS``, with some fields replaced.

    Raises ValueError for an unknown name or field, with the nearest one there is.
    """
    _check_choice("preset", name, PRESETS)
    for field in overrides:
        _check_choice("LossConfig field", field, [known.name for known in fields(LossConfig)])
    return replace(PRESETS[name], **overrides)


@dataclass(frozen=True)
class LossOutput:
    """The loss and its parts. Only ``loss`` carries gradient; per-token terms are 0 where masked.

    loss: scalar, float32 or float64.
    surrogate: (B, T) phi, before the weights. weights: (B, T) w.
    kl: (B, T) the KL term as it enters the loss, before kl_coef; None without ref_logprobs.
    ratio: (B, T) rho.
    clipped_low, clipped_high: (B, T) bool, where clipping cut the gradient: A < 0 below, A > 0 above the range.
    metrics: scalar tensors on the device, over the selected tokens: surrogate, ratio_mean, ratio_max,
        clip_low_fraction, clip_high_fraction, new_old_mean and new_old_max (|l - l_old|, 0 on a first on-policy
        step), and where given: kl, entropy, old_sampler_mean and old_sampler_max (|l_old - l_sampler|).
    """

    loss: torch.Tensor
    surrogate: torch.Tensor
    weights: torch.Tensor
    kl: torch.Tensor | None
    ratio: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    metrics: dict[str, torch.Tensor]


def loss_denominator(mask, config):
    """The number that ``config.aggregate`` divides by, for the rows of ``mask`` (B, T) bool; int64 scalar, >= 1.

    Tokens ("token-mean"), rows ("seq-mean-token-mean", "seq-mean-token-sum") or rows times max_completion_length
    ("seq-mean-token-sum-norm", ValueError where that is None). A fully masked row counts as a row, as in TRL.
    Stays on the device of the mask: no host synchronisation.
    """
    _check(
        mask.ndim == 2 and mask.dtype == torch.bool,
        f"mask: got {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool (B, T)",
    )
    if config.aggregate == "token-mean":
        return mask.sum().clamp(min=1)
    count = max(mask.shape[0], 1)
    if config.aggregate == "seq-mean-token-sum-norm":
        _check(
            config.max_completion_length is not None,
            "max_completion_length: got None, expected an int: it is the denominator of 'seq-mean-token-sum-norm'",
        )
        count *= config.max_completion_length
    return torch.full((), count, dtype=torch.int64, device=mask.device)


def _check_inputs(logprobs, advantages, mask, required, optional, denominator):
    shape = tuple(logprobs.shape)
    _check(
        logprobs.ndim == 2 and logprobs.is_floating_point(),
        f"logprobs: got {logprobs.dtype} of shape {shape}, expected a floating dtype (B, T)",
    )
    _check(mask.dtype == torch.bool, f"mask: got {mask.dtype}, expected torch.bool")
    given = {name: value for name, value in optional.items() if value is not None}
    for name, value in {"mask": mask, **required, **given}.items():
        got = None if value is None else tuple(value.shape)
        _check(got == shape, f"{name}: got shape {got}, expected {shape} as logprobs")
    got = tuple(advantages.shape)
    _check(got in (shape[:1], shape), f"advantages: got shape {got}, expected {shape[:1]} or {shape}")
    if isinstance(denominator, torch.Tensor):
        got = tuple(denominator.shape)
        _check(denominator.numel() == 1, f"denominator: got shape {got}, expected a scalar")
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
):
    """The loss of ``config`` (its ``formula``) on one batch or micro-batch.

    Args:
        logprobs: (B, T) floating; the policy's log-probs of the sampled tokens. The only input that gets gradient.
        old_logprobs: (B, T); the policy's at rollout, recomputed by the trainer. ``logprobs.detach()`` on policy.
        advantages: (B,) one a completion, or (B, T) one a token.
        mask: (B, T) bool; True for the tokens that count. What stands elsewhere is never read.
        config: ``LossConfig``.
        ref_logprobs: (B, T); the reference policy's. Needed for kl_coef > 0, else only measured.
        sampler_logprobs: (B, T); those the sampler recorded. Only measured against old_logprobs: the loss makes no
            importance correction for a sampler that differs from the trainer.
        entropy: (B, T); of the policy's next-token distribution. Only measured.
        denominator: number or scalar tensor > 0 instead of ``loss_denominator(mask, config)``. With that of the
            whole batch, the losses of its micro-batches sum to the batch's loss, and so do their gradients.

    Returns ``LossOutput``. Nothing waits for the device. A batch without a selected token has loss 0, gradient 0.
    Raises ValueError for a wrong shape or dtype and for a missing ref_logprobs or max_completion_length.
    """
    required, optional = (
        {"old_logprobs": old_logprobs},
        {"sampler_logprobs": sampler_logprobs, "entropy": entropy},
    )
    (required if config.kl_coef else optional)["ref_logprobs"] = ref_logprobs
    _check_inputs(logprobs, advantages, mask, required, optional, denominator)
    if denominator is None:
        denominator = loss_denominator(mask, config)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.reshape(()).to(dtype)

    def select(values):
        return torch.where(mask, values.to(dtype), 0.0)

    def mean(values):
        return select(values).sum() / mask.sum().clamp(min=1)

    def largest(values):
        # The zero in front keeps the maximum of an empty batch defined.
        return torch.nn.functional.pad(values.flatten(), (1, 0)).amax()

    new, old = select(logprobs), select(old_logprobs.detach())
    advantages = advantages.detach()
    advantages = select(advantages if advantages.ndim == 2 else advantages[:, None].expand_as(mask))
    sampler = None if sampler_logprobs is None else select(sampler_logprobs.detach())

    ratio = RATIOS[config.ratio_level](new - old, mask)
    surrogate, clipped_low, clipped_high = SURROGATES[config.surrogate](ratio, advantages, new, config)
    weights = token_weights(old, sampler, mask, config)
    per_token, kl = weights * surrogate, None
    if ref_logprobs is not None:
        kl = kl_penalty(new, select(ref_logprobs.detach()), config.kl_estimator)
        kl = ratio * kl if config.kl_gradient == "corrected" else kl
    if config.kl_coef:
        per_token = per_token + config.kl_coef * kl
    loss = aggregate(per_token, mask, config, denominator)

    with torch.no_grad():
        gap = (new - old).abs()
        metrics = {
            "surrogate": mean(surrogate),
            "ratio_mean": mean(ratio),
            "ratio_max": largest(select(ratio)),
            "clip_low_fraction": mean(clipped_low),
            "clip_high_fraction": mean(clipped_high),
            "new_old_mean": mean(gap),
            "new_old_max": largest(gap),
        }
        if kl is not None:
            metrics["kl"] = mean(kl)
        if entropy is not None:
            metrics["entropy"] = mean(entropy)
        if sampler is not None:
            metrics["old_sampler_mean"] = mean((old - sampler).abs())
            metrics["old_sampler_max"] = largest((old - sampler).abs())
        return LossOutput(
            loss=loss,
            surrogate=select(surrogate),
            weights=select(weights),
            kl=None if kl is None else select(kl),
            ratio=select(ratio),
            clipped_low=clipped_low & mask,
            clipped_high=clipped_high & mask,
            metrics=metrics,
        )
