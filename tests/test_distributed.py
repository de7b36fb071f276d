"""Ranks: how work is shared, and two processes that train as one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.grpo import GRPOConfig, RolloutBatch, distributed
from nanogrpo.grpo.distributed import Ranks, launched, seed_from
from nanogrpo.grpo.run import Run
from numpy_noise import numpy_uniform
from safetensors.torch import load_file
from tiny_run import CharTokenizer, adapters, environment, install, settings, tiny_trainer

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])]
)


@given(st.integers(0, 40), st.integers(1, 9))
def test_parts_cover_everything_evenly(count, world):
    parts = [Ranks(rank, world).part(count) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.data(), st.integers(1, 5))
def test_rows_are_whole_groups_in_order(data, world):
    sizes = data.draw(st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=4), min_size=1, max_size=9))
    lengths = [length for group in sizes for length in group]
    groups = torch.tensor([index for index, group in enumerate(sizes) for _ in group])
    total = sum(lengths)
    blank = torch.zeros(total)
    batch = RolloutBatch(
        blank.long(), torch.tensor([0, *lengths]).cumsum(0), blank.bool(), blank, *[torch.zeros(len(lengths))] * 2,
        groups, torch.zeros(len(lengths), dtype=torch.bool), torch.zeros(len(lengths), 1), torch.ones(1),
        torch.tensor(1.0),
    )  # fmt: skip
    shares = [Ranks(rank, world).rows(batch) for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(len(lengths)))
    owners = [{int(groups[row]) for row in share} for share in shares]
    assert sum(map(len, owners)) == len(sizes)  # no group on two ranks
    largest = max(sum(group) for group in sizes)
    assert all(sum(lengths[row] for row in share) <= total / world + largest for share in shares)


@given(st.integers(0, 2**62), st.integers(0, 1000), st.integers(0, 50), st.integers(0, 7), st.integers(0, 99))
def test_a_shifted_seed_draws_as_the_later_prompt(seed, first, prompt, member, position):
    shifted = seed_from(seed, first)
    assert -(2**63) <= shifted < 2**63
    assert numpy_uniform(shifted, prompt, member, position) == numpy_uniform(
        seed, prompt + first, member, position
    )
    assert seed_from(seed, 0) == seed


def test_alone_nothing_is_shared():
    ranks = Ranks()
    thing, weight = object(), torch.nn.Parameter(torch.ones(2))
    assert ranks.main and ranks.gather(thing) == [thing] and ranks.any(True) and not ranks.any(0)
    ranks.sum_gradients([weight])
    assert weight.grad is None
    with launched("cuda:3") as found:
        assert found == ranks


@given(st.lists(st.integers(1, 7), max_size=9))
def test_buckets_hold_every_parameter_in_order(sizes):
    parameters = [torch.empty(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "BUCKET", 5)
        buckets = list(distributed._buckets(parameters))
    assert all(a is b for a, b in zip(sum(buckets, []), parameters, strict=True))
    counts = [sum(parameter.numel() for parameter in bucket) for bucket in buckets]
    assert all(count <= 5 or len(bucket) == 1 for count, bucket in zip(counts, buckets, strict=True))
    # None could have taken in the first of the next.
    assert all(count + after[0].numel() > 5 for count, after in zip(counts, buckets[1:], strict=False))


def test_gradients_are_added_up_in_float32(monkeypatch):
    """As if of 257 equal ranks: whatever the dtype, a missing gradient, and one whose rows are not end to end."""
    totals = []
    monkeypatch.setattr(distributed, "BUCKET", 8)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda total: totals.append(total.mul_(257)))
    given = [torch.arange(6.0).view(3, 2).T, None, torch.randn(3, 4), torch.arange(4).bfloat16()]
    parameters = [torch.nn.Parameter(torch.zeros(2) if g is None else torch.zeros_like(g)) for g in given]
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    Ranks(0, 257).sum_gradients(parameters)
    assert [(total.dtype, total.numel()) for total in totals] == [(torch.float32, n) for n in (8, 12, 4)]
    for parameter, gradient in zip(parameters, given, strict=True):
        expected = torch.zeros(2) if gradient is None else (257 * gradient.float()).to(gradient.dtype)
        assert torch.equal(parameter.grad, expected) and parameter.grad.dtype == expected.dtype


def test_more_ranks_than_prompts():
    with pytest.raises(ValueError, match="prompts_per_step must be at least the 3 ranks, got 2"):
        with_ranks(Ranks(0, 3))


def test_bnpo_is_refused():
    with pytest.raises(ValueError, match="bnpo divides by its own micro-batches"):
        with_ranks(Ranks(0, 2), algorithm="bnpo")


def with_ranks(ranks, **overrides):
    alone = tiny_trainer(**overrides)
    return type(alone)(alone.config, alone.policy, rewards=alone.rewards, ranks=ranks)


def test_a_rank_samples_its_own_prompts_as_one_rank_does():
    whole, _ = tiny_trainer(prompts_per_step=3).collect(1)
    parts = []
    for rank in range(2):
        trainer = with_ranks(Ranks(rank, 2), prompts_per_step=3)
        object.__setattr__(trainer.ranks, "gather", lambda thing: [thing])
        parts.append(trainer._rollout(1, 0))
    joined = RolloutBatch.cat(parts)
    assert joined.sequences() == whole.sequences()
    assert torch.equal(joined.rewards, whole.rewards) and torch.equal(joined.group_ids, whole.group_ids)
    torch.testing.assert_close(joined.sampler_logprobs, whole.sampler_logprobs, atol=1e-5, rtol=0)


def torchrun(*arguments, timeout=300, **variables):
    script = str(Path(__file__).parent / "two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    return subprocess.run(
        [*command, *arguments], env=environment() | variables, capture_output=True, text=True, timeout=timeout
    )


def flags(**overrides):
    pairs = settings(rewards="odd", dtype="float32", prompts_per_step=4, **overrides).items()
    return [part for name, value in pairs for part in ("--" + name.replace("_", "-"), str(value))]


def same(a, b):
    """Equal to float32 rounding: counts exactly; a loss, the mean of terms of about one that nearly cancel, and what
    is itself rounding, the sampler's from the trainer, to 64 units of rounding of one."""
    for ours, theirs in zip(a, b, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not name.startswith(("seconds", "memory")):
                floor = 64 * 2.0**-23 if name.startswith(("loss", "sampler")) else 1e-6
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=floor), name


@on_each_device
@pytest.mark.parametrize("algorithm, optimizer", [("dapo", "adamw"), ("ppo", "adamw_offload")])
def test_two_ranks_train_as_one(tmp_path, monkeypatch, algorithm, optimizer, device):
    install(monkeypatch.setattr, monkeypatch.setitem)
    options = {
        "algorithm": algorithm,
        "optimizer": optimizer,
        "kl_coef": 0.1,
        "num_iterations": 2,
        "device": device,
    }
    shared = settings(rewards="odd", dtype="float32", prompts_per_step=4, **options)
    alone = Run.create(GRPOConfig(**shared, out=str(tmp_path / "alone")), lambda line: None)
    result = alone.train()
    done = torchrun("train", *flags(out=tmp_path / "two", **options), NANOGRPO_TEST_ADAPTERS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    rows = [line for line in done.stdout.splitlines() if line.count("|") == 5]
    assert len(rows) == 5, "one rank alone speaks"
    history = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    same(history, alone.history())
    for name, value in adapters(alone.trainer).items():
        # Adam's step of an entry whose gradient is all rounding has a sign of its own: the whole is compared.
        value = value.cpu()
        assert (first[name] - value).norm() <= 1e-3 * value.norm(), name
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["before"] == result["before"] and two["after"]["count"] == 3
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "checkpoints", "before.json", "result.json", "adapter", "curves.png"
    }  # fmt: skip


def die(out, device, place):
    """A run of two ranks of which one ends in step 3: it ends with an error and leaves the steps before."""
    start = time.monotonic()
    done = torchrun("train", *flags(out=out, device=device), NANOGRPO_TEST_DIES=f"1 {place}")
    # Within NCCL the other can only be killed, for which torchrun takes its time.
    assert done.returncode != 0 and time.monotonic() - start < (60 if device == "cpu" else 150)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-000001", "step-000002"]


@on_each_device
def test_a_rank_that_dies_while_gradients_are_added_up_ends_the_run(tmp_path, device):
    die(tmp_path / "run", device, "sum")


@on_each_device
def test_a_rank_that_dies_ends_the_run_and_two_go_on(tmp_path, device):
    out = tmp_path / "run"
    die(out, device, "step")
    done = torchrun("train", "--resume", str(out), NANOGRPO_TEST_ADAPTERS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4


def test_uniforms_differ_between_prompts():
    draws = np.concatenate([numpy_uniform(seed_from(5, first), 0, 0, np.arange(50)) for first in (0, 1)])
    assert len(set(draws.tolist())) == 100 and CharTokenizer.eos_token_ids == (0,)
