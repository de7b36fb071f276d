"""GRPOTrainer: micro-batches add up, rows without signal teach nothing, bad rewards are named."""

import math

import pytest
import torch
from nanogrpo.grpo import (
    group_advantages,
    group_has_signal,
    multi_reward_advantages,
    policy_loss,
    preset,
)
from nanogrpo.grpo.algorithms import ALGORITHMS
from nanogrpo.grpo.memory import micro_batch, pool_bytes
from nanogrpo.grpo.objectives import best_and_worst, value_loss
from nanogrpo.grpo.rewards import RewardError
from nanogrpo.rollout.layer_steps import LayerSteps
from tiny_run import FIELDS, adapters, odd, tiny_trainer, wake

ADDED = {"ppo": {"value_error"}, "online_dpo": {"pairs"}}
# Estimators that compare the completions of one prompt alone: without a difference inside a group, nothing.
GROUPED = [n for n, a in ALGORITHMS.items() if a.loss.estimator in ("grpo", "dr_grpo", "rloo")]


def low(completion, example):
    """Another reward that varies: the share of tokens below 48."""
    return sum(token < 48 for token in completion.token_ids) / len(completion.token_ids)


def constant(completion, example):
    return 0.95


def flat_gradient(trainer):
    return torch.cat([p.grad.flatten() for p in trainer.named_parameters().values()])


def gradients(token_budget, **overrides):
    """(gradient of one update before clipping, metrics, number of micro-batches) with all else equal."""
    trainer = tiny_trainer(token_budget=token_budget, max_grad_norm=1e9, share_prefix=False, **overrides)
    wake(trainer)
    batch, _ = trainer.collect(1)
    trained, _ = trainer.objective.prepare(batch)
    losses = []
    original = trainer.objective.micro_loss

    def counted(*args, **kwargs):
        out = original(*args, **kwargs)
        losses.append(out.loss.item())
        return out

    trainer.objective.micro_loss = counted
    metrics = trainer._update(trained, 1)
    assert metrics["loss"] == pytest.approx(sum(losses))
    return flat_gradient(trainer), metrics, len(losses)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "bnpo"])
def test_micro_batches_sum_to_the_whole_batch(algorithm, kl_coef):
    whole, metrics, one = gradients(10**6, algorithm=algorithm, kl_coef=kl_coef)
    split, split_metrics, many = gradients(210, algorithm=algorithm, kl_coef=kl_coef)
    assert one == 1 and many >= (2 if algorithm == "online_dpo" else 3)
    assert whole.norm() > 0
    # Float32 sums of a few hundred terms in another order: 1e-5 of the largest entry is some 100 roundings.
    assert (whole - split).abs().max() <= 1e-5 * whole.abs().max()
    for name in ("loss", "grad_norm", "sampler_logprob_diff_max", *(["kl"] if "kl" in metrics else [])):
        assert split_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_bnpo_is_the_mean_of_micro_batch_losses(kl_coef):
    """Each micro-batch is divided by its own tokens, and the M results are averaged."""
    settings = {"algorithm": "bnpo", "kl_coef": kl_coef}
    got, _, count = gradients(210, **settings)
    trainer = tiny_trainer(token_budget=210, share_prefix=False, **settings)
    wake(trainer)
    batch, _ = trainer.collect(1)
    batch, _ = trainer.objective.prepare(batch)
    rows = [[0, 1], [2, 3], [4, 5], [6, 7]]
    lengths = [len(s) for s in batch.sequences()]
    assert all(a + b <= 210 < a + b + c for a, b, c in zip(lengths, lengths[1:], lengths[2:], strict=False))
    assert count == len(rows)
    for run in rows:
        out = trainer.objective.micro_loss(batch.select(run), on_policy=True, micro_batches=1)
        (out.loss / len(rows)).backward()
    expected = flat_gradient(trainer)
    assert expected.norm() > 0
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("share_prefix", [False, True])
def test_shared_prefixes_change_nothing(share_prefix):
    trainer = tiny_trainer(share_prefix=share_prefix, kl_coef=0.3)
    wake(trainer)
    trained, _ = trainer.objective.prepare(trainer.collect(1)[0])
    trainer._update(trained, 1)
    got = flat_gradient(trainer)
    whole, _, _ = gradients(10**6, kl_coef=0.3)
    whole = whole * (1.0 / whole.norm()).clamp(max=1)  # tiny_trainer() clips at 1
    assert (whole - got).abs().max() <= 2e-5 * whole.abs().max()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_step_trains_and_reports(algorithm):
    trainer = tiny_trainer(algorithm=algorithm)
    before = adapters(trainer)
    metrics = trainer.step()
    assert set(metrics) == FIELDS | ADDED.get(algorithm, set())
    assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in metrics.values())
    assert metrics["step"] == trainer.step_count == 1
    assert metrics["sampler_logprob_diff_max"] <= 1e-5
    assert metrics["sampler_logprob_diff_mean"] <= metrics["sampler_logprob_diff_max"]
    assert metrics["completion_tokens"] == 8 * metrics["completion_length"]
    assert metrics["trained_tokens"] == metrics["completion_tokens"] or algorithm == "online_dpo"
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
    batch, seen = trainer.collect(1)
    batch.sampler_logprobs[batch.completion_mask.nonzero()[0]] -= 0.5
    trainer.collect = lambda step: (batch, seen)
    metrics = trainer.step()
    assert metrics["sampler_logprob_diff_max"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["sampler_logprob_diff_mean"] == pytest.approx(0.5 / metrics["trained_tokens"], abs=1e-5)


@pytest.mark.parametrize("algorithm", [*GROUPED, "online_dpo"])
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
    trained, _ = trainer.objective.prepare(batch)
    assert set(trained.group_ids.tolist()) == {1}
    out = trainer.objective.micro_loss(batch, on_policy=True, micro_batches=1)
    expected = torch.autograd.grad(out.loss, list(trainer.named_parameters().values()))
    expected = torch.cat([g.flatten() for g in expected])
    trainer._update(trained, 1)
    got = flat_gradient(trainer)
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
    counts = {int(state["step"]) for state in trainer.optimizer.state.values()}
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
    batch, _ = trainer.objective.prepare(batch)
    old, mask = batch.padded(trainer.objective.score(batch).detach()), batch.padded_mask()
    batch.sampler_logprobs -= 0.3 * batch.completion_mask  # another program's rounding: not what has moved
    trainer._run_micro_batches(batch, True)
    wake(trainer, seed=2)
    out = trainer.objective.micro_loss(batch, on_policy=False, micro_batches=1)
    logprobs = batch.padded(trainer.objective.score(batch).detach())
    assert (logprobs - old)[mask].abs().max() > 0.01
    expected = policy_loss(logprobs, old, batch.advantages, mask, trainer.objective.loss_config)
    torch.testing.assert_close(out.loss.detach(), expected.loss)
    assert expected.loss != policy_loss(logprobs, logprobs, batch.advantages, mask, preset("grpo")).loss


def test_two_iterations_ask_for_the_off_policy_ratio_once():
    trainer, asked = tiny_trainer(num_iterations=2), []
    original = trainer.objective.micro_loss

    def recorded(*args, on_policy, micro_batches):
        asked.append(on_policy)
        return original(*args, on_policy=on_policy, micro_batches=micro_batches)

    trainer.objective.micro_loss = recorded
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


def test_dynamic_sampling_replaces_groups_without_signal():
    """Three of the first four questions have no signal, so another round is needed; the batch is full again."""
    trainer = tiny_trainer(dynamic_sampling=4, kl_coef=0.0, prompts_per_step=4)
    mute = trainer.task.draw(trainer.train_sets, 4, "0/1")[:3]
    trainer.rewards[0] = type(trainer.rewards[0])(lambda c, e: 0.5 if e in mute else odd(c, e), 1.0)
    batch, seen = trainer.collect(1)
    assert len(batch) == 16 and len(set(batch.group_ids.tolist())) == 4
    assert group_has_signal(batch.rewards, batch.group_ids).all()
    assert seen["completion_tokens"] > int(batch.completion_mask.sum())
    assert seen["signal_share"] < 1
    # The first round is the one that a run without refilling would have had.
    plain, _ = tiny_trainer(kl_coef=0.0, prompts_per_step=4).collect(1)
    assert plain.sequences()[12:] == batch.sequences()[:4]


def test_dynamic_sampling_gives_up_after_its_rounds():
    trainer, drawn = tiny_trainer(constant, dynamic_sampling=3, kl_coef=0.0), []
    original = trainer._rollout
    trainer._rollout = lambda step, number: drawn.append(number) or original(step, number)
    metrics = trainer.step()
    assert drawn == [0, 1, 2] and metrics["signal_share"] == metrics["grad_norm"] == 0


@pytest.mark.parametrize("mode", ["keep", "mask", "drop"])
def test_truncated_completions(mode):
    """keep: learned from; mask: only in the baseline; drop: in neither."""
    trainer = tiny_trainer(truncated=mode, kl_coef=0.0, max_completion_length=4, group_size=16)
    wake(trainer)
    batch, _ = trainer.collect(1)
    batch.truncated = torch.arange(len(batch)) % 4 == 0
    rewards = batch.rewards.clone()
    trained, _ = trainer.objective.prepare(batch)
    assert bool(trained.truncated.any()) == (mode == "keep")
    kept = torch.ones(len(batch), dtype=torch.bool) if mode != "drop" else ~batch.truncated
    for group in (0, 1):
        rows = (batch.group_ids == group) & kept
        expected = (rewards[rows] - rewards[rows].mean()) / (rewards[rows].std() + 1e-4)
        torch.testing.assert_close(batch.advantages[rows], expected)


def test_an_overlong_punishment_joins_the_rewards():
    trainer = tiny_trainer(constant, overlong_buffer=2, max_completion_length=5)
    batch, _ = trainer.collect(1)
    expected = 0.95 - (batch.completion_lengths() - 3).clamp(min=0) / 2
    torch.testing.assert_close(batch.rewards, expected.float())
    assert batch.reward_terms.shape == (8, 2) and batch.reward_weights.tolist() == [1, 1]


def test_a_kl_penalty_in_the_reward_moves_the_advantages():
    trainer = tiny_trainer(kl_coef=0.5, kl_place="reward")
    wake(trainer)
    batch, _ = trainer.collect(1)
    _, metrics = trainer.objective.prepare(batch)
    k1 = batch.sampler_logprobs - trainer.objective.reference(batch)
    penalised = batch.rewards - 0.5 * batch.padded(k1).sum(1)
    torch.testing.assert_close(batch.advantages, group_advantages(penalised, batch.group_ids))
    assert metrics["kl"] > 0 and trainer.objective.loss_config.kl_place == "reward"
    assert trainer.step()["kl"] > 0


@pytest.mark.parametrize("settings", [{"algorithm": "ppo"}, {"kl_place": "reward", "kl_coef": 0.5}], ids=str)
def test_scoring_before_the_update_keeps_to_the_token_budget(settings):
    seen, prepared = [], []
    for budget in (10**6, 210):
        trainer = tiny_trainer(token_budget=budget, share_prefix=False, **settings)
        wake(trainer)
        original = trainer.policy.score
        trainer.policy.score = lambda ids, *args, score=original, **kw: (
            seen.append(len(ids)) or score(ids, *args, **kw)
        )
        batch, _ = trainer.collect(1)
        prepared.append(trainer.objective.prepare(batch)[0])
    assert max(seen) > 210 and all(tokens <= 210 for tokens in seen[-4:])
    assert seen.count(max(seen)) <= 2  # the wide trainer's: values, and for the KL the reference
    torch.testing.assert_close(prepared[0].advantages, prepared[1].advantages, rtol=1e-4, atol=1e-5)
    for name, values in prepared[0].per_token.items():
        torch.testing.assert_close(values, prepared[1].per_token[name], rtol=1e-4, atol=1e-5)


def test_ppo_learns_the_value_of_a_constant_reward():
    """Every completion earns 0.95, so the value of every state tends to 0.95 and the advantages to nothing."""
    settings = {"algorithm": "ppo", "kl_coef": 0.0, "gae_lambda": 1.0, "value_coef": 1.0, "lr": 3e-3}
    trainer = tiny_trainer(constant, steps=60, **settings)
    errors = [trainer.step()["value_error"] for _ in range(60)]
    assert errors[0] == pytest.approx(0.95**2)
    assert errors[-1] < 0.1 * errors[0]


def ppo_by_hand(trainer, batch):
    """The loss and what it is made of, one sequence and one token at a time."""
    c, objective = trainer.config, trainer.objective
    flat, hidden = objective.score(batch, return_hidden_states=True)
    reference = objective.reference(batch)
    weight = objective.value_weight
    rows, start, seen = [], 0, 0
    for length, reward in zip(batch.completion_lengths().tolist(), batch.rewards.tolist(), strict=True):
        end = int(batch.cu_seqlens[len(rows) + 1])
        span = slice(end - length, end)
        values = hidden[seen : seen + length] @ weight[:-1] + weight[-1]
        old = values.detach()
        rewards = [-c.kl_coef * d for d in (flat[span] - reference[span]).detach().tolist()]
        rewards[-1] += reward
        advantages, following, later = [0.0] * length, 0.0, 0.0
        for t in reversed(range(length)):
            delta = rewards[t] + c.gamma * following - old[t].item()
            advantages[t] = later = delta + c.gamma * c.gae_lambda * later
            following = old[t].item()
        rows.append((flat[span], values, old, torch.tensor(advantages)))
        seen += length
    advantages = torch.cat([row[3] for row in rows])
    whitened = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
    policy, value, start = 0.0, 0.0, 0
    for logprobs, values, old, advantage in rows:
        part = whitened[start : start + len(advantage)]
        policy -= ((logprobs - logprobs.detach()).exp() * part).sum()
        returns, clipped = advantage + old, old + (values - old).clamp(-c.value_clip, c.value_clip)
        value += torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum() / 2
        start += len(advantage)
    return (policy + c.value_coef * value) / start


def test_ppo_is_its_formula():
    settings = {"gamma": 0.9, "gae_lambda": 0.8, "value_coef": 0.5, "kl_coef": 0.3, "value_clip": 0.05}
    trainer = tiny_trainer(algorithm="ppo", share_prefix=False, **settings)
    wake(trainer)
    torch.nn.init.normal_(trainer.objective.value_weight, std=0.1)
    batch, _ = trainer.collect(1)
    trained, metrics = trainer.objective.prepare(batch)
    parameters = list(trainer.named_parameters().values())
    loss = trainer.objective.micro_loss(trained, on_policy=True, micro_batches=1).loss
    expected = ppo_by_hand(trainer, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(loss, parameters)
    for one, other in zip(got, torch.autograd.grad(expected, parameters), strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max() + 1e-7
    assert metrics["kl"] > 0


def test_ppo_clips_values_that_have_moved():
    losses = {}
    for clip in (0.05, 10.0):
        trainer = tiny_trainer(algorithm="ppo", value_clip=clip, value_coef=1.0)
        wake(trainer)
        trained, _ = trainer.objective.prepare(trainer.collect(1)[0])
        trained.per_token["old_values"] += 0.5 * trained.completion_mask
        losses[clip] = trainer.objective.micro_loss(trained, on_policy=True, micro_batches=1).loss.item()
    assert losses[0.05] > losses[10.0] + 0.01


@pytest.mark.parametrize("mode", ["mask", "drop"])
def test_ppo_without_truncated_completions(mode):
    """They are in no sum: neither the whitening's nor the denominators'."""
    trainer = tiny_trainer(algorithm="ppo", truncated=mode, kl_coef=0.0)
    wake(trainer)
    batch, _ = trainer.collect(1)
    batch.truncated = torch.arange(len(batch)) % 4 == 0
    trained, _ = trainer.objective.prepare(batch)
    kept = batch.select((~batch.truncated).nonzero().squeeze(1).tolist())
    other = tiny_trainer(algorithm="ppo", kl_coef=0.0)
    wake(other)
    kept.truncated[:] = False
    expected, _ = other.objective.prepare(kept)
    for name, values in expected.per_token.items():
        torch.testing.assert_close(trained.per_token[name], values)
    losses = [
        t.objective.micro_loss(rows, on_policy=True, micro_batches=1).loss
        for t, rows in ((trainer, trained), (other, expected))
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("algorithm, counted", [("grpo", "rows"), ("dapo", "tokens")])
def test_truncated_completions_leave_the_tokens_of_the_denominator(algorithm, counted):
    trainer = tiny_trainer(algorithm=algorithm, truncated="mask", kl_coef=0.0)
    batch, _ = trainer.collect(1)
    batch.truncated = torch.arange(len(batch)) % 4 == 0
    trainer.objective.prepare(batch)
    tokens = batch.completion_lengths()[~batch.truncated].sum()
    assert trainer.objective.denominator == (len(batch) if counted == "rows" else tokens)


def test_gdpo_weighs_its_rewards_and_takes_the_penalty():
    trainer = tiny_trainer([odd, low], estimator="gdpo", kl_place="reward", kl_coef=0.3)
    wake(trainer)
    trainer.rewards[1] = type(trainer.rewards[1])(low, -3.0)
    batch, _ = trainer.collect(1)
    trainer.objective.prepare(batch)
    k1 = batch.padded(trainer.objective.score(batch).detach() - trainer.objective.reference(batch)).sum(1)
    terms = torch.cat([batch.reward_terms, -0.3 * k1[:, None]], 1)
    expected = multi_reward_advantages(terms, batch.group_ids, [1.0, -3.0, 1.0])
    torch.testing.assert_close(batch.advantages, expected)


def test_equal_totals_of_different_rewards_are_signal_for_gdpo():
    def even(completion, example):
        return 1 - odd(completion, example)

    for estimator, signal in (("grpo", 0.0), ("gdpo", 1.0)):
        trainer = tiny_trainer([odd, even], estimator=estimator, dynamic_sampling=2)
        assert trainer.collect(1)[1]["signal_share"] == signal


def test_dropped_completions_are_no_signal():
    def was_cut(completion, example):
        return float(completion.finish_reason == "length")

    for mode, drawn in (("keep", 1), ("drop", 3)):
        trainer, rounds = tiny_trainer(was_cut, truncated=mode, dynamic_sampling=3), []
        original = trainer._rollout

        def mixed(step, number, rounds=rounds, original=original):
            batch = original(step, number)
            batch.truncated = torch.arange(len(batch)) % 2 == 0
            batch.rewards = batch.truncated.float()
            rounds.append(batch)
            return batch

        trainer._rollout = mixed
        trainer.collect(1)
        assert len(rounds) == drawn


def test_rounds_draw_other_questions_and_other_samples():
    trainer = tiny_trainer()
    first, second = trainer._rollout(1, 0), trainer._rollout(1, 1)
    assert first.sequences() != second.sequences()
    prompts = lambda batch: [
        s[:-n] for s, n in zip(batch.sequences(), batch.completion_lengths(), strict=True)
    ]
    assert prompts(first) != prompts(second)
    trainer.train_sets = trainer.train_sets[:1]  # one question: now only the sampling can differ
    first, second = trainer._rollout(1, 0), trainer._rollout(1, 1)
    assert {tuple(p) for p in prompts(first)} == {tuple(p) for p in prompts(second)}
    completions = lambda batch: sorted(tuple(s) for s in batch.sequences())
    assert completions(first) != completions(second)


def test_a_sampler_correction_weighs_by_trainer_over_sampler():
    trainer = tiny_trainer(sampler_correction="token-mask", kl_coef=0.0)
    wake(trainer)
    trained, _ = trainer.objective.prepare(trainer.collect(1)[0])
    trained.sampler_logprobs -= 2 * trained.completion_mask  # ratios of 7.4, past the bound of 3
    for on_policy in (True, False):
        metrics = trainer._run_micro_batches(trained, on_policy)
        assert metrics["loss"] == 0 and flat_gradient(trainer).abs().max() == 0


def test_noise_of_the_sampler_is_no_penalty():
    """With fresh adapters the KL is 0, whatever log-probs the sampler's rounding reported."""
    trainer = tiny_trainer(constant, kl_place="reward", kl_coef=0.1)
    batch, _ = trainer.collect(1)
    batch.sampler_logprobs += 1e-2 * torch.randn(batch.input_ids.shape) * batch.completion_mask
    trainer.objective.prepare(batch)
    assert not batch.advantages.any()


def test_online_dpo_leaves_truncated_completions_out():
    trainer = tiny_trainer(algorithm="online_dpo", truncated="drop")
    batch, _ = trainer.collect(1)
    batch.truncated = torch.arange(len(batch)) % 4 < 2
    trained, metrics = trainer.objective.prepare(batch)
    assert metrics["pairs"] <= 2 and not trained.truncated.any()
    batch.truncated[:] = True
    assert trainer.objective.prepare(batch)[1]["pairs"] == 0


def test_what_a_reward_does_to_a_completion_stays_with_it():
    def meddling(completion, example):
        completion.token_ids.sort()
        completion.logprobs.append(0.0)
        return odd(completion, example)

    plain, _ = tiny_trainer().collect(1)
    batch, _ = tiny_trainer(meddling).collect(1)
    assert batch.sequences() == plain.sequences()


def test_running_out_of_memory_while_scoring_halves_the_budget_too():
    trainer = tiny_trainer(algorithm="ppo", token_budget=420, share_prefix=False)
    original = trainer.policy.score

    def little_memory(input_ids, *args, **options):
        if input_ids.numel() > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(input_ids, *args, **options)

    trainer.policy.score = little_memory
    assert trainer.step()["token_budget"] == 210  # two sequences of 73 tokens


def test_a_skipped_second_iteration_is_no_skipped_step():
    trainer = tiny_trainer(num_iterations=2)
    wake(trainer)
    original, before = trainer.objective.micro_loss, adapters(trainer)

    def broken_later(*args, on_policy, micro_batches):
        out = original(*args, on_policy=on_policy, micro_batches=micro_batches)
        out.loss = out.loss * (1 if on_policy else math.nan)
        return out

    trainer.objective.micro_loss = broken_later
    assert trainer.step()["skipped"] == 0
    assert any(
        not torch.equal(a, b) for a, b in zip(before.values(), adapters(trainer).values(), strict=True)
    )


def test_value_loss_takes_the_worse_of_clipped_and_not():
    values = torch.tensor([[0.0, 1.0, 5.0]], requires_grad=True)
    old, returns = torch.tensor([[0.0, 0.0, 5.0]]), torch.tensor([[1.0, 2.0, math.nan]])
    mask = torch.tensor([[True, True, False]])
    loss = value_loss(values, old, returns, mask, clip=0.2)
    assert loss.item() == pytest.approx((1.0 + 1.8**2) / 2)
    loss.backward()
    # The second value has left the clip towards its return: the clipped term is the worse one and has no gradient.
    assert values.grad.tolist() == [[-1.0, 0.0, 0.0]]


def test_online_dpo_is_its_formula():
    trainer = tiny_trainer(algorithm="online_dpo", dpo_beta=0.3)
    wake(trainer)
    batch, _ = trainer.collect(1)
    trained, metrics = trainer.objective.prepare(batch)
    assert metrics["pairs"] == 2 and len(trained) == 4
    best, worst = trained.rewards.view(2, 2).unbind(1)
    groups = batch.rewards.view(2, 4)
    assert torch.equal(best, groups.amax(1)) and torch.equal(worst, groups.amin(1))
    out = trainer.objective.micro_loss(trained, on_policy=True, micro_batches=1)
    drift = trainer.objective.score(trained) - trainer.objective.reference(trained)
    sums = trained.padded(drift).sum(1).view(2, 2)
    expected = torch.nn.functional.softplus(-0.3 * (sums[:, 0] - sums[:, 1])).mean()
    torch.testing.assert_close(out.loss, expected)


def test_pairs_of_interleaved_groups():
    rewards = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0, 5.0, 5.0])
    group_ids = torch.tensor([7, 4, 7, 4, 7, 9, 9])
    assert best_and_worst(rewards, group_ids) == [(2, 4)]


@pytest.mark.parametrize("algorithm", ["rloo", "ppo", "online_dpo", "gspo", "cispo", "reinforce_pp"])
def test_other_algorithms_raise_the_reward(algorithm):
    lr = 5e-2 if algorithm == "online_dpo" else 2e-2
    trainer = tiny_trainer(
        algorithm=algorithm, steps=25, kl_coef=0.0, lr=lr, prompts_per_step=4, group_size=8
    )
    rewards = [trainer.step()["reward"] for _ in range(25)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.1  # noise of these means: 0.02 to 0.03


def test_a_step_that_is_not_finite_changes_nothing():
    trainer = tiny_trainer()
    wake(trainer)
    trainer.step()
    original, before = trainer.objective.micro_loss, adapters(trainer)
    moments = {p: s["exp_avg"].clone() for p, s in trainer.optimizer.state.items()}

    def broken(*args, **kwargs):
        out = original(*args, **kwargs)
        out.loss = out.loss * math.inf
        return out

    trainer.objective.micro_loss = broken
    metrics = trainer.step()
    assert metrics["skipped"] == 1 and trainer.step_count == 2
    assert all(torch.equal(a, b) for a, b in zip(before.values(), adapters(trainer).values(), strict=True))
    assert all(torch.equal(trainer.optimizer.state[p]["exp_avg"], m) for p, m in moments.items())
    trainer.objective.micro_loss = original
    assert trainer.step()["skipped"] == 0


def test_out_of_memory_halves_the_token_budget_and_changes_nothing():
    """The third micro-batch does not fit at first: the update is that of a run that had the smaller budget."""
    trainer, plain = (tiny_trainer(token_budget=n, share_prefix=False) for n in (420, 210))
    calls, original = 0, trainer.objective.micro_loss

    def memory_for_two_rows(micro, **kwargs):
        nonlocal calls
        calls += 1
        if micro.input_ids.numel() > 210:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(micro, **kwargs)

    trainer.objective.micro_loss = memory_for_two_rows
    metrics, expected = trainer.step(), plain.step()
    assert calls > 4 and metrics["token_budget"] == trainer.token_budget == 210
    pairs = zip(adapters(trainer).values(), adapters(plain).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert metrics["loss"] == expected["loss"]


def test_out_of_memory_gives_back_what_larger_micro_batches_worked_in():
    trainer, cleared = tiny_trainer(token_budget=420, share_prefix=False), []
    trainer.policy.steps = LayerSteps(trainer.policy, graphs=False)
    trainer.policy.steps.clear = lambda: cleared.append(trainer.token_budget)
    trainer.policy.graph_pool.give_back = lambda: cleared.append("what was reserved")
    original = trainer.objective.micro_loss

    def memory_for_two_rows(micro, **kwargs):
        if micro.input_ids.numel() > 210:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(micro, **kwargs)

    trainer.objective.micro_loss = memory_for_two_rows
    assert trainer.step()["token_budget"] == 210 and cleared == [210, "what was reserved"]


def test_out_of_memory_on_one_sequence_is_raised():
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = tiny_trainer()
    trainer.objective.micro_loss = no_memory
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step()
    assert trainer.step_count == 0


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


def test_a_budget_below_the_longest_sequence_trains_one_at_a_time():
    alone, generous = (tiny_trainer(token_budget=n, share_prefix=False) for n in (20, 10**6))
    sizes, original = [], alone.objective.micro_loss
    alone.objective.micro_loss = lambda micro, **how: sizes.append(len(micro)) or original(micro, **how)
    metrics, expected = alone.step(), generous.step()
    assert set(sizes) == {1} and metrics["token_budget"] == 20
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_vram_limit_needs_a_gpu():
    from nanogrpo.grpo.config import GRPOConfig
    from nanogrpo.grpo.trainer import load_policy

    with pytest.raises(ValueError, match="vram_limit needs a CUDA device"):
        load_policy(GRPOConfig(vram_limit=1.0, device="cpu"))


def test_a_limit_that_is_too_small_is_refused_before_a_weight_is_read(monkeypatch):
    from nanogrpo.grpo.config import GRPOConfig
    from nanogrpo.grpo.trainer import load_policy

    def loads(*args, **options):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("nanogrpo.grpo.trainer.limit_vram", lambda config: None)  # the card's own part
    monkeypatch.setattr("nanogrpo.grpo.trainer.random_policy", loads)
    monkeypatch.setattr("nanogrpo.grpo.trainer.Policy.load", loads)
    small = {"random_weights": "llama-3.1-8b", "vram_limit": 5.5, "quantize": "nf4"}
    with pytest.raises(
        ValueError, match=r"vram_limit of 5.5 GiB is too small: .* needs about .*weights .*combine --"
    ):
        load_policy(GRPOConfig(**small))
    with pytest.raises(ValueError, match="too small"):
        load_policy(GRPOConfig(vram_limit=0.7))
    with pytest.raises(AssertionError, match="a weight was read"):
        load_policy(GRPOConfig(**small | {"vram_limit": 80.0}))


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3])
def test_gradients_are_clipped_to_the_bit_and_else_left_alone(max_grad_norm):
    trainer = tiny_trainer(max_grad_norm=max_grad_norm)
    wake(trainer)
    batch, _ = trainer.collect(1)
    trainer._run_micro_batches(trainer.objective.prepare(batch)[0], True)
    parameters = list(trainer.named_parameters().values())
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = parameter.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    expected = [parameter.grad for parameter in parameters]
    versions = [grad._version for grad in before]
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad
    assert trainer._clip_gradients(parameters) == norm.item() and 1e-3 < norm < 1e3
    assert all(map(torch.equal, before, expected))
    assert ([grad._version for grad in before] == versions) == (norm < max_grad_norm)


def test_what_training_has_freed_goes_back_before_the_rollout(monkeypatch):
    trainer, seen = tiny_trainer(), []
    generate = trainer.sampler.generate
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("empty"))
    trainer.sampler.generate = lambda *args, **kwargs: seen.append("rollout") or generate(*args, **kwargs)
    trainer.step(), trainer.step()
    assert seen == ["empty", "rollout"] * 2


def test_graphs_reserve_their_memory_before_a_rollout(monkeypatch):
    trainer, seen = tiny_trainer(token_budget=300), []

    class Steps:
        def reserve(self, tokens, size):
            seen.append((tokens, size))
            if len(seen) == 3:
                raise torch.OutOfMemoryError("no room: then piece by piece")

    monkeypatch.setattr(trainer.policy, "steps", Steps())
    trainer._make_room([[1] * 20] * 2)
    assert not seen, "without checkpoints no layer has graphs for training"
    trainer.policy.model.checkpoint_layers = True
    longest, _ = micro_batch(2, 20, trainer.config)
    trainer._make_room([[1] * 5, [1] * 20])
    trainer._make_room([[1] * 90])
    trainer._make_room([[1] * 90])
    size = pool_bytes(
        trainer.policy.config, 4, 128 * -(-longest // 128), quantize=None, r=trainer.config.lora_r
    )
    assert seen == [(longest, size)] * 3, "of the first step's prompts: graphs that are there stay"
    trainer.objective.token_budget = 25  # after running out of memory
    trainer._make_room([[1] * 20] * 2)
    assert seen[3][0] == 25 < longest and seen[3][1] <= size


def test_gradients_make_room_for_the_rollout():
    trainer = tiny_trainer()
    trainer.step()
    seen, original = [], trainer.sampler.generate

    def generate(*args, **options):
        seen.extend(parameter.grad for parameter in trainer.named_parameters().values())
        return original(*args, **options)

    trainer.sampler.generate = generate
    trainer.step()
    assert seen and all(gradient is None for gradient in seen)


def test_layers_are_checkpointed_as_asked():
    from nanogrpo.grpo.config import GRPOConfig
    from nanogrpo.grpo.trainer import load_policy

    for asked, got in ((None, False), (True, True), (False, False)):
        config = GRPOConfig(random_weights="tiny-llama", checkpoint_layers=asked, device="cpu")
        assert load_policy(config).model.checkpoint_layers is got
