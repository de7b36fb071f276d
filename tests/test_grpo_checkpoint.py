"""Checkpoints of a run: whole, named when damaged, and resumed bit for bit."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from nanogrpo.grpo.checkpoint import (
    choose_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from nanogrpo.rollout import LoraConfig
from tiny_run import adapters, environment, tiny_trainer


def save(trainer, folder, **options):
    save_checkpoint(folder, trainer.step_count, trainer.named_parameters(), trainer.optimizer, **options)


def load(trainer, path):
    trainer.step_count = load_checkpoint(path, trainer.named_parameters(), trainer.optimizer)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def saved(tmp_path):
    trainer = tiny_trainer()
    trainer.step()
    save(trainer, tmp_path)
    return trainer, list_checkpoints(tmp_path)[-1]


def test_round_trip(saved):
    trainer, path = saved
    fresh = tiny_trainer()
    load(fresh, path)
    assert fresh.step_count == 1
    assert_same(adapters(trainer), adapters(fresh))
    for ours, theirs in zip(
        trainer.named_parameters().values(), fresh.named_parameters().values(), strict=True
    ):
        a, b = trainer.optimizer.state[ours], fresh.optimizer.state[theirs]
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_loaded_step_counters_are_separate(saved):
    """One tensor shared by all parameters would be counted up once a parameter."""
    fresh = tiny_trainer()
    load(fresh, saved[1])
    fresh.step()
    assert {int(fresh.optimizer.state[p]["step"]) for p in fresh.named_parameters().values()} == {2}


@pytest.mark.parametrize("settings", [{"kl_coef": 0.0}, {"kl_coef": 0.1}, {"algorithm": "ppo"}], ids=str)
def test_resuming_is_bit_exact(tmp_path, settings):
    straight = tiny_trainer(**settings)
    metrics = [straight.step() for _ in range(4)]
    stopped = tiny_trainer(**settings)
    for _ in range(2):
        stopped.step()
    save(stopped, tmp_path)
    resumed = tiny_trainer(**settings)
    load(resumed, list_checkpoints(tmp_path)[-1])
    again = [resumed.step() for _ in range(2)]
    assert_same(adapters(straight), adapters(resumed))
    for a, b in zip(metrics[2:], again, strict=True):
        assert {k: v for k, v in a.items() if "seconds" not in k} == {
            k: v for k, v in b.items() if "seconds" not in k
        }
    pairs = zip(adapters(straight).values(), adapters(stopped).values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_before_the_first_update(tmp_path):
    trainer = tiny_trainer()
    save(trainer, tmp_path)
    fresh = tiny_trainer()
    load(fresh, list_checkpoints(tmp_path)[-1])
    assert fresh.step_count == 0 and not fresh.optimizer.state


def test_the_last_two_are_kept_in_order(tmp_path):
    trainer = tiny_trainer()
    for step in (8, 9, 10, 11):
        trainer.step_count = step
        save(trainer, tmp_path)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000010", "step-000011"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000011"]


def test_an_unfinished_checkpoint_is_none(saved, tmp_path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "state.safetensors").write_bytes(b"half")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001"]
    save(saved[0], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    load(tiny_trainer(), tmp_path / "step-000001")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_tensors_are_named(saved, keep):
    file = saved[1] / "state.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="checkpoint .*step-000001 is damaged"):
        load(tiny_trainer(), saved[1])


@pytest.mark.parametrize("text", [b"", b"{", b"{}", b"[]", b"\xff\xfe"])
def test_damaged_state_is_named(saved, text):
    (saved[1] / "state.json").write_bytes(text)
    with pytest.raises(ValueError, match="checkpoint .*step-000001 is damaged"):
        load(tiny_trainer(), saved[1])


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_missing_file_is_named(saved, name):
    (saved[1] / name).unlink()
    with pytest.raises(ValueError, match=f"step-000001 is damaged.*{name}"):
        load(tiny_trainer(), saved[1])


def test_eight_bit_moments(tmp_path):
    trainer = tiny_trainer(optimizer="adamw8bit")
    trainer.policy.add_adapters(LoraConfig(r=128, alpha=4))  # 4,096 values and more, some of the tensors
    trainer = type(trainer)(trainer.config, trainer.policy, rewards=trainer.rewards)
    trainer.step()
    save(trainer, tmp_path)
    fresh = tiny_trainer(optimizer="adamw8bit")
    fresh.policy.add_adapters(LoraConfig(r=128, alpha=4))
    fresh = type(fresh)(fresh.config, fresh.policy, rewards=fresh.rewards)
    load(fresh, list_checkpoints(tmp_path)[-1])
    kinds = set()
    for ours, theirs in zip(
        trainer.named_parameters().values(), fresh.named_parameters().values(), strict=True
    ):
        a, b = trainer.optimizer.state[ours], fresh.optimizer.state[theirs]
        assert a.keys() == b.keys() and a["step"] == b["step"] == 1
        assert all(torch.equal(a[k], b[k]) for k in a if k != "step")
        kinds.add(a["state1"].dtype)
    assert kinds == {torch.uint8, torch.float32}
    trainer.step()
    fresh.step()
    assert_same(adapters(trainer), adapters(fresh))


def test_another_rank_is_refused(saved):
    other = tiny_trainer()
    other.policy.add_adapters(LoraConfig(r=3, alpha=4))
    with pytest.raises(ValueError, match=r"step-000001: .* has shape \(2, 32\), expected \(3, 32\)"):
        load(other, saved[1])


def test_another_algorithm_is_refused_before_anything_changes(saved):
    other = tiny_trainer(algorithm="ppo")
    before = adapters(other)
    with pytest.raises(ValueError, match=r"step-000001 does not fit this run.*value_head.weight"):
        load(other, saved[1])
    assert_same(before, adapters(other))


def drop(tensors, prefix):
    for name in [name for name in tensors if name.startswith(prefix)]:
        del tensors[name]


def narrow(tensors, prefix):
    name = next(name for name in tensors if name.startswith(prefix))
    tensors[name] = tensors[name][:1].clone()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: drop(t, "exp_avg."), "exp_avg.* has shape None"),
        (lambda t: narrow(t, "exp_avg_sq."), r"exp_avg_sq.* has shape \(1, .*expected \(2,"),
        (lambda t: drop(t, "optimizer_step"), "it has no optimizer_step"),
    ],
)
def test_tampered_moments_are_refused_before_anything_changes(saved, change, message):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved[1] / "state.safetensors")
    change(tensors)
    save_file(tensors, saved[1] / "state.safetensors")
    digest = hashlib.sha256((saved[1] / "state.safetensors").read_bytes()).hexdigest()
    (saved[1] / "state.json").write_text(json.dumps({"step": 1, "sha256": digest}))
    fresh = tiny_trainer()
    before = adapters(fresh)
    with pytest.raises(ValueError, match=f"step-000001.*{message}"):
        load(fresh, saved[1])
    assert_same(before, adapters(fresh))


def test_no_pickle(saved):
    """A safetensors file is a length, JSON and raw numbers; the other file is JSON."""
    assert sorted(p.name for p in saved[1].iterdir()) == ["state.json", "state.safetensors"]
    data = (saved[1] / "state.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert max(t["data_offsets"][1] for t in header.values() if "data_offsets" in t) == len(data) - 8 - length
    digest = hashlib.sha256(data).hexdigest()
    assert json.loads((saved[1] / "state.json").read_text()) == {"step": 1, "sha256": digest}


@pytest.mark.parametrize("where", [0.3, 0.6, 0.999])
def test_one_changed_bit_is_seen(saved, where):
    """In the tensors' bytes, which the file's own format does not check."""
    file = saved[1] / "state.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int(where * (len(data) - start))] ^= 16
    file.write_bytes(data)
    fresh = tiny_trainer()
    before = adapters(fresh)
    with pytest.raises(ValueError, match="step-000001 is damaged: state.safetensors is not what was written"):
        load(fresh, saved[1])
    assert_same(before, adapters(fresh))


def test_a_damaged_checkpoint_names_the_one_before_it(saved, tmp_path):
    trainer, first = saved
    trainer.step()
    save(trainer, tmp_path)
    last = choose_checkpoint(tmp_path)
    (last / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="step-000002 is damaged.*the one before it.*--resume-step 1$"):
        load(tiny_trainer(), last)
    assert choose_checkpoint(tmp_path, 1) == first
    with pytest.raises(ValueError, match="no checkpoint of step 7, only step-000001, step-000002"):
        choose_checkpoint(tmp_path, 7)


# Files of this process may not grow beyond what it says: what a full disk does, without one.
DISK_FULL = """
import resource, sys
import tiny_run
from nanogrpo.grpo.checkpoint import save_checkpoint
trainer = tiny_run.tiny_trainer()
def save():
    save_checkpoint(sys.argv[1], trainer.step_count, trainer.named_parameters(), trainer.optimizer)
trainer.step()
save()
trainer.step()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    save()
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("space", [0, 1000, 20000])
def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, space):
    done = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(tmp_path), str(space)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "step-000002 could not be written" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    load(tiny_trainer(), tmp_path / "step-000001")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="step-000000 could not be written"):
        save(tiny_trainer(), tmp_path / "checkpoints")
