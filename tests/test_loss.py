"""The policy loss: golden values, formulas written out, micro-batches, masks, gradients, which KL is descended."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.grpo.loss import (
    AGGREGATES,
    PRESETS,
    LossConfig,
    aggregate,
    kl_penalty,
    loss_denominator,
    policy_loss,
    preset,
)

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
LOSSES = [name for name in GOLDEN if "/beta=" in name]
every_preset = pytest.mark.parametrize("name", PRESETS)


def golden_batch():
    """The closed-form case of golden.json: four rows of 6, 4, 2 and 5 tokens, float64, no random numbers."""
    i = torch.arange(24, dtype=torch.float64).view(4, 6)
    new = -0.5 - 0.35 * torch.sin(1.7 * i) - 0.1 * (i % 5)
    rewards = torch.tensor([1, 0, 0.5, 2], dtype=torch.float64)
    return {
        "logprobs": new.clone().requires_grad_(),
        "old_logprobs": new - 0.45 * torch.cos(0.9 * i + 0.3),
        "advantages": (rewards - rewards.mean()) / (rewards.std() + 1e-4),
        "mask": torch.arange(6) < torch.tensor([6, 4, 2, 5])[:, None],
        "ref_logprobs": new + 0.30 * torch.sin(2.3 * i + 1),
    }


@st.composite
def batches(draw, min_rows=1):
    """Random float64 log-probs up to 1 apart (both clips active), any mask, rows without a token included."""
    rows, width, seed = draw(st.integers(min_rows, 6)), draw(st.integers(1, 7)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)
    new = -3 * uniform(rows, width)
    advantages = 4 * uniform(rows, width) - 2 if draw(st.booleans()) else 4 * uniform(rows) - 2
    return {
        "logprobs": new.clone().requires_grad_(),
        "old_logprobs": new + 2 * uniform(rows, width) - 1,
        "advantages": advantages,
        "mask": uniform(rows, width) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])),
        "ref_logprobs": new + 2 * uniform(rows, width) - 1,
        "sampler_logprobs": new + uniform(rows, width),
        "entropy": uniform(rows, width),
    }


@st.composite
def configs(draw):
    choose = lambda **options: {field: draw(st.sampled_from(values)) for field, values in options.items()}
    return preset(
        draw(st.sampled_from(list(PRESETS))),
        max_completion_length=8,
        **choose(
            ratio_level=["token", "sequence"],
            clip_high=[0.2, 0.28],
            dual_clip=[None, 1.5],
            kl_coef=[0.0, 0.04],
            kl_estimator=["k1", "k2", "k3"],
            kl_gradient=["corrected", "plain"],
        ),
    )


def loss_and_gradient(batch, config, **extra):
    batch = {**batch, "logprobs": batch["logprobs"].detach().clone().requires_grad_()}
    output = policy_loss(**batch, config=config, **extra)
    output.loss.backward()
    return output.loss.detach(), batch["logprobs"].grad


def rows_of(batch, rows):
    return {name: tensor[rows] for name, tensor in batch.items()}


def close(got, expected, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


@pytest.mark.parametrize("key", LOSSES)
def test_golden(key):
    """Value and gradient norm as TRL and Liger compute them, in float64."""
    name, level, beta = key.split("/")
    config = preset(
        name,
        ratio_level=level,
        clip_high=0.28,
        kl_coef=float(beta.removeprefix("beta=")),
        max_completion_length=8,
    )
    loss, gradient = loss_and_gradient(golden_batch(), config)
    for oracle, (value, norm) in GOLDEN[key].items():
        assert loss.item() == pytest.approx(value, abs=1e-9), oracle
        assert gradient.norm().item() == pytest.approx(norm, abs=1e-9), oracle


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_golden_kl(estimator):
    batch = golden_batch()
    kl = kl_penalty(batch["logprobs"], batch["ref_logprobs"], estimator)[batch["mask"]].mean()
    (gradient,) = torch.autograd.grad(kl, batch["logprobs"])
    value, norm = GOLDEN[f"kl/{estimator}"]
    assert kl.item() == pytest.approx(value, abs=1e-12)  # printed with twelve and nine digits
    assert gradient.norm().item() == pytest.approx(norm, abs=1e-9)


def test_golden_split_tells_bnpo_from_dapo():
    """bnpo averages the micro-batches' own token means, so splitting changes it; dapo's sum stays what it was."""
    batch, halves = golden_batch(), (slice(0, 2), slice(2, 4))
    totals = {}
    for name in ("dapo", "bnpo"):
        config = preset(name, clip_high=0.28)
        whole = loss_denominator(batch["mask"], config)
        local = lambda rows, config=config: len(halves) * loss_denominator(batch["mask"][rows], config)
        denominator = local if config.denominator_scope == "micro-batch" else lambda rows, whole=whole: whole
        totals[name] = sum(
            loss_and_gradient(rows_of(batch, rows), config, denominator=denominator(rows))[0].item()
            for rows in halves
        )
    assert totals["dapo"] == pytest.approx(GOLDEN["dapo/token/beta=0.0"]["trl"][0], abs=1e-12)
    assert totals["bnpo"] == pytest.approx(GOLDEN["bnpo/split 2+2"], abs=1e-6)  # printed with six digits


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_first_on_policy_step(name):
    """At rho = 1 the loss is a weighted mean of advantages, 0 or not by the weights; its gradient is not 0."""
    batch = golden_batch()
    batch["old_logprobs"] = batch["logprobs"].detach()
    config = preset(name, max_completion_length=8)
    loss, gradient = loss_and_gradient(batch, config)
    value, norm = GOLDEN[f"first-step/{name}"]
    assert loss.item() == pytest.approx(value, abs=1e-15 if value == 0 else 5e-4)  # printed with three digits
    assert norm is None or gradient.norm().item() == pytest.approx(norm, abs=5e-3)

    mask = batch["mask"].double()
    weight = {
        "grpo": mask / mask.sum(1, keepdim=True) / 4,
        "dapo": mask / mask.sum(),
        "dr_grpo": mask / (4 * 8),
    }[name]
    close(gradient, -batch["advantages"][:, None] * weight)
    output = policy_loss(**batch, config=config)
    assert torch.equal(output.ratio, mask)
    assert not (output.clipped_low | output.clipped_high).any()
    assert output.metrics["new_old_max"] == 0 and output.metrics["ratio_max"] == 1


def plain_formula(batch, config):
    """Every preset's objective with Python floats, one token at a time, as its paper writes it."""
    rows = []
    for i, selected in enumerate(batch["mask"].tolist()):
        tokens = [t for t, keep in enumerate(selected) if keep]
        at = lambda name, t, i=i: batch[name][i, t].item()
        moves = [at("logprobs", t) - at("old_logprobs", t) for t in tokens]
        terms = []
        for t, move in zip(tokens, moves, strict=True):
            rho = math.exp(move if config.ratio_level == "token" else sum(moves) / len(moves))
            A = at("advantages", t) if batch["advantages"].ndim == 2 else batch["advantages"][i].item()
            gain = min(rho * A, max(min(rho, 1 + config.clip_high), 1 - config.clip_low) * A)
            if config.dual_clip is not None and A < 0:
                gain = max(gain, config.dual_clip * A)
            d = at("logprobs", t) - at("ref_logprobs", t)
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[config.kl_estimator]
            terms.append(-gain + config.kl_coef * kl * (rho if config.kl_gradient == "corrected" else 1))
        rows.append(terms)
    if config.name == "grpo":
        return sum(sum(terms) / len(terms) for terms in rows if terms) / len(rows)
    if config.name == "dr_grpo":
        return sum(map(sum, rows)) / (len(rows) * config.max_completion_length)
    return sum(map(sum, rows)) / max(sum(map(len, rows)), 1)  # dapo, and bnpo on one micro-batch


@given(batch=batches(), config=configs())
def test_equals_the_formula(batch, config):
    close(policy_loss(**batch, config=config).loss, plain_formula(batch, config))


@given(batch=batches(), level=st.sampled_from(["token", "sequence"]))
def test_sequence_sum_is_the_mean_over_rows_of_token_sums(batch, level):
    config = LossConfig(aggregate="seq-mean-token-sum", ratio_level=level)
    tokens = plain_formula(batch, replace(config, name="dapo"))
    rows = len(batch["mask"])
    close(policy_loss(**batch, config=config).loss, tokens * batch["mask"].sum().item() / rows)


@given(batch=batches(min_rows=2), config=configs(), mode=st.sampled_from(list(AGGREGATES)), data=st.data())
def test_micro_batches_sum_to_the_batch(batch, config, mode, data):
    """For any split of any order of the rows, with one denominator: value and gradient."""
    config = replace(config, aggregate=mode)
    rows = len(batch["mask"])
    order = data.draw(st.permutations(range(rows)))
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1))))
    loss, gradient = loss_and_gradient(batch, config)
    total, pieces = 0, torch.zeros_like(gradient)
    for start, stop in zip([0, *cuts], [*cuts, rows], strict=True):
        piece = order[start:stop]
        denominator = loss_denominator(batch["mask"], config)
        part, pieces[piece] = loss_and_gradient(rows_of(batch, piece), config, denominator=denominator)
        total = total + part
    close(total, loss)
    close(pieces, gradient)


@given(batch=batches(), config=configs(), extra=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_row_order_and_padding_width_do_not_matter(batch, config, extra, seed):
    loss, gradient = loss_and_gradient(batch, config)
    order = torch.randperm(len(gradient), generator=torch.Generator().manual_seed(seed))
    permuted = loss_and_gradient(rows_of(batch, order), config)
    close(permuted[0], loss)
    close(permuted[1], gradient[order])

    pad = lambda x: torch.nn.functional.pad(
        x.detach(), (0, extra), value=False if x.dtype == torch.bool else 7.0
    )
    wide = {name: pad(tensor) if tensor.ndim == 2 else tensor for name, tensor in batch.items()}
    padded = loss_and_gradient(wide, config)
    close(padded[0], loss)
    close(padded[1], pad(gradient) * (torch.arange(gradient.shape[1] + extra) < gradient.shape[1]))


@given(batch=batches(), config=configs(), poison=st.sampled_from([math.nan, math.inf, -math.inf, 100.0]))
def test_masked_positions_are_never_read(batch, config, poison):
    """NaN, infinity or an overflowing ratio where masked: bit-equal loss, gradient, terms and metrics."""
    batch = {name: tensor if name == "mask" else tensor.detach().float() for name, tensor in batch.items()}
    batch["advantages"] = batch["advantages"].reshape(len(batch["mask"]), -1).expand_as(batch["mask"])
    dirty = {
        name: tensor if name == "mask" else torch.where(batch["mask"], tensor, poison * (-1) ** position)
        for position, (name, tensor) in enumerate(batch.items())
    }
    clean, poisoned = loss_and_gradient(batch, config), loss_and_gradient(dirty, config)
    assert torch.equal(clean[0], poisoned[0]) and poisoned[0].isfinite()
    assert torch.equal(clean[1], poisoned[1]) and poisoned[1].isfinite().all()
    assert (poisoned[1][~batch["mask"]] == 0).all()
    clean, poisoned = policy_loss(**batch, config=config), policy_loss(**dirty, config=config)
    for name in ("surrogate", "weights", "kl", "ratio", "clipped_low", "clipped_high"):
        assert torch.equal(getattr(clean, name), getattr(poisoned, name)), name
        assert (getattr(clean, name)[~batch["mask"]] == 0).all(), name
    for name, value in clean.metrics.items():
        assert torch.equal(value, poisoned.metrics[name]), name


@pytest.mark.parametrize("mode", AGGREGATES)
def test_aggregate_alone_selects(mode):
    """The second selection: a masked NaN that a surrogate made itself reaches neither sum nor gradient."""
    per_token = torch.tensor([[1.0, math.nan], [2.0, 4.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    loss = aggregate(per_token, mask, LossConfig(aggregate=mode), 2)
    loss.backward()
    row_mean = mode == "seq-mean-token-mean"
    assert loss.item() == (2.0 if row_mean else 3.5)
    assert per_token.grad.tolist() == [[0.5, 0.0], [0.25, 0.25] if row_mean else [0.5, 0.5]]


def test_a_reference_without_coefficient_is_only_measured():
    """The reference may then be anything, even a policy that forbids a sampled token."""
    batch, config = golden_batch(), preset("grpo")
    without = loss_and_gradient({**batch, "ref_logprobs": None}, config)
    batch["ref_logprobs"] = torch.full_like(batch["ref_logprobs"], -math.inf)
    measured = loss_and_gradient(batch, config)
    assert torch.equal(measured[0], without[0]) and torch.equal(measured[1], without[1])


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (3, 5)])
@every_preset
def test_no_selected_token(name, shape):
    """Empty batches and batches of fully masked rows, whose advantage may be NaN: exactly 0, never NaN."""
    config = preset(name, max_completion_length=8, kl_coef=0.04)
    nan = torch.full(shape, math.nan)
    batch = dict.fromkeys(("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy"), nan)
    batch |= {"advantages": torch.full(shape[:1], math.nan), "mask": torch.zeros(shape, dtype=torch.bool)}
    loss, gradient = loss_and_gradient(batch, config)
    assert loss == 0 and (gradient == 0).all() and gradient.shape == shape
    assert all(value == 0 for value in policy_loss(**batch, config=config).metrics.values())


def test_fully_masked_rows_count_as_rows_but_not_as_tokens():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    denominators = {
        mode: loss_denominator(mask, LossConfig(aggregate=mode, max_completion_length=8)).item()
        for mode in AGGREGATES
    }
    assert denominators == {
        "token-mean": 3,
        "seq-mean-token-mean": 3,
        "seq-mean-token-sum-norm": 24,
        "seq-mean-token-sum": 3,
    }
    assert loss_denominator(mask[1:2], LossConfig()).item() == 1  # no token: divide 0 by 1
    batch = golden_batch()
    batch["mask"] = batch["mask"].clone()
    batch["mask"][1] = False
    loss = policy_loss(**batch, config=preset("grpo")).loss
    without = policy_loss(**rows_of(batch, [0, 2, 3]), config=preset("grpo")).loss
    close(loss, without * 3 / 4)


@every_preset
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl_gradient", ["corrected", "plain"])
def test_gradcheck(name, level, kl_gradient):
    """Central differences of width 1e-6; the closed-form ratios stay 1e-3 away from every clip bound."""
    batch = golden_batch()
    config = preset(
        name,
        ratio_level=level,
        kl_coef=0.3,
        kl_gradient=kl_gradient,
        dual_clip=1.37,
        max_completion_length=8,
    )
    ratio = policy_loss(**batch, config=config).ratio[batch["mask"]]
    assert all((ratio - bound).abs().min() > 1e-3 for bound in (0.8, 1.2, 1.37))
    new = batch.pop("logprobs")
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, **batch, config=config).loss, (new,))


def enumerated(logits, old, reference, **fields):
    """E over x ~ softmax(old) of the KL term alone, by enumerating the vocabulary through ``policy_loss``."""
    config = LossConfig(kl_coef=1.0, **fields)
    new, old, reference = (x.log_softmax(0) for x in (logits, old, reference))
    one = torch.ones(1, 1, dtype=torch.bool)
    term = lambda x: (
        policy_loss(
            new[x].view(1, 1),
            old[x].view(1, 1),
            torch.zeros(1, dtype=logits.dtype),
            one,
            config,
            ref_logprobs=reference[x].view(1, 1),
        ).loss
    )
    return sum(old[x].exp().detach() * term(x) for x in range(len(logits)))


def divergence(p, q):
    """KL(softmax(p) || softmax(q))."""
    return (p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum()


@pytest.mark.parametrize(
    "kl_gradient, estimator, descends",
    [
        ("plain", "k1", lambda p, q: 0 * p.sum()),
        ("plain", "k2", divergence),
        ("plain", "k3", lambda p, q: divergence(q, p)),
        ("corrected", "k1", divergence),
        ("corrected", "k3", divergence),
        (
            "corrected",
            "k2",
            lambda p, q: (p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0)) ** 2 / 2).sum(),
        ),
    ],
)
def test_which_divergence_the_gradient_descends(kl_gradient, estimator, descends):
    """Exact expectation over a vocabulary of five, on policy; the corrected gradient also off policy."""
    generator = torch.Generator().manual_seed(5)
    policy, reference, stale = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    policy.requires_grad_()
    fields = {"kl_estimator": estimator, "kl_gradient": kl_gradient}
    (expected,) = torch.autograd.grad(descends(policy, reference), policy)
    for old in [policy.detach()] + [stale] * (kl_gradient == "corrected"):
        (gradient,) = torch.autograd.grad(enumerated(policy, old, reference, **fields), policy)
        close(gradient, expected)
    assert (expected.norm() > 0.1) == (descends is not None and (kl_gradient, estimator) != ("plain", "k1"))


def test_kl_estimates_in_expectation_and_small_differences():
    generator = torch.Generator().manual_seed(6)
    p, q = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    expectation = lambda estimator: (
        p.softmax(0) * kl_penalty(p.log_softmax(0), q.log_softmax(0), estimator)
    ).sum()
    close(expectation("k1"), divergence(p, q))
    close(expectation("k3"), divergence(p, q))
    tiny = torch.tensor([1e-4, -1e-4])  # exp(-d) + d - 1 in float32 would keep no digit of 5e-9
    torch.testing.assert_close(kl_penalty(tiny, torch.zeros(2), "k3"), tiny.square() / 2, rtol=0.02, atol=0)


def test_clip_masks_and_dual_clip():
    """One row of ratios around the bounds, for both signs of the advantage."""
    ratio = torch.tensor([[0.5, 0.9, 1.2, 1.5, 5.0]], dtype=torch.float64).expand(3, -1)
    batch = {"logprobs": ratio.log(), "old_logprobs": torch.zeros(3, 5, dtype=torch.float64)}
    batch |= {"advantages": torch.tensor([1.0, -1.0, 0.0]), "mask": torch.ones(3, 5, dtype=torch.bool)}
    config = LossConfig(clip_low=0.2, clip_high=0.28)
    output = policy_loss(**batch, config=config)
    close(output.surrogate[0], [-0.5, -0.9, -1.2, -1.28, -1.28])
    close(output.surrogate[1], [0.8, 0.9, 1.2, 1.5, 5.0])
    assert output.clipped_high.tolist() == [[False, False, False, True, True], [False] * 5, [False] * 5]
    assert output.clipped_low.tolist() == [[False] * 5, [True, False, False, False, False], [False] * 5]
    close(output.metrics["clip_high_fraction"], 2 / 15)
    close(output.metrics["clip_low_fraction"], 1 / 15)
    bounded = policy_loss(**batch, config=replace(config, dual_clip=3.0)).surrogate
    close(bounded[0], output.surrogate[0])
    close(bounded[1], [0.8, 0.9, 1.2, 1.5, 3.0])
    _, gradient = loss_and_gradient(batch, replace(config, dual_clip=3.0, aggregate="seq-mean-token-sum"))
    expected = [[-0.5, -0.9, -1.2, 0, 0], [0, 0.9, 1.2, 1.5, 0], [0.0] * 5]
    close(gradient * 3, expected)


@given(batch=batches(), config=configs())
def test_metrics_and_terms(batch, config):
    """Metrics are masked means and maxima of the terms; the loss is rebuilt from the terms alone."""
    output, mask = policy_loss(**batch, config=config), batch["mask"]
    mean = lambda x: x[mask].double().mean().item() if mask.any() else 0.0
    largest = lambda x: x[mask].max().item() if mask.any() else 0.0
    new_old = (batch["logprobs"] - batch["old_logprobs"]).abs().detach()
    old_sampler = (batch["old_logprobs"] - batch["sampler_logprobs"]).abs()
    expected = {
        "surrogate": mean(output.surrogate),
        "ratio_mean": mean(output.ratio),
        "ratio_max": largest(output.ratio),
        "clip_low_fraction": mean(output.clipped_low),
        "clip_high_fraction": mean(output.clipped_high),
        "new_old_mean": mean(new_old),
        "new_old_max": largest(new_old),
        "kl": mean(output.kl),
        "entropy": mean(batch["entropy"]),
        "old_sampler_mean": mean(old_sampler),
        "old_sampler_max": largest(old_sampler),
    }
    assert {name: value.item() for name, value in output.metrics.items()} == pytest.approx(
        expected, abs=1e-12
    )
    parts = (output.surrogate, output.weights, output.kl, output.ratio, *output.metrics.values())
    assert not any(part.requires_grad for part in parts)
    per_token = output.weights * output.surrogate + config.kl_coef * output.kl
    if config.aggregate == "seq-mean-token-mean":
        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
    close(output.loss.detach(), per_token.sum() / loss_denominator(mask, config))
    fewer = {name: batch[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")}
    bare = policy_loss(**fewer, config=replace(config, kl_coef=0.0))
    assert bare.kl is None and not {"kl", "entropy", "old_sampler_max"} & bare.metrics.keys()


@given(batch=batches(), config=configs(), mode=st.sampled_from(list(AGGREGATES)))
def test_only_logprobs_get_gradient_and_dtypes(batch, config, mode):
    """Half precision is computed in float32 and any denominator keeps the dtype of the loss."""
    config = replace(config, aggregate=mode)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        low = {
            name: x if name == "mask" else x.detach().to(dtype).requires_grad_() for name, x in batch.items()
        }
        high = {name: x if name == "mask" else x.detach().float() for name, x in low.items()}
        output = policy_loss(**low, config=config)
        output.loss.backward()
        assert low.pop("logprobs").grad.dtype == dtype
        assert all(x.grad is None for x in low.values())
        assert output.loss.dtype == output.ratio.dtype == expected
        assert torch.equal(output.loss.detach(), policy_loss(**high, config=config).loss)
        for denominator in (3, 3.0, torch.tensor(3), torch.tensor([3.0], dtype=torch.float64)):
            scaled = policy_loss(**high, config=config, denominator=denominator).loss
            assert scaled.dtype == expected
            assert torch.equal(scaled, policy_loss(**high, config=config, denominator=3).loss)


@every_preset
def test_nothing_waits_for_the_device(name):
    """Tensors without data: any look at a value, on the host, would raise."""
    new = torch.empty(4, 6, device="meta", requires_grad=True)
    batch = dict.fromkeys(("old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy"), new.detach())
    mask = torch.empty(4, 6, device="meta", dtype=torch.bool)
    config = preset(name, kl_coef=0.04, dual_clip=3.0, max_completion_length=8)
    denominator = loss_denominator(mask, config)
    advantages = torch.empty(4, device="meta")
    output = policy_loss(
        new, advantages=advantages, mask=mask, config=config, denominator=denominator, **batch
    )
    output.loss.backward()
    assert new.grad.shape == new.shape and all(value.shape == () for value in output.metrics.values())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_compiles_without_a_graph_break(level):
    batch, config = golden_batch(), preset("grpo", ratio_level=level, kl_coef=0.04)
    loss = lambda new, old, advantages, mask, ref: (
        policy_loss(new, old, advantages, mask, config, ref_logprobs=ref).loss
    )
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(compiled(*batch.values()), loss(*batch.values()), 1e-15)


@pytest.mark.gpu
@every_preset
def test_cuda_equals_cpu(name):
    config = preset(name, kl_coef=0.04, max_completion_length=8)
    loss, gradient = loss_and_gradient(golden_batch(), config)
    batch = {key: tensor.cuda() for key, tensor in golden_batch().items()}
    on_gpu = loss_and_gradient(batch, config, denominator=loss_denominator(golden_batch()["mask"], config))
    close(on_gpu[0].cpu(), loss)
    close(on_gpu[1].cpu(), gradient)


def test_presets_are_data():
    """Their published numbers, their papers, and formulas that follow the fields."""
    assert {name: config.name for name, config in PRESETS.items()} == {name: name for name in PRESETS}
    assert all(config.paper and config.kl_coef == 0 and config.clip_low == 0.2 for config in PRESETS.values())
    assert {name: config.clip_high for name, config in PRESETS.items()} == {
        "grpo": 0.2,
        "dr_grpo": 0.2,
        "dapo": 0.28,
        "bnpo": 0.2,
    }
    assert preset("dapo").formula == (
        "1/sum_i|o_i| sum_it [-min(rho A, clip(rho, 0.8, 1.28) A)], rho = exp(l - l_old)"
    )
    assert preset("grpo", ratio_level="sequence", dual_clip=3, kl_coef=0.04).formula == (
        "1/N sum_i 1/|o_i| sum_t [-min(min(rho, 3) A, clip(rho, 0.8, 1.2) A) + 0.04 rho k3(l, l_ref)], "
        "rho = exp(mean_t(l - l_old))"
    )
    assert preset("grpo", name="mine").name == "mine" and PRESETS["grpo"].name == "grpo"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: preset("dr_gpro"), "preset: got 'dr_gpro', nearest is 'dr_grpo'"),
        (lambda: preset("grpo", clip_hihg=0.3), "got 'clip_hihg', nearest is 'clip_high'"),
        (lambda: LossConfig(ratio_level="sequnce"), "ratio_level: got 'sequnce', nearest is 'sequence'"),
        (lambda: LossConfig(surrogate="clp"), "surrogate: got 'clp', nearest is 'clip'"),
        (lambda: LossConfig(kl_estimator="k4"), "kl_estimator: got 'k4'"),
        (lambda: LossConfig(kl_gradient="none"), "kl_gradient: got 'none'"),
        (lambda: LossConfig(aggregate=None), "aggregate: got None, nearest is .*, expected one of"),
        (lambda: LossConfig(denominator_scope="local"), "denominator_scope: got 'local'"),
        (lambda: LossConfig(clip_low=1.5), r"clip_low: got 1.5, expected a number in \[0, 1\]"),
        (lambda: LossConfig(clip_high=None), "clip_high: got None, expected a number"),
        (lambda: LossConfig(clip_high=math.nan), "clip_high: got nan, expected a number >= 0"),
        (lambda: LossConfig(dual_clip=1.2), "dual_clip: got 1.2, expected None or > 1.2"),
        (lambda: LossConfig(kl_coef=math.inf), "kl_coef: got inf, expected a finite number"),
        (
            lambda: LossConfig(max_completion_length=0),
            "max_completion_length: got 0, expected None or an int",
        ),
        (lambda: LossConfig(max_completion_length=8.0), "max_completion_length: got 8.0"),
        (lambda: kl_penalty(torch.zeros(2), torch.zeros(2), "k0"), "estimator: got 'k0'"),
        (lambda: kl_penalty(torch.zeros(2), torch.zeros(1), "k1"), r"ref_logprobs: got shape \(1,\)"),
        (lambda: loss_denominator(torch.ones(2, 3), LossConfig()), "mask: got torch.float32"),
    ],
)
def test_bad_config(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logprobs": torch.zeros(4)}, r"logprobs: got torch.float32 of shape \(4,\), expected a floating"),
        ({"logprobs": torch.zeros(4, 6, dtype=torch.int64)}, "logprobs: got torch.int64"),
        ({"old_logprobs": torch.zeros(4, 1)}, r"old_logprobs: got shape \(4, 1\), expected \(4, 6\)"),
        ({"old_logprobs": None}, "old_logprobs: got shape None"),
        ({"mask": torch.ones(4, 6)}, "mask: got torch.float32, expected torch.bool"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask: got shape \(4,\)"),
        ({"advantages": torch.zeros(6)}, r"advantages: got shape \(6,\), expected \(4,\) or \(4, 6\)"),
        ({"advantages": torch.zeros(4, 1)}, r"advantages: got shape \(4, 1\)"),
        ({"ref_logprobs": None}, r"ref_logprobs: got shape None, expected \(4, 6\)"),
        ({"sampler_logprobs": torch.zeros(4)}, r"sampler_logprobs: got shape \(4,\)"),
        ({"entropy": torch.zeros(())}, r"entropy: got shape \(\)"),
        ({"denominator": 0}, "denominator: got 0, expected a finite number > 0"),
        ({"denominator": math.nan}, "denominator: got nan"),
        ({"denominator": torch.ones(4)}, r"denominator: got shape \(4,\), expected a scalar"),
        ({"config": preset("dr_grpo")}, "max_completion_length: got None, expected an int"),
    ],
)
def test_bad_input(change, message):
    good = golden_batch() | {"config": LossConfig(kl_coef=0.04)}
    with pytest.raises(ValueError, match=message):
        policy_loss(**(good | change))
