"""Our losses beside those of TRL, Liger-Kernel and verl: the same float64 tensors through both.

``verify`` returns a row for each (case, loss) that the peer can compute: value and gradient of both, and whether
they agree within ``TOLERANCE`` or differ for a reason that ``DIFFERENCES`` knows. The peers are looked up when asked
for; none is needed to import this file. Versions: requirements-oracles.txt.
"""

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from .advantages import group_advantages
from .loss import PRESETS, policy_loss, preset
from .peers import PEERS, import_peer

TOLERANCE = 1e-9
LENGTH = 8


@dataclass(frozen=True)
class Difference:
    """A known difference: rows of ``peers`` whose "case: loss" matches the pattern differ by ``at_most``."""

    peers: str
    pattern: str
    where: str
    why: str
    at_most: float = math.inf


DIFFERENCES = (
    Difference("trl", r".*: sapo.*", "sapo, 1e-8", "TRL keeps the temperature 1.05 in float32", 1e-7),
    Difference(
        "verl",
        r".*: (grpo|gspo|gspo_token|sapo|gmpo).*",
        "row means, 1e-8 relative",
        "verl divides by the row's tokens + 1e-8, here by max(tokens, 1)",
        1e-7,
    ),
    Difference(
        "trl",
        r"empty row: (rloo|gmpo).*",
        "rloo and gmpo, a row without a token",
        "TRL gives such a row the ratio exp(0) = 1 and adds -A / N to the value; here it adds 0",
    ),
    Difference(
        "trl liger",
        r"dirty padding: .*",
        "NaN or an overflow where masked",
        "they multiply by the mask, and NaN times 0 is NaN; here the mask selects",
    ),
    Difference(
        "liger",
        r".*: luspo( kl=.*|, token.*)",
        "luspo with a KL term or token ratios",
        "Liger 0.8.5 weighs whole rows, padding included, by their length and divides by B T; TRL sums the selected",
    ),
    Difference(
        "verl",
        r".*: cispo.*",
        "cispo",
        "verl bounds the ratio by 1 - clip_low and 1 + clip_high; here, as in TRL, by clip_high alone",
    ),
    Difference(
        "verl",
        r"empty row: (grpo|dr_grpo|gspo|gspo_token|sapo|luspo)",
        "row means and row sums, a row without a token",
        "verl does not count such a row in N; here, as in TRL, it counts and adds 0",
    ),
    Difference(
        "verl", r"nothing selected: .*", "no token selected", "verl returns 0 / 0; here the loss is 0"
    ),
    Difference(
        "verl",
        r"dirty padding: .*",
        "NaN or an overflow where masked",
        "verl selects in token means alone, and there, too, some gradients are NaN; here the mask selects",
    ),
    Difference(
        "verl",
        r"far off policy: (grpo|bnpo|dr_grpo|dapo|ppo|reinforce_pp|reinforce_pp_baseline)",
        "clipped losses, ratio above 3 with A < 0",
        "verl's dual clip is on by default (clip_ratio_c = 3); here dual_clip=None",
    ),
    Difference(
        "verl",
        r"equal rewards: advantage grpo",
        "grpo advantages of equal rewards",
        "verl divides rounding noise by its standard deviation; here such a group gets exactly 0",
    ),
    Difference(
        "verl",
        r"equal rewards: advantage reinforce_pp_baseline",
        "reinforce_pp_baseline, equal rewards beside other groups",
        "verl's whitening shifts them by the mean over tokens; here such a group gets exactly 0",
    ),
)
# Where the libraries' defaults differ while the same settings give the same loss: nothing for ``verify`` to find.
DEFAULTS = (
    (
        "cispo's bound",
        "5.0, and ValueError below 1",
        "TRL: epsilon_high falls back to 0.2 and clamps every ratio",
    ),
    (
        "kl_gradient",
        "corrected (rho k3)",
        "TRL from 1.16: corrected, before: plain k3; Liger: plain; verl: none",
    ),
    ("dual_clip", "None", "TRL (delta), Liger: None; verl: 3.0"),
    ("denominator of token means", "tokens of the batch", "verl without counts: of the micro-batch"),
    (
        "L of dr_grpo",
        "max_completion_length, required",
        "verl: the padded width unless loss_scale_factor is set",
    ),
    ("eps beside a standard deviation", "1e-4", "TRL: 1e-4; verl: 1e-6"),
    ("sampler_correction", "None", "TRL with vLLM: sequence_mask, 3.0; verl: off"),
    ("truncated rows in the baseline", "as in_baseline says", "TRL, verl: always in"),
)


@dataclass(frozen=True)
class Row:
    """One comparison; ``gradient_error`` is the largest, ``verdict`` "equal", "known: ..." or "UNKNOWN"."""

    case: str
    loss: str
    ours: float
    theirs: float
    gradient_error: float
    verdict: str


def golden_batch():
    """The closed-form case of the golden vectors: four rows of 6, 4, 2 and 5 tokens, float64, no random numbers."""
    i = torch.arange(24, dtype=torch.float64).view(4, 6)
    new = -0.5 - 0.35 * torch.sin(1.7 * i) - 0.1 * (i % 5)
    rewards = torch.tensor([1, 0, 0.5, 2], dtype=torch.float64)
    return {
        "logprobs": new,
        "old_logprobs": new - 0.45 * torch.cos(0.9 * i + 0.3),
        "advantages": (rewards - rewards.mean()) / (rewards.std() + 1e-4),
        "mask": torch.arange(6) < torch.tensor([6, 4, 2, 5])[:, None],
        "ref_logprobs": new + 0.30 * torch.sin(2.3 * i + 1),
        "sampler_logprobs": new - 0.45 * torch.cos(0.9 * i + 0.3) + 0.4 * torch.sin(3.1 * i),
        "entropy": 1 + torch.sin(1.3 * i + 0.5),
    }


def random_batch(seed, rows=6, width=9):
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)
    new = -3 * uniform(rows, width) - 0.05
    return {
        "logprobs": new,
        "old_logprobs": new + uniform(rows, width) - 0.5,
        "advantages": 4 * uniform(rows) - 2,
        "mask": torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator),
        "ref_logprobs": new + 2 * uniform(rows, width) - 1,
        "sampler_logprobs": new + uniform(rows, width) - 0.5,
        "entropy": uniform(rows, width),
    }


def _changed(**changes):
    batch = golden_batch()
    return batch | {name: change(batch) for name, change in changes.items()}


def _dirty(name, value):
    return {name: lambda batch: torch.where(batch["mask"], batch[name], value)}


CASES = {
    "golden": golden_batch,
    "random 1": lambda: random_batch(1),
    "random 2": lambda: random_batch(2),
    "empty row": lambda: _changed(mask=lambda batch: batch["mask"] & (torch.arange(4) != 1)[:, None]),
    "nothing selected": lambda: _changed(mask=lambda batch: torch.zeros_like(batch["mask"])),
    "dirty padding": lambda: _changed(**_dirty("logprobs", math.nan)),
    "far off policy": lambda: _changed(
        old_logprobs=lambda batch: batch["old_logprobs"] - (torch.arange(4) == 1)[:, None] * 2
    ),
}
STRANGE = ("empty row", "nothing selected", "dirty padding", "far off policy")


def loss_configs():
    """{label: LossConfig}: every preset at the golden case's clip, with and without a KL term, and every weight."""
    configs = {}
    for name, known in PRESETS.items():
        wide = {"clip_low": 0.2, "clip_high": 0.28} if known.surrogate == "clip" else {}
        configs[name] = preset(name, max_completion_length=LENGTH, **wide)
        if known.kl_place == "loss":
            for gradient in ("corrected", "plain"):
                kl = {"kl_coef": 0.04, "kl_estimator": "k3", "kl_gradient": gradient}
                configs[f"{name} kl={gradient}"] = preset(name, max_completion_length=LENGTH, **wide, **kl)
    configs["luspo, token"] = preset("luspo", ratio_level="token", clip_high=0.28)
    configs["cispo, sequence"] = preset("cispo", ratio_level="sequence")
    configs["dppo, kl"] = preset("dppo", surrogate="dppo-kl", clip_low=0.01, clip_high=0.01)
    configs["dapo dual_clip"] = preset("dapo", dual_clip=3.0)
    configs["dapo top_entropy"] = preset("dapo", top_entropy=0.55)
    configs["grpo off_policy"] = preset("grpo", off_policy_threshold=0.05)
    for mode in ("token-truncate", "token-mask", "sequence-truncate", "sequence-mask"):
        configs[f"grpo {mode}"] = preset("grpo", sampler_correction=mode, sampler_min=0.7, sampler_max=1.5)
    configs["vespo token-truncate"] = preset("vespo", sampler_correction="token-truncate", sampler_min=0.7)
    return configs


def _verdict(against, case, label, error, tolerance=TOLERANCE):
    if error <= tolerance:
        return "equal"
    for known in DIFFERENCES:
        if against in known.peers.split() and error <= known.at_most:
            if re.fullmatch(known.pattern, f"{case}: {label}"):
                return f"known: {known.where}"
    return "UNKNOWN"


def _value_and_gradient(loss, batch):
    new = batch["logprobs"].clone().requires_grad_()
    value = loss(batch | {"logprobs": new})
    if value is None:
        return None
    (gradient,) = torch.autograd.grad(value, new, allow_unused=True)
    return value.item(), torch.zeros_like(new) if gradient is None else gradient


def _distance(a, b):
    """|a - b|, inf where either is no number."""
    return math.inf if math.isnan(a) or math.isnan(b) else abs(a - b)


def verify(against):
    """Compare every loss that the peer has, on every case; verl's advantage estimators too. Returns ``Row``s.

    against: "trl", "liger" or "verl". ValueError for another name, or where the peer is not installed.
    """
    if against not in PEERS:
        raise ValueError(f"against: got {against!r}, expected one of {list(PEERS)}")
    rows = []
    for case, make in CASES.items():
        batch = make()
        for label, config in loss_configs().items():
            plain = label in PRESETS or label == "dapo dual_clip"
            if case in STRANGE and not plain:
                continue
            theirs = _value_and_gradient(lambda batch, config=config: PEERS[against](config, batch), batch)
            if theirs is None:
                continue
            ours = _value_and_gradient(
                lambda batch, config=config: policy_loss(**batch, config=config).loss, batch
            )
            error = _distance(ours[0], theirs[0])
            gradient_error = (ours[1] - theirs[1]).abs().max().nan_to_num(math.inf).item()
            verdict = _verdict(against, case, label, max(error, gradient_error))
            rows.append(Row(case, label, ours[0], theirs[0], gradient_error, verdict))
    return rows + (_verl_advantages() if against == "verl" else [])


VERL_ESTIMATORS = {
    "grpo": "grpo",
    "dr_grpo": "grpo",
    "rloo": "rloo",
    "opo": "opo",
    "gpg": "gpg",
    "passk": "grpo_passk",
    "reinforce_pp": "reinforce_plus_plus",
    "reinforce_pp_baseline": "reinforce_plus_plus_baseline",
}


def _verl_advantages():
    """verl's estimators beside ours, as ``Row``s of the row that differs most, without a gradient."""
    peer = import_peer("verl", "verl.trainer.ppo.core_algos")
    groups, lengths = torch.tensor([0] * 4 + [1] * 8), torch.tensor([1, 5, 2, 3] * 3)
    mask, last = torch.arange(5) < lengths[:, None], torch.nn.functional.one_hot(lengths - 1, 5)
    varied = torch.tensor([1, 0, 0.5, 2, 0, 1, 1, 0, 0, 0, 3, 0], dtype=torch.float64)
    equal = torch.where(groups == 1, 0.95, varied).float()
    rows = []
    for case, rewards, tolerance in (("golden", varied, TOLERANCE), ("equal rewards", equal, 1e-6)):
        for name, theirs in VERL_ESTIMATORS.items():
            config = SimpleNamespace(gamma=1.0, get=lambda key, default=None: False)
            extra = {"norm_adv_by_std_in_grpo": name == "grpo"} if theirs == "grpo" else {"config": config}
            found, _ = peer.get_adv_estimator_fn(theirs)(
                token_level_rewards=rewards[:, None] * last,
                response_mask=mask.to(rewards.dtype),
                index=groups.numpy(),
                **extra,
            )
            found = (found * last).sum(dim=1).double()
            ours = group_advantages(rewards, groups, name, 1e-6, lengths=lengths).double()
            worst = (found - ours).abs().argmax()
            a, b = ours[worst].item(), found[worst].item()
            label = f"advantage {name}"
            rows.append(Row(case, label, a, b, 0.0, _verdict("verl", case, label, abs(a - b), tolerance)))
    return rows


def differences_table():
    """``DIFFERENCES`` and ``DEFAULTS`` as the Markdown of docs/algorithms.md."""
    lines = ["| peer | where | why |", "|---|---|---|"]
    lines += [f"| {known.peers.replace(' ', ', ')} | {known.where} | {known.why} |" for known in DIFFERENCES]
    lines += ["", "| setting | here | there |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in DEFAULTS])


def run(against, say=print):
    """Say the table of ``verify(against)`` line by line; 0 if every difference is known, else 1."""
    rows = verify(against)
    say(f"{'case':17} {'loss':32} {'ours':>18} {against:>18} {'|d gradient|':>12}  verdict")
    for row in rows:
        values = f"{row.ours:18.12f} {row.theirs:18.12f} {row.gradient_error:12.1e}"
        say(f"{row.case:17} {row.loss:32} {values}  {row.verdict}")
    counts = [sum(row.verdict.startswith(kind) for row in rows) for kind in ("equal", "known", "UNKNOWN")]
    say("{} equal, {} differ for a known reason, {} unknown".format(*counts))
    return 1 if counts[2] else 0
