"""GRPOTrainer: micro-batches add up, rows without signal teach nothing, bad rewards are named."""

import math

import pytest
import torch
from nanogrpo.grpo import PRESETS
from nanogrpo.grpo.loss import loss_denominator
from nanogrpo.grpo.rewards import RewardError
from tiny_run import FIELDS, adapters, odd, tiny_trainer, wake


def constant(completion, example):
    return 0.95


def gradients(token_budget, **overrides):
    """(gradient of one update before clipping, loss, number of micro-batches) with all else equal."""
    trainer = tiny_trainer(token_budget=token_budget, max_grad_norm=1e9, share_prefix=False, **overrides)
    wake(trainer)
    batch, _ = trainer.collect(1)
    trained = trainer._worth_training(batch)
    losses = []
    original = trainer._micro_loss

    def counted(*args, **kwargs):
        out, difference = original(*args, **kwargs)
        losses.append(out.loss.item())
        return out, difference

    trainer._micro_loss = counted
    denominator = loss_denominator(batch.padded_mask(), trainer.loss_config)
    metrics = trainer._update(trained, denominator, 1)
    assert metrics["loss"] == pytest.approx(sum(losses))
    return torch.cat([p.grad.flatten() for p in trainer.parameters]), metrics, len(losses)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "dapo"])
def test_micro_batches_sum_to_the_whole_batch(algorithm, kl_coef):
    whole, metrics, one = gradients(10**6, algorithm=algorithm, kl_coef=kl_coef)
    split, split_metrics, many = gradients(210, algorithm=algorithm, kl_coef=kl_coef)
    assert one == 1 and many >= 3
    assert whole.norm() > 0
    # Float32 sums of a few hundred terms in another order: 1e-5 of the largest entry is some 100 roundings.
    assert (whole - split).abs().max() <= 1e-5 * whole.abs().max()
    for name in ("loss", "kl", "grad_norm", "sampler_logprob_diff_max"):
        assert split_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_bnpo_is_the_mean_of_micro_batch_losses(kl_coef):
    """Each micro-batch is divided by its own tokens, and the M results are averaged."""
    settings = {"algorithm": "bnpo", "kl_coef": kl_coef}
    got, _, count = gradients(210, **settings)
    trainer = tiny_trainer(token_budget=210, share_prefix=False, **settings)
    wake(trainer)
    batch, _ = trainer.collect(1)
    rows = [[0, 1], [2, 3], [4, 5], [6, 7]]
    lengths = [len(s) for s in batch.sequences()]
    assert all(a + b <= 210 < a + b + c for a, b, c in zip(lengths, lengths[1:], lengths[2:], strict=False))
    assert count == len(rows)
    for run in rows:
        micro = batch.select(run)
        tokens = loss_denominator(micro.padded_mask(), trainer.loss_config)
        out, _ = trainer._micro_loss(micro, tokens, on_policy=True)
        (out.loss / len(rows)).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.parameters])
    assert expected.norm() > 0
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("share_prefix", [False, True])
def test_shared_prefixes_change_nothing(share_prefix):
    trainer = tiny_trainer(share_prefix=share_prefix, kl_coef=0.3)
    wake(trainer)
    batch, _ = trainer.collect(1)
    trainer._update(batch, loss_denominator(batch.padded_mask(), trainer.loss_config), 1)
    got = torch.cat([p.grad.flatten() for p in trainer.parameters])
    whole, _, _ = gradients(10**6, kl_coef=0.3)
    whole = whole * (1.0 / whole.norm()).clamp(max=1)  # tiny_trainer() clips at 1
    assert (whole - got).abs().max() <= 2e-5 * whole.abs().max()


@pytest.mark.parametrize("algorithm", PRESETS)
def test_step_trains_and_reports(algorithm):
    trainer = tiny_trainer(algorithm=algorithm)
    before = adapters(trainer)
    metrics = trainer.step()
    assert set(metrics) == FIELDS
    assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in metrics.values())
    assert metrics["step"] == trainer.step_count == 1
    assert metrics["sampler_logprob_diff_max"] <= 1e-5
    assert metrics["sampler_logprob_diff_mean"] <= metrics["sampler_logprob_diff_max"]
    assert metrics["trained_tokens"] == metrics["completion_tokens"] == 8 * metrics["completion_length"]
    after = adapters(trainer)
    # lora_b starts at 0, so the first step moves it alone.
    assert all(torch.equal(after[n], before[n]) == ("lora_A" in n) for n in before)


def test_sampler_and_trainer_agree_on_trained_adapters():
    trainer = tiny_trainer(temperature=0.7)
    wake(trainer)
    for _ in range(3):
        assert trainer.step()["sampler_logprob_diff_max"] <= 1e-5


def test_a_sampler_that_differs_is_seen():
    trainer = tiny_trainer()
    batch, completions = trainer.collect(1)
    batch.sampler_logprobs[batch.completion_mask.nonzero()[0]] -= 0.5
    trainer.collect = lambda step: (batch, completions)
    metrics = trainer.step()
    assert metrics["sampler_logprob_diff_max"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["sampler_logprob_diff_mean"] == pytest.approx(0.5 / metrics["trained_tokens"], abs=1e-5)


@pytest.mark.parametrize("algorithm", PRESETS)
def test_a_batch_without_signal_leaves_the_adapters(algorithm):
    trainer = tiny_trainer(constant, kl_coef=0.0, algorithm=algorithm)
    wake(trainer)
    before = adapters(trainer)
    metrics = trainer.step()
    assert metrics["signal_share"] == metrics["loss"] == metrics["grad_norm"] == 0
    assert metrics["kl"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), adapters(trainer).values(), strict=True))


def test_a_group_without_signal_teaches_nothing_but_counts():
    """Only the second prompt's group has signal: the update is that of its rows alone over all rows."""
    trainer = tiny_trainer(kl_coef=0.0, algorithm="dr_grpo", max_grad_norm=1e9)
    wake(trainer)
    first = trainer.task.draw(trainer.train_sets, 2, "0/1")[0]
    trainer.rewards[0] = type(trainer.rewards[0])(lambda c, e: 0.5 if e == first else odd(c, e), 1.0)
    batch, _ = trainer.collect(1)
    denominator = loss_denominator(batch.padded_mask(), trainer.loss_config)
    trained = trainer._worth_training(batch)
    assert set(trained.group_ids.tolist()) == {1}
    out, _ = trainer._micro_loss(batch, denominator, on_policy=True)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(out.loss, trainer.parameters)])
    trainer._update(trained, denominator, 1)
    got = torch.cat([p.grad.flatten() for p in trainer.parameters])
    assert expected.norm() > 0
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_kl_term_pulls_back_without_any_signal():
    trainer = tiny_trainer(constant, kl_coef=1.0, lr=1e-2, max_grad_norm=1e9)
    wake(trainer)
    before = adapters(trainer)
    metrics = trainer.step()
    assert metrics["kl"] > 0 and metrics["grad_norm"] > 0
    assert any(
        not torch.equal(a, b) for a, b in zip(before.values(), adapters(trainer).values(), strict=True)
    )


def test_measured_kl_without_a_kl_term():
    trainer = tiny_trainer(kl_coef=0.0)
    assert trainer.step()["kl"] == pytest.approx(0, abs=1e-6)  # fresh adapters are the base model
    later = trainer.step()["kl"]
    assert 0 < later < math.inf


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_two_iterations_on_a_batch(kl_coef):
    trainer = tiny_trainer(num_iterations=2, kl_coef=kl_coef)
    metrics = trainer.step()
    assert set(metrics) == FIELDS
    assert metrics["sampler_logprob_diff_max"] <= 1e-5  # of the policy that sampled, before it moved
    counts = {int(trainer.optimizer.state[p]["step"]) for p in trainer.parameters}
    assert counts == {2}
    once = tiny_trainer(num_iterations=1, kl_coef=kl_coef)
    once.step()
    pairs = zip(adapters(trainer).values(), adapters(once).values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_later_iterations_are_off_policy():
    """The ratio is against the policy that sampled, which has moved since."""
    trainer = tiny_trainer(kl_coef=0.0)
    wake(trainer)
    batch, _ = trainer.collect(1)
    wake(trainer, seed=2)
    denominator = loss_denominator(batch.padded_mask(), trainer.loss_config)
    out, _ = trainer._micro_loss(batch, denominator, on_policy=False)
    with torch.no_grad():
        moved = batch.padded(trainer._score(batch)) - batch.padded(batch.sampler_logprobs)
    mask = batch.padded_mask()
    assert moved[mask].abs().max() > 0.01
    torch.testing.assert_close(out.ratio[mask], moved[mask].exp())


def test_two_iterations_ask_for_the_off_policy_ratio_once():
    trainer, asked = tiny_trainer(num_iterations=2), []
    original = trainer._micro_loss

    def recorded(*args, on_policy):
        asked.append(on_policy)
        return original(*args, on_policy=on_policy)

    trainer._micro_loss = recorded
    trainer.step()
    assert asked == [True, False]


def test_steps_repeat_bit_for_bit_and_seeds_differ():
    runs = []
    for seed in (0, 0, 1):
        trainer = tiny_trainer(seed=seed)
        trainer.step()
        runs.append(torch.cat([t.flatten() for t in adapters(trainer).values()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_training_raises_the_reward():
    trainer = tiny_trainer(steps=25, kl_coef=0.0, lr=2e-2, prompts_per_step=4, group_size=8)
    rewards = [trainer.step()["reward"] for _ in range(25)]
    # Half of the tokens are odd at first; 160 tokens a step put the noise of five steps' mean near 0.02.
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.15


def test_a_reward_that_raises_names_itself_and_the_completion():
    def fragile(completion, example):
        return 1 / 0

    trainer = tiny_trainer(fragile)
    with pytest.raises(
        RewardError, match=r"reward function fragile raised ZeroDivisionError.* on completion ['\"]"
    ):
        trainer.step()
    assert trainer.step_count == 0


def test_a_reward_of_nan_names_itself_and_the_completion():
    def broken(completion, example):
        return math.nan

    with pytest.raises(RewardError, match=r"reward function broken returned nan on completion ['\"]"):
        tiny_trainer([odd, broken]).step()


def test_a_sequence_longer_than_the_budget_is_an_error():
    with pytest.raises(ValueError, match="more than the budget of 20"):
        tiny_trainer(token_budget=20).step()


def test_vram_limit_needs_a_gpu():
    from nanogrpo.grpo.config import GRPOConfig
    from nanogrpo.grpo.trainer import load_policy

    with pytest.raises(ValueError, match="vram_limit needs a CUDA device"):
        load_policy(GRPOConfig(vram_limit=1.0, device="cpu"))
