"""Replay: a cell's gradient is the one that training with it would have had."""

import json

import pytest
import torch
from nanogrpo.grpo.replay import Cell, bootstrap_interval, grid, replay
from tiny_run import tiny_trainer, wake


@pytest.fixture(scope="module")
def recorded():
    trainer = tiny_trainer(share_prefix=False, temperature=0.8)
    wake(trainer)
    return trainer, [trainer.collect(step)[0] for step in (1, 2, 3)]


def trained_gradient(trainer, batch, patch=lambda other: None, **overrides):
    """(loss, gradient) as a trainer of that setting computes them, with the same weights."""
    other = tiny_trainer(max_grad_norm=1e9, temperature=0.8, **overrides)
    wake(other)
    patch(other)
    rows, _ = other.objective.prepare(batch)
    loss = other._update(rows, 1)["loss"]
    return loss, torch.cat([p.grad.flatten() for p in other.policy.adapters().values()])


CELLS = [
    Cell("grpo", "grpo"),
    Cell("dr_grpo", "dr_grpo"),
    Cell("grpo", "rloo", kl_coef=0.2),
    Cell("dapo", "grpo", kl_coef=0.2, kl_gradient="plain"),
    Cell("reinforce_pp_baseline", "reinforce_pp_baseline", kl_coef=0.2),
    Cell("rloo", "rloo", kl_coef=0.5),
    Cell("grpo", "grpo", aggregate="prompt-mean"),
]
TRAINABLE = 6  # cells that a trainer's flags can name


def test_losses_and_gradients_are_those_of_training(recorded):
    trainer, batches = recorded
    result = replay(trainer.policy, batches, CELLS, max_completion_length=7)
    for row, batch in enumerate(batches):
        gradients = []
        for column, cell in enumerate(CELLS[:TRAINABLE]):
            settings = {"algorithm": cell.loss, "estimator": cell.estimator, "kl_coef": cell.kl_coef}
            if cell.kl_gradient:
                config = cell.config(7)
                settings["patch"] = lambda other, config=config: setattr(
                    other.objective, "loss_config", config
                )
            loss, gradient = trained_gradient(trainer, batch, max_completion_length=7, **settings)
            gradients.append(gradient)
            assert result.losses[row][column] == pytest.approx(loss, rel=1e-4, abs=1e-6)
            assert result.norms[row][column] == pytest.approx(gradient.norm().item(), rel=1e-4)
        for i, a in enumerate(gradients):
            for j, b in enumerate(gradients):
                cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
                assert result.cosines[row][i][j] == pytest.approx(cosine, abs=1e-4)


def test_micro_batches_change_nothing(recorded):
    trainer, batches = recorded
    whole = replay(trainer.policy, batches[:1], CELLS)
    split = replay(trainer.policy, batches[:1], CELLS, token_budget=210)
    torch.testing.assert_close(torch.tensor(whole.losses), torch.tensor(split.losses), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(whole.cosines), torch.tensor(split.cosines), rtol=0, atol=1e-4)


def test_bnpo_divides_by_its_micro_batches(recorded):
    trainer, batches = recorded
    cells = [Cell("bnpo", "grpo"), Cell("dapo", "grpo")]
    split = replay(trainer.policy, batches[:1], cells, token_budget=84)
    loss, _ = trained_gradient(trainer, batches[0], algorithm="bnpo", token_budget=84, kl_coef=0.0)
    assert split.losses[0][0] == pytest.approx(loss, rel=1e-4)
    assert abs(split.losses[0][0] - split.losses[0][1]) > 1e-4


def test_the_policy_is_left_as_it_was(recorded):
    trainer, batches = recorded
    before = [p.clone() for p in trainer.policy.adapters().values()]
    replay(trainer.policy, batches[:1], CELLS[:1])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.adapters().values(), strict=True))
    assert all(p.grad is None for p in trainer.policy.adapters().values())


def test_grid_has_each_different_cell_once():
    cells = grid(["grpo", "dapo"], ["grpo"], kl_coefs=(0.0, 0.1), kl_gradients=("corrected", "plain"))
    assert len(cells) == len(set(cells)) == 2 * (1 + 2)
    assert len({cell.name for cell in cells}) == len(cells)


def test_table_and_files(recorded, tmp_path):
    trainer, batches = recorded
    result = replay(trainer.policy, batches, CELLS)
    header, *lines = result.table()
    assert len(lines) == len(CELLS) and len({len(line) for line in [header, *lines]}) == 1
    assert all(line.count("[") == 3 for line in lines)
    result.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert saved["losses"] == result.losses and saved["cells"][1]["loss"] == "dr_grpo"
    assert (tmp_path / "out" / "replay.png").read_bytes().startswith(b"\x89PNG")


def test_one_batch_has_no_interval(recorded):
    trainer, batches = recorded
    assert bootstrap_interval([1.0]) is None
    assert "[" not in replay(trainer.policy, batches[:1], CELLS[:1]).table()[1]


def test_bootstrap_interval_covers_the_mean():
    """Of 200 samples of 20 normal values the interval covers the true mean in some 90%, a little under 95%."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for sample in torch.randn(200, 20, generator=generator).tolist():
        low, high = bootstrap_interval(sample, resamples=400)
        assert low < sum(sample) / 20 < high
        covered += low < 0 < high
    assert 170 <= covered <= 198


def test_a_batch_without_signal_has_no_direction(recorded, tmp_path):
    trainer, batches = recorded
    batch = batches[0].select(list(range(8)))
    batch.rewards = torch.full((8,), 0.95)
    result = replay(trainer.policy, [batch], CELLS[:2])
    assert result.norms == [[0, 0]] and result.cosines[0][0][1] is None
    assert result.table()[1].endswith("none")
    beside = replay(trainer.policy, [batch, batches[1], batches[2]], CELLS[:2])
    alone = replay(trainer.policy, batches[1:], CELLS[:2])
    shown = lambda replayed: replayed.table()[2].split(" | ")[-1]
    assert "nan" not in shown(beside) and shown(beside) == shown(alone)
    beside.save(tmp_path)
    text = (tmp_path / "replay.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_bad_batches_and_grids(recorded):
    trainer, batches = recorded
    with pytest.raises(ValueError, match="got 0 cells and 3 batches"):
        replay(trainer.policy, batches, [])
    foreign = batches[0].select([0])
    foreign.input_ids = foreign.input_ids + 90
    with pytest.raises(ValueError, match="batch 1 holds token .*, but tiny has a vocabulary of 96"):
        replay(trainer.policy, [batches[0], foreign], CELLS[:1])
