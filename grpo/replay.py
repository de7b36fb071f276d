"""Counterfactual replay: one set of rollouts, many losses, and the gradient that each would have given.

A cell is a loss preset x an advantage estimator x a KL term x an aggregation. For every saved ``RolloutBatch`` the
policy scores the completions once; the gradient of a cell to the adapters is then one product with that graph, since
a loss reaches the weights only through the log-probs:

    grad L = sum_it (dL / dl_it) grad l_it

The result is each cell's loss, gradient norm and the cosine between every two cells' gradients: the mean over the
batches with a 95% bootstrap interval. Takes 4 bytes a cell and adapter parameter.
"""

import json
import math
import random
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

from ..rollout import split_by_budget
from .loss import LossConfig, kl_reward_penalty, loss_denominator, policy_loss, preset
from .objectives import estimate_advantages

RESAMPLES = 2000


@dataclass(frozen=True)
class Cell:
    """One way to turn rollouts into a gradient; kl_gradient and aggregate: None for the preset's own."""

    loss: str
    estimator: str
    kl_coef: float = 0.0
    kl_gradient: str | None = None
    aggregate: str | None = None

    @property
    def name(self):
        kl = " ".join([f" + {self.kl_coef:g} KL", *filter(None, [self.kl_gradient])]) if self.kl_coef else ""
        return f"{self.loss} / {self.estimator}{kl}" + (f" / {self.aggregate}" if self.aggregate else "")

    def config(self, max_completion_length):
        chosen = {"kl_gradient": self.kl_gradient if self.kl_coef else None, "aggregate": self.aggregate}
        return preset(
            self.loss,
            kl_coef=self.kl_coef,
            max_completion_length=max_completion_length,
            **{name: value for name, value in chosen.items() if value is not None},
        )


def grid(losses, estimators, kl_coefs=(0.0,), kl_gradients=(None,), aggregates=(None,)):
    """Every combination as a ``Cell``; without a KL term its gradient makes no difference and is not repeated."""
    for kl_gradient in kl_gradients:
        if kl_gradient is not None:
            LossConfig(kl_gradient=kl_gradient)  # a wrong name is refused even where no KL term would use it
    cells = []
    for loss, estimator, kl_coef, kl_gradient, aggregate in product(
        losses, estimators, kl_coefs, kl_gradients, aggregates
    ):
        cell = Cell(loss, estimator, kl_coef, kl_gradient if kl_coef else None, aggregate)
        if cell not in cells:
            cells.append(cell)
    return cells


def replay(policy, batches, cells, *, token_budget=4096, max_completion_length=None):
    """``Replay`` of ``cells`` on ``batches`` (list of ``RolloutBatch``) under the present weights of ``policy``.

    max_completion_length: the run's, which some losses divide by; None: the longest completion of all batches.
    Raises ValueError without a cell or a batch, and for tokens that the policy does not know.
    """
    if not cells or not batches:
        raise ValueError(f"got {len(cells)} cells and {len(batches)} batches, expected at least one of each")
    for number, batch in enumerate(batches):
        top, vocabulary = int(batch.input_ids.max()), policy.config.vocab_size
        if top >= vocabulary:
            raise ValueError(
                f"batch {number} holds token {top}, but {policy.name} has a vocabulary of {vocabulary}"
            )
    longest = max(int(batch.completion_lengths().max()) for batch in batches)
    configs = [
        cell.config(longest if max_completion_length is None else max_completion_length) for cell in cells
    ]
    losses, norms, cosines = [], [], []
    for batch in batches:
        loss, gradients = _gradients(policy, batch, cells, configs, token_budget)
        gram = (gradients @ gradients.T).double()
        norm = gram.diagonal().sqrt()
        cosine = gram / (norm[:, None] * norm)
        # A zero gradient has no direction.
        cosines.append([[None if math.isnan(value) else value for value in row] for row in cosine.tolist()])
        losses.append(loss)
        norms.append(norm.tolist())
    return Replay(cells, losses, norms, cosines)


def _gradients(policy, batch, cells, configs, token_budget):
    """(loss of each cell, (C, P) gradients to the adapters) of one batch."""
    parameters = list(policy.adapters().values())
    runs = split_by_budget(batch.sequences(), token_budget)

    place = lambda values: values.to(policy.device)

    def score(rows):
        micro = batch.select(rows)
        options = {"cu_seqlens": micro.cu_seqlens, "temperature": float(batch.temperature)}
        return policy.score(micro.input_ids, micro.completion_mask, **options)

    mask, scored, reference = batch.padded_mask(), None, None
    if any(config.kl_coef for config in configs):
        with torch.no_grad():
            scored = batch.padded(torch.cat([score(rows) for rows in runs]).cpu())
            with policy.disable_adapters():
                reference = batch.padded(torch.cat([score(rows) for rows in runs]).cpu())
    advantages, denominators = [], []
    for cell, config in zip(cells, configs, strict=True):
        rewards = batch.rewards
        if config.kl_coef and config.kl_place == "reward":
            rewards = rewards - kl_reward_penalty(scored, reference, mask, config).sum(1)
        advantages.append(estimate_advantages(batch, rewards, cell.estimator))
        denominators.append(loss_denominator(mask, config, batch.group_ids))
    losses = [0.0] * len(cells)
    gradients = torch.zeros(len(cells), sum(p.numel() for p in parameters))
    for rows in runs:
        micro = batch.select(rows)
        logprobs = micro.padded(score(rows))
        width = logprobs.shape[1]
        for index, config in enumerate(configs):
            leaf = logprobs.detach().requires_grad_()
            denominator = denominators[index]
            if config.denominator_scope == "micro-batch":
                denominator = len(runs) * loss_denominator(micro.padded_mask(), config, micro.group_ids)
            elif denominator.ndim:  # "prompt-mean" divides each row by its own number
                denominator = denominator[rows]
            with_kl = config.kl_coef and config.kl_place == "loss"
            out = policy_loss(
                leaf,
                place(micro.padded(micro.sampler_logprobs)),
                place(advantages[index][rows]),
                place(micro.padded_mask()),
                config,
                ref_logprobs=place(reference[rows, :width]) if with_kl else None,
                denominator=place(denominator),
            )
            (per_token,) = torch.autograd.grad(out.loss, leaf)
            found = torch.autograd.grad(logprobs, parameters, per_token, retain_graph=True)
            gradients[index] += torch.cat([g.flatten() for g in found]).float().cpu()
            losses[index] += out.loss.item()
    return losses, gradients


@dataclass(frozen=True)
class Replay:
    """losses, norms: a row a batch, a column a cell; cosines: for each batch the matrix between cells.

    The cosine is None where one of the two gradients is zero; means and intervals leave such batches out.
    """

    cells: list[Cell]
    losses: list[list[float]]
    norms: list[list[float]]
    cosines: list[list[list[float | None]]]

    def table(self):
        """Lines of text: each cell's loss, gradient norm and cosine to the first cell."""
        rows = [("", "loss", "gradient norm", "cosine to the first")]
        for index, cell in enumerate(self.cells):
            columns = (
                [row[index] for row in self.losses],
                [row[index] for row in self.norms],
                [matrix[0][index] for matrix in self.cosines],
            )
            rows.append((cell.name, *map(_shown, columns)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            " | ".join(
                [name.ljust(widths[0]), *(v.rjust(w) for v, w in zip(values, widths[1:], strict=True))]
            )
            for name, *values in rows
        ]

    def save(self, folder):
        """Write replay.json, everything measured, and replay.png, the mean cosines."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "replay.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        self._plot(folder / "replay.png")

    def _plot(self, path):
        from matplotlib.figure import Figure

        known = [[[math.nan if value is None else value for value in row] for row in m] for m in self.cosines]
        mean = torch.tensor(known, dtype=torch.float64).nanmean(0)
        size = 3 + 0.45 * len(self.cells)
        figure = Figure(figsize=(size + 2, size), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(mean.numpy(), vmin=-1, vmax=1, cmap="RdBu")
        names = [cell.name for cell in self.cells]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for i, j in product(range(len(names)), repeat=2):
            axes.text(j, i, f"{mean[i, j]:.2f}", ha="center", va="center", fontsize=7)
        axes.set_title(f"cosine between gradients, mean of {len(self.cosines)} batches")
        figure.colorbar(image)
        figure.savefig(path, dpi=120)


def bootstrap_interval(values, resamples=RESAMPLES):
    """(low, high): the middle 95% of means of ``values`` drawn anew with replacement; None for fewer than two."""
    if len(values) < 2:
        return None
    rng = random.Random(f"bootstrap/{len(values)}")
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    return means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]


def _shown(values):
    values = [value for value in values if value is not None]
    if not values:
        return "none"
    text, interval = f"{sum(values) / len(values):.4g}", bootstrap_interval(values)
    return text if interval is None else f"{text} [{interval[0]:.4g}, {interval[1]:.4g}]"
