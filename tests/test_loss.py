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
    CHOICES,
    PRESET_LEVELS,
    PRESETS,
    RATIOS,
    SURROGATES,
    LossConfig,
    aggregate,
    entropy_quantile,
    kl_penalty,
    kl_reward_penalty,
    loss_denominator,
    policy_loss,
    preset,
)
from torch.utils._python_dispatch import TorchDispatchMode

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
LOSSES = [name for name in GOLDEN if "/beta=" in name]
TERMS = ("surrogate", "weights", "kl", "ratio", "clipped_low", "clipped_high")
DETACHED = ("cispo", "vespo", "dppo-tv", "dppo-kl")  # a gradient that is not that of their value
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
    new = -3 * uniform(rows, width) - 1.2  # so that none of the others is above 0
    advantages = 4 * uniform(rows, width) - 2 if draw(st.booleans()) else 4 * uniform(rows) - 2
    return {
        "logprobs": new.clone().requires_grad_(),
        "old_logprobs": new + 2 * uniform(rows, width) - 1,
        "advantages": advantages,
        "mask": uniform(rows, width) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])),
        "ref_logprobs": new + 2 * uniform(rows, width) - 1,
        "sampler_logprobs": new + uniform(rows, width) - 0.5,
        "entropy": uniform(rows, width),
        "group_ids": torch.randint(-2, 1, (rows,), generator=generator),
    }


@st.composite
def configs(draw, kl=True):
    """Any preset with any field that it allows changed."""
    choose = lambda **options: {field: draw(st.sampled_from(values)) for field, values in options.items()}
    name = draw(st.sampled_from(list(PRESETS)))
    fields = choose(
        dual_clip=[None, 1.5],
        sampler_correction=[None, "token-truncate", "token-mask"],
        sampler_min=[0.0, 0.8],
        sampler_max=[1.2, 3.0],
        off_policy_threshold=[None, 0.1],
        top_entropy=[1.0, 0.6],
        kl_coef=[0.0, 0.04 * kl],
        kl_estimator=["k1", "k2", "k3"],
        kl_gradient=list(CHOICES["kl_gradient"]),
        kl_place=["loss", "loss", "reward"],
    )
    if name == "dppo":
        fields |= choose(surrogate=["dppo-tv", "dppo-kl"], clip_low=[0.02, 0.2], ratio_max=[None, 1.3])
    elif name == "cispo":
        fields |= choose(clip_high=[1.1, 5.0])
    else:
        fields |= choose(clip_high=[0.2, 0.28])
    if name not in PRESET_LEVELS and name != "dppo":
        fields |= choose(ratio_level=["token", "sequence", "sequence-token", "sequence-sum"])
    if PRESETS[name].surrogate != "vespo" and fields["sampler_correction"] and draw(st.booleans()):
        fields["sampler_correction"] = fields["sampler_correction"].replace("token", "sequence")
    if draw(st.booleans()):
        fields |= choose(aggregate=list(AGGREGATES))
    return preset(name, max_completion_length=8, **fields)


def loss_and_gradient(batch, config, **extra):
    batch = {**batch, "logprobs": batch["logprobs"].detach().clone().requires_grad_()}
    output = policy_loss(**batch, config=config, **extra)
    output.loss.backward()
    return output.loss.detach(), batch["logprobs"].grad


def rows_of(batch, rows):
    return {name: tensor[rows] for name, tensor in batch.items()}


def whole_batch(batch, config):
    """What a micro-batch needs to know of the batch: its rows of the denominator, and the entropy threshold."""
    denominator = loss_denominator(batch["mask"], config, batch.get("group_ids"))
    threshold = entropy_quantile(batch["entropy"], batch["mask"], config) if "entropy" in batch else None
    return lambda rows: {
        "denominator": denominator[rows] if denominator.ndim else denominator,
        "entropy_threshold": threshold,
    }


def floats(batch, convert):
    """``batch`` with ``convert`` applied to what is neither mask nor ids."""
    return {name: x if name in ("mask", "group_ids") else convert(x) for name, x in batch.items()}


def close(got, expected, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


def golden_config(key):
    name, level, beta = key.split("/")
    clip_high = 5.0 if name == "cispo" else 0.28
    beta = float(beta.removeprefix("beta="))
    return preset(name, ratio_level=level, clip_high=clip_high, kl_coef=beta, max_completion_length=8)


@pytest.mark.parametrize("key", LOSSES)
def test_golden(key):
    """Value and gradient norm as TRL and Liger compute them, in float64.

    TRL rounds SAPO's 1.05 to float32, and Liger's LUSPO is another function: docs/algorithms.md.
    """
    config = golden_config(key)
    loss, gradient = loss_and_gradient(golden_batch(), config)
    oracles = dict(GOLDEN[key])
    if config.name == "luspo" and (config.ratio_level == "token" or config.kl_coef):
        assert abs(oracles.pop("liger")[0] - loss.item()) > 1e-4
    for oracle, (value, norm) in oracles.items():
        atol = 4e-8 if (config.name, oracle) == ("sapo", "trl") else 1e-9
        assert loss.item() == pytest.approx(value, abs=atol), oracle
        assert gradient.norm().item() == pytest.approx(norm, abs=atol), oracle


@pytest.mark.parametrize(
    "key, config",
    [
        ("gmpo/eps=0.4", preset("gmpo")),
        ("reinforce/token-mean", preset("reinforce")),
        ("grpo/sequence/beta=0.0", preset("gspo", clip_low=0.2, clip_high=0.28)),
        ("grpo/sequence/beta=0.0", preset("gspo_token", clip_low=0.2, clip_high=0.28)),
        ("bnpo/token/beta=0.0", preset("ppo", clip_high=0.28)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_golden_presets(key, config):
    loss, gradient = loss_and_gradient(golden_batch(), config)
    value, norm = GOLDEN[key]["trl"] if isinstance(GOLDEN[key], dict) else GOLDEN[key]
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert gradient.norm().item() == pytest.approx(norm, abs=1e-8)  # printed with eight or nine digits


def test_golden_straight_through_kl():
    """verl's "k3+": the value of k3, the gradient of k2."""
    batch = golden_batch()
    kl = kl_penalty(batch["logprobs"], batch["ref_logprobs"], "k3", gradient="straight-through")
    (gradient,) = torch.autograd.grad(kl[batch["mask"]].mean(), batch["logprobs"])
    value, norm = GOLDEN["kl/k3 straight-through"]
    assert kl[batch["mask"]].mean().item() == pytest.approx(value, abs=1e-12)
    assert gradient.norm().item() == pytest.approx(norm, abs=1e-9)


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


def plain_surrogate(config, A, l, old, rho, moves):
    """phi of one token as its paper writes it, from Python floats; ``moves`` are the log-ratios of its row."""
    bounded = lambda x, low, high: max(low, min(x, high))
    p, p_old = math.exp(l), math.exp(old)
    low, high = config.clip_low, config.clip_high
    if config.surrogate == "clip":
        gain = min(rho * A, bounded(rho, 1 - low, 1 + high) * A)
        return -max(gain, config.dual_clip * A) if config.dual_clip is not None and A < 0 else -gain
    if config.surrogate == "cispo":
        return -min(rho, high) * A * l
    if config.surrogate == "sapo":
        tau = 1.0 if A > 0 else 1.05
        return -4 / tau / (1 + math.exp(-tau * (rho - 1))) * A
    if config.surrogate == "vespo":
        k, rate = (2, 3) if A >= 0 else (3, 2)
        product = math.exp(sum(moves))
        return -math.exp(rate + k * math.log(product) - rate * product) * A * l
    if config.surrogate == "gmpo":
        return -rho * A
    if config.surrogate == "policy-gradient":
        return -A * l
    if config.surrogate == "dppo-tv":
        keep = p - p_old <= high if A > 0 else p - p_old >= -low
    else:
        kl = p_old * (old - l) + (1 - p_old) * math.log((1 - p_old + 1e-8) / (1 - p + 1e-8))
        keep = (kl <= high or p <= p_old) if A > 0 else (kl <= low or p >= p_old)
    return -min(rho, config.ratio_max or math.inf) * A * l * keep


def plain_ratio(config, t, moves, signs):
    """rho of token t of a row with log-ratios ``moves`` and advantages ``signs``."""
    if config.ratio_level == "geometric-mean":
        low, high = config.clip_low, config.clip_high
        moves = [min(m, high) if A > 0 else max(m, -low) for m, A in zip(moves, signs, strict=True)]
    total = sum(moves)
    return math.exp({"token": moves[t], "sequence-sum": total}.get(config.ratio_level, total / len(moves)))


def plain_correction(config, gaps):
    """p_old / p_sampler of each token of a row whose l_old - l_sampler are ``gaps``, bounded."""
    if config.sampler_correction is None:
        return [1.0] * len(gaps)
    level, mode = config.sampler_correction.split("-")
    ratios = [math.exp(sum(gaps) if level == "sequence" else gap) for gap in gaps]
    low, high = config.sampler_min, config.sampler_max
    if mode == "truncate":
        return [max(low, min(ratio, high)) for ratio in ratios]
    return [ratio * (low <= ratio <= high) for ratio in ratios]


def plain_formula(batch, config):
    """Every preset's objective with Python floats, one token at a time."""
    rows, chosen = [], sorted(batch["entropy"][batch["mask"]].tolist()) if "entropy" in batch else []
    if chosen:  # numpy's and torch's linear interpolation
        place = (1 - config.top_entropy) * (len(chosen) - 1)
        below = math.floor(place)
        threshold = chosen[below] + (place - below) * (
            chosen[min(below + 1, len(chosen) - 1)] - chosen[below]
        )
    for i, selected in enumerate(batch["mask"].tolist()):
        tokens = [t for t, keep in enumerate(selected) if keep]
        row = lambda name, i=i, tokens=tokens: batch[name][i, tokens].tolist()
        new, old = row("logprobs"), row("old_logprobs")
        signs = (
            row("advantages")
            if batch["advantages"].ndim == 2
            else [batch["advantages"][i].item()] * len(tokens)
        )
        moves = [a - b for a, b in zip(new, old, strict=True)]
        sampler = row("sampler_logprobs") if "sampler_logprobs" in batch else old
        corrections = plain_correction(config, [a - b for a, b in zip(old, sampler, strict=True)])
        if config.surrogate == "vespo":
            lowest = math.log(1e-8)
            moves = [
                m + (math.log(c) if c > 1e-8 else lowest) for m, c in zip(moves, corrections, strict=True)
            ]
            moves, corrections, plain = [max(sum(moves), lowest)], [1.0] * len(tokens), moves
            ratios = [a - b for a, b in zip(new, old, strict=True)]
        else:
            ratios = plain = moves
        terms = []
        for t in range(len(tokens)):
            rho, A = plain_ratio(config, t, ratios, signs), signs[t]
            w = corrections[t]
            if config.off_policy_threshold is not None:
                drift = sum(s - l for s, l in zip(sampler, new, strict=True)) / len(tokens)
                w *= A >= 0 or drift <= config.off_policy_threshold
            if config.top_entropy < 1:
                w *= row("entropy")[t] >= threshold
            term = w * plain_surrogate(config, A, new[t], old[t], rho, moves)
            if config.kl_coef and config.kl_place == "loss":
                d = new[t] - row("ref_logprobs")[t]
                kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[config.kl_estimator]
                by = math.exp(plain[t]) if config.surrogate == "gmpo" else rho
                term += config.kl_coef * kl * (by if config.kl_gradient == "corrected" else 1)
            terms.append(term)
        rows.append(terms)
    if config.aggregate == "seq-mean-token-mean":
        return sum(sum(terms) / len(terms) for terms in rows if terms) / len(rows)
    if config.aggregate == "seq-mean-token-sum-norm":
        return sum(map(sum, rows)) / (len(rows) * config.max_completion_length)
    if config.aggregate == "seq-mean-token-sum":
        return sum(map(sum, rows)) / len(rows)
    if config.aggregate == "prompt-mean":
        prompts = {}
        for prompt, terms in zip(batch["group_ids"].tolist(), rows, strict=True):
            prompts.setdefault(prompt, []).extend(terms)
        return sum(sum(terms) / len(terms) for terms in prompts.values() if terms) / len(prompts)
    return sum(map(sum, rows)) / max(sum(map(len, rows)), 1)


@pytest.mark.parametrize("name", [*PRESETS, "dppo-kl"])
@given(batch=batches(min_rows=4))
def test_every_preset_equals_its_formula(name, batch):
    """As it is, and with a reference, a sampler that is far away and entropies."""
    tight = {"surrogate": "dppo-kl", "clip_low": 0.01, "clip_high": 0.02}
    config = preset("dppo", **tight) if name == "dppo-kl" else preset(name, max_completion_length=8)
    close(policy_loss(**batch, config=config).loss, plain_formula(batch, config))
    weighted = replace(config, sampler_correction="token-truncate", sampler_min=0.8, sampler_max=1.2)
    close(policy_loss(**batch, config=weighted).loss, plain_formula(batch, weighted))
    filtered = replace(config, off_policy_threshold=0.05, top_entropy=0.6)
    close(policy_loss(**batch, config=filtered).loss, plain_formula(batch, filtered))
    for gradient in CHOICES["kl_gradient"]:
        penalised = replace(config, kl_coef=0.1, kl_gradient=gradient)
        close(policy_loss(**batch, config=penalised).loss, plain_formula(batch, penalised))


@given(batch=batches(), config=configs())
def test_equals_the_formula(batch, config):
    close(policy_loss(**batch, config=config).loss, plain_formula(batch, config))


@every_preset
@pytest.mark.parametrize("mode", AGGREGATES)
@given(batch=batches(min_rows=2), data=st.data())
def test_micro_batches_sum_to_the_batch(name, mode, batch, data):
    """For any split of any order of the rows, in micro-batches or over ranks: value and gradient."""
    extra = {"sampler_correction": "token-mask", "off_policy_threshold": 0.1, "top_entropy": 0.6}
    config = preset(name, aggregate=mode, kl_coef=0.1, max_completion_length=8, **extra)
    rows = len(batch["mask"])
    order = data.draw(st.permutations(range(rows)))
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1))))
    loss, gradient = loss_and_gradient(batch, config)
    total, pieces, shared = 0, torch.zeros_like(gradient), whole_batch(batch, config)
    parts = [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, rows], strict=True)]
    for part in parts:
        value, pieces[part] = loss_and_gradient(rows_of(batch, part), config, **shared(part))
        total = total + value
    close(total, loss)
    close(pieces, gradient)
    if mode != "prompt-mean" and batch["mask"].any(dim=1).all():
        counts = sum(loss_denominator(batch["mask"][part], config) for part in parts)
        assert counts == shared(order)["denominator"]


def test_prompt_mean_is_the_mean_of_the_prompts_token_means():
    """Two rows of 6 and 4 tokens are one prompt, the others one each; equal weight to each prompt."""
    batch = golden_batch() | {"group_ids": torch.tensor([7, 7, -3, 5])}
    config = LossConfig(aggregate="prompt-mean")
    alone = [policy_loss(**rows_of(batch, rows), config=LossConfig()).loss for rows in ([0, 1], [2], [3])]
    close(policy_loss(**batch, config=config).loss, sum(alone) / 3)
    assert loss_denominator(batch["mask"], config, batch["group_ids"]).tolist() == [30, 30, 6, 15]


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
    close(loss_and_gradient(batch | {"group_ids": 7 - 5 * batch["group_ids"]}, config)[0], loss)
    padded = loss_and_gradient(wide, config)
    close(padded[0], loss)
    close(padded[1], pad(gradient) * (torch.arange(gradient.shape[1] + extra) < gradient.shape[1]))


@given(batch=batches(), config=configs(), poison=st.sampled_from([math.nan, math.inf, -math.inf, 100.0]))
def test_masked_positions_are_never_read(batch, config, poison):
    """NaN, infinity or an overflowing ratio where masked: bit-equal loss, gradient, terms and metrics."""
    batch = floats(batch, lambda tensor: tensor.detach().float())
    batch["advantages"] = batch["advantages"].reshape(len(batch["mask"]), -1).expand_as(batch["mask"])
    dirty = {
        name: torch.where(batch["mask"], tensor, poison * (-1) ** position)
        if tensor.is_floating_point()
        else tensor
        for position, (name, tensor) in enumerate(batch.items())
    }
    clean, poisoned = loss_and_gradient(batch, config), loss_and_gradient(dirty, config)
    assert torch.equal(clean[0], poisoned[0]) and poisoned[0].isfinite()
    assert torch.equal(clean[1], poisoned[1]) and poisoned[1].isfinite().all()
    assert (poisoned[1][~batch["mask"]] == 0).all()
    clean, poisoned = policy_loss(**batch, config=config), policy_loss(**dirty, config=config)
    for name in TERMS:
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
    config = replace(config, sampler_correction="token-mask", off_policy_threshold=0.5, top_entropy=0.5)
    loss, gradient = loss_and_gradient(batch, config)
    assert loss == 0 and (gradient == 0).all() and gradient.shape == shape
    assert all(value == 0 for value in policy_loss(**batch, config=config).metrics.values())


def test_fully_masked_rows_count_as_rows_but_not_as_tokens():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    denominators = {
        mode: loss_denominator(
            mask, LossConfig(aggregate=mode, max_completion_length=8), torch.tensor([1, 2, 1])
        ).tolist()
        for mode in AGGREGATES
    }
    assert denominators == {
        "token-mean": 3,
        "seq-mean-token-mean": 3,
        "seq-mean-token-sum-norm": 24,
        "seq-mean-token-sum": 3,
        "prompt-mean": [6, 1, 6],  # two prompts; one without a token divides 0 by 1
    }
    assert loss_denominator(mask[1:2], LossConfig()).item() == 1  # no token: divide 0 by 1
    batch = golden_batch()
    batch["mask"] = batch["mask"].clone()
    batch["mask"][1] = False
    loss = policy_loss(**batch, config=preset("grpo")).loss
    without = policy_loss(**rows_of(batch, [0, 2, 3]), config=preset("grpo")).loss
    close(loss, without * 3 / 4)


@pytest.mark.parametrize("surrogate", [name for name in SURROGATES if name not in DETACHED])
@pytest.mark.parametrize("level", [level for level in RATIOS if level != "sequence-token"])
@pytest.mark.parametrize("kl_gradient", ["corrected", "plain"])
def test_gradcheck(surrogate, level, kl_gradient):
    """Central differences of width 1e-6; the closed-form ratios stay 1e-3 away from every clip bound."""
    if (level == "geometric-mean") != (surrogate == "gmpo"):
        return
    batch = golden_batch() | {"group_ids": torch.tensor([1, 1, 2, 2])}
    fields = {"kl_coef": 0.3, "kl_gradient": kl_gradient, "dual_clip": 1.37, "aggregate": "prompt-mean"}
    config = LossConfig(ratio_level=level, surrogate=surrogate, **fields)
    ratio = policy_loss(**batch, config=config).ratio[batch["mask"]]
    if surrogate == "clip":
        assert all((ratio - bound).abs().min() > 1e-3 for bound in (0.8, 1.2, 1.37))
    elif surrogate == "gmpo":
        moves = (batch["logprobs"] - batch["old_logprobs"]).detach()[batch["mask"]]
        assert (moves.abs() - 0.2).abs().min() > 1e-3
    new = batch.pop("logprobs")
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, **batch, config=config).loss, (new,))


@pytest.mark.parametrize("surrogate", DETACHED)
@given(batch=batches())
def test_gradient_of_surrogates_that_weigh_the_score_function(surrogate, batch):
    """phi = -sg(c) A l has the gradient -c A, that is phi / l."""
    config = LossConfig(surrogate=surrogate, clip_high=1.1, clip_low=0.05, aggregate="token-mean")
    _, gradient = loss_and_gradient(batch, config)
    surrogates = policy_loss(**batch, config=config).surrogate
    n = max(batch["mask"].sum().item(), 1)
    close(gradient, torch.where(batch["mask"], surrogates / batch["logprobs"].detach() / n, 0.0))


@given(batch=batches())
def test_gspo_token(batch):
    """One advantage a row: GSPO in value and gradient. One a token: each token's own log-prob gets the gradient."""
    token, sequence = preset("gspo_token"), preset("gspo")
    row = batch | {"advantages": batch["advantages"].reshape(len(batch["mask"]), -1)[:, 0]}
    for got, expected in zip(loss_and_gradient(row, token), loss_and_gradient(row, sequence), strict=True):
        close(got, expected)
    _, gradient = loss_and_gradient(batch, token)
    output = policy_loss(**batch, config=token)
    lengths = batch["mask"].sum(1, keepdim=True).clamp(min=1) * len(batch["mask"])
    inside = ~(output.clipped_low | output.clipped_high)
    close(gradient, output.surrogate / lengths * inside)


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
        ("straight-through", "k1", divergence),
        ("straight-through", "k2", divergence),
        ("straight-through", "k3", divergence),
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
    assert (expected.norm() > 0.1) == ((kl_gradient, estimator) != ("plain", "k1"))


def test_k1_in_the_reward_descends_the_reverse_divergence():
    """E[-sg(-kl) grad l]: the score function with the penalty taken off a reward of 0, enumerated."""
    generator = torch.Generator().manual_seed(5)
    policy, reference = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    policy.requires_grad_()
    new, ref = policy.log_softmax(0)[:, None], reference.log_softmax(0)[:, None]
    mask, config = torch.ones(5, 1, dtype=torch.bool), preset("reinforce", kl_place="reward", kl_coef=1.0)
    penalty = kl_reward_penalty(new, ref, mask, replace(config, kl_estimator="k1"))
    assert not penalty.requires_grad and penalty.shape == (5, 1)
    terms = [
        policy_loss(new[x : x + 1], new[x : x + 1], -penalty[x], mask[:1], config).loss for x in range(5)
    ]
    loss = sum(p * term for p, term in zip(policy.softmax(0).detach(), terms, strict=True))
    (gradient,) = torch.autograd.grad(loss, policy)
    close(gradient, torch.autograd.grad(divergence(policy, reference), policy)[0])


@given(batch=batches())
def test_kl_in_the_reward_stays_out_of_the_loss(batch):
    """The loss needs no reference then and says so; the penalty sums kl_coef k1 over the selected tokens."""
    config = preset("rloo", kl_coef=0.05)
    without = batch | {"ref_logprobs": None}
    assert torch.equal(
        policy_loss(**without, config=config).loss, policy_loss(**without, config=preset("rloo")).loss
    )
    assert [warning.split(":")[0] for warning in config.warnings] == ["kl-in-reward"]
    assert policy_loss(**batch, config=config).warnings == config.warnings
    dirty = torch.where(batch["mask"], batch["ref_logprobs"], math.nan)
    penalty = kl_reward_penalty(batch["logprobs"], dirty, batch["mask"], config)
    difference = (batch["logprobs"] - batch["ref_logprobs"]).detach()
    close(penalty.sum(1), 0.05 * (difference * batch["mask"]).sum(1))


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
    new_sampler = (batch["logprobs"].detach() - batch["sampler_logprobs"]).abs()
    difference = (batch["logprobs"] - batch["ref_logprobs"]).detach()
    ratio = output.ratio[mask]
    quantile = lambda share: ratio.quantile(share).item() if mask.any() else 0.0
    advantages = batch["advantages"].reshape(len(mask), -1).expand_as(mask) * mask
    silent = [not any(row) for row, keep in zip(advantages.tolist(), mask.any(1), strict=True) if keep]
    expected = {
        "surrogate": mean(output.surrogate),
        "weight_mean": mean(output.weights),
        "ratio_mean": mean(output.ratio),
        "ratio_max": largest(output.ratio),
        "ratio_p01": quantile(0.01),
        "ratio_p50": quantile(0.5),
        "ratio_p99": quantile(0.99),
        "ess": (ratio.sum() ** 2 / len(ratio) / ratio.square().sum()).item() if mask.any() else 0.0,
        "clip_low_fraction": mean(output.clipped_low),
        "clip_high_fraction": mean(output.clipped_high),
        "zero_advantage_share": sum(silent) / max(len(silent), 1),
        "new_old_mean": mean(new_old),
        "new_old_max": largest(new_old),
        "kl": mean(output.kl),
        "kl_k1": mean(difference),
        "kl_k3": mean(torch.expm1(-difference) + difference),
        "entropy": mean(batch["entropy"]),
        "old_sampler_mean": mean(old_sampler),
        "old_sampler_max": largest(old_sampler),
        "new_sampler_mean": mean(new_sampler),
        "new_sampler_max": largest(new_sampler),
    }
    metrics = {name: value.item() for name, value in output.metrics.items()}
    assert metrics == pytest.approx(expected, abs=1e-12)
    parts = (output.surrogate, output.weights, output.kl, output.ratio, *output.metrics.values())
    assert not any(part.requires_grad for part in parts)
    per_token = output.weights * output.surrogate + config.kl_coef * output.kl * (config.kl_place == "loss")
    if config.aggregate == "seq-mean-token-mean":
        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
    denominator = loss_denominator(mask, config, batch["group_ids"])
    close(output.loss.detach(), (per_token.sum(1) / denominator).sum())
    fewer = {name: batch[name] for name in ("logprobs", "old_logprobs", "advantages", "mask", "group_ids")}
    off = {"kl_coef": 0.0, "sampler_correction": None, "top_entropy": 1.0}
    bare = policy_loss(**fewer, config=replace(config, **off))
    assert bare.kl is None and not {"kl", "entropy", "old_sampler_max"} & bare.metrics.keys()


@given(batch=batches(), config=configs())
def test_only_logprobs_get_gradient_and_dtypes(batch, config):
    """Half precision is computed in float32 and any denominator keeps the dtype of the loss."""
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        low = floats(batch, lambda x, dtype=dtype: x.detach().to(dtype).requires_grad_())
        high = floats(low, lambda x: x.detach().float())
        output = policy_loss(**low, config=config)
        output.loss.backward()
        assert low.pop("logprobs").grad.dtype == dtype
        assert all(x.grad is None for x in low.values())
        assert output.loss.dtype == output.ratio.dtype == expected
        assert torch.equal(output.loss.detach(), policy_loss(**high, config=config).loss)
        single = replace(config, aggregate="token-mean")
        at = lambda denominator, high=high, single=single: (
            policy_loss(
                **high,
                config=single,
                denominator=denominator,
                entropy_threshold=entropy_quantile(high["entropy"], high["mask"], single),
            ).loss
        )
        for denominator in (3, 3.0, torch.tensor(3), torch.tensor([3.0], dtype=torch.float64)):
            assert at(denominator).dtype == expected
            assert torch.equal(at(denominator), at(3))


def weights_of(batch, **fields):
    return policy_loss(**batch, config=LossConfig(**fields)).weights


def test_sampler_correction():
    """Each mode at each level on ratios p_old / p_sampler of 0.5, 1, 2 and 4; neither KL nor denominator sees it."""
    gaps = torch.tensor([[0.5, 1.0], [2.0, 4.0]], dtype=torch.float64).log()
    zeros, mask = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool)
    batch = {"logprobs": zeros - 1, "old_logprobs": zeros - 1, "advantages": torch.tensor([1.0, -1.0])}
    batch |= {"mask": mask, "sampler_logprobs": zeros - 1 - gaps, "ref_logprobs": zeros - 2}
    bounds = {"sampler_min": 0.8, "sampler_max": 3.0}
    expected = {
        "token-truncate": [[0.8, 1.0], [2.0, 3.0]],
        "token-mask": [[0.0, 1.0], [2.0, 0.0]],
        "sequence-truncate": [[0.8, 0.8], [3.0, 3.0]],
        "sequence-mask": [[0.0, 0.0], [0.0, 0.0]],
    }
    for mode, values in expected.items():
        close(weights_of(batch, sampler_correction=mode, **bounds), values)
        config = LossConfig(sampler_correction=mode, kl_coef=0.1, **bounds)
        without = replace(config, sampler_correction=None)
        output, plain = policy_loss(**batch, config=config), policy_loss(**batch, config=without)
        close(output.kl, plain.kl)
        gained = ((torch.tensor(values, dtype=torch.float64) - 1) * plain.surrogate).sum() / 4
        close(output.loss, plain.loss + gained)
    wide = weights_of(batch, sampler_correction="sequence-mask", sampler_max=10.0)
    close(wide, [[0.5, 0.5], [8.0, 8.0]])  # the product, not the mean


def test_off_policy_mask():
    """Drops a row of negative advantage that the policy has left by more than the threshold; l_old stands in."""
    new = torch.tensor([[-2.0, -2.0], [-2.0, -2.0], [-2.0, -2.0], [-1.0, -1.0]])
    behaviour = torch.tensor([[-1.0, -1.2], [-1.0, -1.2], [-1.9, -1.8], [-3.0, -3.0]])
    batch = {"logprobs": new, "old_logprobs": new, "advantages": torch.tensor([-1.0, 1.0, -1.0, -1.0])}
    batch |= {"mask": torch.ones(4, 2, dtype=torch.bool), "sampler_logprobs": behaviour}
    kept = [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    assert weights_of(batch, off_policy_threshold=0.5).tolist() == kept
    batch |= {"old_logprobs": behaviour, "sampler_logprobs": None}
    assert weights_of(batch, off_policy_threshold=0.5).tolist() == kept
    batch["advantages"] = torch.tensor([[-1.0, 1.0]] * 4)
    assert weights_of(batch, off_policy_threshold=0.5)[0].tolist() == [0.0, 1.0]


@given(batch=batches(), share=st.sampled_from([0.01, 0.2, 0.5, 0.99]))
def test_top_entropy(batch, share):
    """torch.quantile's threshold; the tokens left out still count in the denominator."""
    config = LossConfig(top_entropy=share)
    output, mask = policy_loss(**batch, config=config), batch["mask"]
    if mask.any():
        chosen = batch["entropy"][mask]
        threshold = chosen.quantile(1 - share)
        close(entropy_quantile(batch["entropy"], mask, config), threshold)
        assert torch.equal(output.weights[mask], (chosen >= threshold).double())
        close(output.loss.detach(), (output.weights * output.surrogate).sum() / mask.sum())
    else:
        assert output.loss == 0 and entropy_quantile(batch["entropy"], mask, config) == 0


@every_preset
def test_nothing_waits_for_the_device(name):
    """Tensors without data: any look at a value, on the host, would raise."""
    new = torch.empty(4, 6, device="meta", requires_grad=True)
    batch = dict.fromkeys(("old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy"), new.detach())
    mask = torch.empty(4, 6, device="meta", dtype=torch.bool)
    config = preset(name, kl_coef=0.04, dual_clip=3.0, max_completion_length=8)
    batch["group_ids"] = torch.empty(4, device="meta", dtype=torch.int64)
    config = replace(config, sampler_correction="token-mask", off_policy_threshold=0.5, top_entropy=0.5)
    for mode in AGGREGATES:
        advantages = torch.empty(4, device="meta")
        output = policy_loss(
            new, advantages=advantages, mask=mask, config=replace(config, aggregate=mode), **batch
        )
        output.loss.backward()
        assert new.grad.shape == new.shape and all(value.shape == () for value in output.metrics.values())


class Launches(TorchDispatchMode):
    """Names of the operators that would launch a kernel: all but views, allocations and questions about dtypes."""

    SILENT = ("detach", "empty", "empty_like", "_unsafe_view", "promote_types")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view and op.overloadpacket.__name__ not in self.SILENT:
            self.names.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, limit", [("grpo", 51), ("dapo", 51), ("gspo", 56), ("cispo", 47), ("reinforce_pp_baseline", 49)]
)
def test_few_operators(name, limit):
    """Small batches cost their kernel launches: forward + backward with KL. Two more may come unasked."""
    torch.use_deterministic_algorithms(False)  # they fill allocations, one more operator each
    batch = floats(golden_batch(), lambda tensor: tensor.detach().float())
    new = batch.pop("logprobs").requires_grad_()
    with Launches() as launches:
        output = policy_loss(new, **batch, config=preset(name, kl_coef=0.04))
        output.loss.backward()
    assert len(launches.names) <= limit + 2, sorted(launches.names)
    assert len(launches.names) > limit // 2  # the mode still sees them
    with Launches() as measured:
        first = output.metrics
    assert len(measured.names) <= 27, sorted(measured.names)
    with Launches() as again:
        assert output.metrics is first
    assert not again.names


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_compiles_without_a_graph_break(level):
    batch, config = golden_batch(), LossConfig(ratio_level=level, kl_coef=0.04)
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
    assert all(config.paper and config.kl_coef == 0 and not config.warnings for config in PRESETS.values())
    assert (
        len({config.formula for config in PRESETS.values()}) == len(PRESETS) - 3
    )  # four are PPO's but for the KL and who counts
    clips = {name: (config.clip_low, config.clip_high) for name, config in PRESETS.items()}
    own = {"dapo": (0.2, 0.28), "cispo": (0.2, 5.0), "gmpo": (0.4, 0.4)}
    assert {name: clip for name, clip in clips.items() if clip != (0.2, 0.2)} == own | dict.fromkeys(
        ("gspo", "gspo_token"), (3e-4, 4e-4)
    )
    assert preset("dapo").formula == (
        "1/sum_i|o_i| sum_it [-min(rho A, clip(rho, 0.8, 1.28) A)], rho = exp(l - l_old)"
    )
    assert preset("grpo", ratio_level="sequence", dual_clip=3, kl_coef=0.04).formula == (
        "1/N sum_i 1/|o_i| sum_t [-min(min(rho, 3) A, clip(rho, 0.8, 1.2) A) + 0.04 rho k3(l, l_ref)], "
        "rho = exp(mean_t(l - l_old))"
    )
    assert preset("vespo").formula == (
        "1/sum_i|o_i| sum_it [-sg(exp(lambda + k log R - lambda R)) A l], R = exp(sum_t(l - l_old)), "
        "(k, lambda) = (2.0, 3.0) if A >= 0 else (3.0, 2.0)"
    )
    assert preset("reinforce", sampler_correction="token-mask", kl_coef=1, kl_gradient="plain").formula == (
        "1/sum_i|o_i| sum_it [w -A l + 1 k3(l, l_ref)]"
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
        (lambda: LossConfig(ratio_max=0.5), "ratio_max: got 0.5, expected None or >= 1"),
        (
            lambda: preset("cispo", clip_high=0.2),
            "clip_high: got 0.2, expected a bound >= 1 on the ratio itself",
        ),
        (
            lambda: LossConfig(sapo_temperatures=(1.0, 0.0)),
            "sapo_temperatures: got .*, expected two numbers > 0",
        ),
        (lambda: LossConfig(vespo_negative=(1.0,)), "vespo_negative: got .*, expected two numbers > 0"),
        (
            lambda: LossConfig(sampler_correction="token"),
            "sampler_correction: got 'token', nearest is 'token-",
        ),
        (lambda: LossConfig(sampler_min=1.5), r"sampler_min: got 1.5, expected a number in \[0, 1\]"),
        (lambda: LossConfig(sampler_max=0.5), "sampler_max: got 0.5, expected a number >= 1"),
        (
            lambda: preset("vespo", sampler_correction="sequence-mask"),
            "sampler_correction: got 'sequence-mask', expected one by token for 'vespo'",
        ),
        (lambda: LossConfig(off_policy_threshold=-1), "off_policy_threshold: got -1, expected None or >= 0"),
        (lambda: LossConfig(top_entropy=0), r"top_entropy: got 0, expected a number in \(0, 1\]"),
        (lambda: LossConfig(surrogate="gmpo"), "ratio_level: got 'token', expected 'geometric-mean' for"),
        (lambda: LossConfig(ratio_level="geometric-mean"), "ratio_level: got 'geometric-mean', expected"),
        (lambda: preset("dppo", ratio_level="sequence"), "ratio_level: got 'sequence', expected 'token' for"),
        (
            lambda: preset("gspo", ratio_level="token"),
            "ratio_level: got 'token', but 'sequence' is what makes",
        ),
        (lambda: LossConfig(kl_place="value"), "kl_place: got 'value'"),
        (lambda: LossConfig(kl_coef=math.inf), "kl_coef: got inf, expected a finite number"),
        (
            lambda: LossConfig(max_completion_length=0),
            "max_completion_length: got 0, expected None or an int",
        ),
        (lambda: LossConfig(max_completion_length=8.0), "max_completion_length: got 8.0"),
        (
            lambda: kl_penalty(torch.zeros(2), torch.zeros(2), "k3", gradient="corrected"),
            "ratio: got None",
        ),
        (lambda: kl_penalty(torch.zeros(2), torch.zeros(2), "k3", gradient="reverse"), "gradient: got 'rev"),
        (
            lambda: entropy_quantile(torch.zeros(2, 2), torch.ones(2, 3, dtype=torch.bool), LossConfig()),
            r"entropy: got shape \(2, 2\), expected \(2, 3\) as mask",
        ),
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
        ({"config": LossConfig(sampler_correction="token-mask")}, "sampler_logprobs: got shape None"),
        ({"config": LossConfig(top_entropy=0.5)}, "entropy: got shape None"),
        (
            {"config": LossConfig(top_entropy=0.5), "entropy": torch.zeros(4, 6), "denominator": 3},
            "entropy_threshold: got None beside a denominator",
        ),
        ({"config": LossConfig(aggregate="prompt-mean")}, "group_ids: got None, expected .*int64"),
        (
            {"config": LossConfig(aggregate="prompt-mean"), "group_ids": torch.zeros(4)},
            "group_ids: got .*float32",
        ),
        (
            {"config": LossConfig(aggregate="prompt-mean"), "denominator": torch.ones(6)},
            r"denominator: got shape \(6,\), expected \(4,\), one a row",
        ),
    ],
)
def test_bad_input(change, message):
    good = golden_batch() | {"config": LossConfig(kl_coef=0.04)}
    with pytest.raises(ValueError, match=message):
        policy_loss(**(good | change))


@pytest.mark.parametrize(
    "config, warning",
    [
        (LossConfig(kl_coef=0.1, kl_estimator="k1", kl_gradient="plain"), "k1-in-loss"),
        (preset("luspo", ratio_level="token"), "luspo-level"),
        (preset("sapo", dual_clip=3.0), "dual-clip-unused"),
        (preset("ppo", kl_coef=0.1), "kl-in-reward"),
    ],
)
def test_warnings_are_named_in_the_result(config, warning):
    output = policy_loss(**golden_batch(), config=config)
    assert [text.split(":")[0] for text in output.warnings] == [warning]
    assert policy_loss(**golden_batch(), config=LossConfig()).warnings == ()
    assert not LossConfig(kl_coef=0.1, kl_estimator="k1").warnings  # rho gives k1 its gradient
