"""Counterfactual replay: one set of rollouts, many losses, and the gradient that each would have given.

A cell is a loss preset x an advantage estimator x a KL term x an aggregation. For every saved ``RolloutBatch`` the
policy scores the completions once; the gradient of a cell to the adapters is then one product with that graph, since
a loss reaches the weights only through the log-probs:

    grad L = sum_it (dL / dl_it) grad l_it

The result is each cell's loss, gradient norm and the cosine between every two cells' gradients: the mean over the
batches with a 95% bootstrap interval. Takes 4 bytes a cell and adapter parameter.
"""

import json
import random
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

from ..rollout import split_by_budget
from .loss import loss_denominator, policy_loss, preset
from .objectives import estimate_advantages

RESAMPLES = 2000


@dataclass(frozen=True)
class Cell:
    """One way to turn rollouts into a gradient; aggregate: None for the preset's own."""

    loss: str
    estimator: str
    kl_coef: float = 0.0
    kl_gradient: str = "corrected"
    aggregate: str | None = None

    @property
    def name(self):
        kl = f" + {self.kl_coef:g} KL {self.kl_gradient}" if self.kl_coef else ""
        return f"{self.loss} / {self.estimator}{kl}" + (f" / {self.aggregate}" if self.aggregate else "")

    def config(self, max_completion_length):
        changes = {"kl_coef": self.kl_coef, "max_completion_length": max_completion_length}
        if self.kl_coef:
            changes["kl_gradient"] = self.kl_gradient
        if self.aggregate:
            changes["aggregate"] = self.aggregate
        return preset(self.loss, **changes)


def grid(losses, estimators, kl_coefs=(0.0,), kl_gradients=("corrected",), aggregates=(None,)):
    """Every combination as a ``Cell``; without a KL term its gradient makes no difference and is not repeated."""
    cells = []
    for loss, estimator, kl_coef, kl_gradient, aggregate in product(
        losses, estimators, kl_coefs, kl_gradients, aggregates
    ):
        cell = Cell(loss, estimator, kl_coef, kl_gradient if kl_coef else "corrected", aggregate)
        if cell not in cells:
            cells.append(cell)
    return cells


def replay(policy, batches, cells, *, token_budget=4096):
    """``Replay`` of ``cells`` on ``batches`` (list of ``RolloutBatch``) under the present weights of ``policy``."""
    losses, norms, cosines = [], [], []
    for batch in batches:
        loss, gradients = _gradients(policy, batch, cells, token_budget)
        gram = (gradients @ gradients.T).double()
        norm = gram.diagonal().sqrt()
        # A zero gradient has no direction: its cosines are NaN.
        cosines.append((gram / (norm[:, None] * norm)).tolist())
        losses.append(loss)
        norms.append(norm.tolist())
    return Replay(cells, losses, norms, cosines)


def _gradients(policy, batch, cells, token_budget):
    """(loss of each cell, (C, P) gradients to the adapters) of one batch."""
    parameters = list(policy.adapters().values())
    longest = int(batch.completion_lengths().max())
    configs = [cell.config(longest) for cell in cells]
    mask, group_ids = batch.padded_mask(), batch.group_ids
    denominators = [loss_denominator(mask, config, group_ids) for config in configs]
    advantages = [estimate_advantages(batch, batch.rewards, cell.estimator) for cell in cells]
    losses = [0.0] * len(cells)
    gradients = torch.zeros(len(cells), sum(p.numel() for p in parameters))
    for rows in split_by_budget(batch.sequences(), token_budget):
        micro = batch.select(rows)
        options = {"cu_seqlens": micro.cu_seqlens, "temperature": float(batch.temperature)}
        logprobs = micro.padded(policy.score(micro.input_ids, micro.completion_mask, **options))
        reference = None
        if any(cell.kl_coef for cell in cells):
            with torch.no_grad(), policy.disable_adapters():
                reference = micro.padded(policy.score(micro.input_ids, micro.completion_mask, **options))
        mask = micro.padded_mask().to(logprobs.device)
        sampled = micro.padded(micro.sampler_logprobs).to(logprobs.device)
        for index, config in enumerate(configs):
            leaf = logprobs.detach().requires_grad_()
            # "prompt-mean" divides each row by its own number.
            denominator = denominators[index][rows] if denominators[index].ndim else denominators[index]
            out = policy_loss(
                leaf,
                sampled,
                advantages[index][rows].to(logprobs.device),
                mask,
                config,
                ref_logprobs=reference if config.kl_coef else None,
                denominator=denominator.to(logprobs.device),
            )
            (per_token,) = torch.autograd.grad(out.loss, leaf)
            found = torch.autograd.grad(logprobs, parameters, per_token, retain_graph=True)
            gradients[index] += torch.cat([g.flatten() for g in found]).float().cpu()
            losses[index] += out.loss.item()
    return losses, gradients


@dataclass(frozen=True)
class Replay:
    """losses, norms: a row a batch, a column a cell; cosines: for each batch the matrix between cells."""

    cells: list[Cell]
    losses: list[list[float]]
    norms: list[list[float]]
    cosines: list[list[list[float]]]

    def table(self):
        """Lines of text: each cell's loss, gradient norm and cosine to the first cell."""
        width = max(len(cell.name) for cell in self.cells)
        lines = [f"{'':{width}} | {'loss':>32} | {'gradient norm':>32} | {'cosine to the first':>32}"]
        for index, cell in enumerate(self.cells):
            columns = (
                [row[index] for row in self.losses],
                [row[index] for row in self.norms],
                [matrix[0][index] for matrix in self.cosines],
            )
            lines.append(f"{cell.name:{width}} | " + " | ".join(f"{_shown(c):>32}" for c in columns))
        return lines

    def save(self, folder):
        """Write replay.json, everything measured, and replay.png, the mean cosines."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "replay.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        self._plot(folder / "replay.png")

    def _plot(self, path):
        from matplotlib.figure import Figure

        mean = torch.tensor(self.cosines, dtype=torch.float64).mean(0)
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
    text, interval = f"{sum(values) / len(values):.4g}", bootstrap_interval(values)
    return text if interval is None else f"{text} [{interval[0]:.4g}, {interval[1]:.4g}]"
