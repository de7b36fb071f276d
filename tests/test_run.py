"""A run in its folder: its files, and stopping, killing and resuming it."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import slow_rewards
import torch
from nanogrpo.grpo import GRPOConfig, RolloutBatch
from nanogrpo.grpo.checkpoint import list_checkpoints
from nanogrpo.grpo.report import COLUMNS, table_header
from nanogrpo.grpo.rewards import RewardError, WeightedReward
from nanogrpo.grpo.run import Run
from safetensors.torch import load_file
from tiny_run import FIELDS, adapters, environment, install, odd, settings

# Ends its own process with SIGKILL in the middle of step 3, while it scores completions.
KILLED = """
import os, signal, sys
import pytest
import tiny_run
from nanogrpo.grpo import GRPOConfig
from nanogrpo.grpo.run import Run

calls = 0

def odd(completion, example):
    global calls
    calls += 1
    if calls == 2 * 8 + 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(completion, example)

original, tiny_run.odd = tiny_run.odd, odd
patch = pytest.MonkeyPatch()
tiny_run.install(patch.setattr, patch.setitem)
Run.create(GRPOConfig(**tiny_run.settings(rewards="odd", out=sys.argv[1]))).train()
"""

# Starts the run 20 times in a child of its own and kills each after a random while; then lets it come to its end.
KILLED_TWENTY_TIMES = """
import os, random, signal, sys, time
from pathlib import Path
import pytest, torch
import tiny_run
from nanogrpo.grpo import GRPOConfig
from nanogrpo.grpo.run import Run

torch.set_num_threads(1)  # a pool of threads would not survive the fork
folder, settings = Path(sys.argv[1]), eval(sys.argv[2])
patch = pytest.MonkeyPatch()
tiny_run.install(patch.setattr, patch.setitem)

def train():
    new = not (folder / "config.json").exists()
    quiet = lambda line: None
    config = GRPOConfig(**settings, out=str(folder))
    (Run.create(config, quiet) if new else Run.resume(folder, quiet)).train()

rng, killed = random.Random(int(sys.argv[3])), 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        train()
        os._exit(0)
    time.sleep(rng.uniform(0.0, 0.4))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
train()
print(killed)
"""


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    install(monkeypatch.setattr, monkeypatch.setitem)


class Screen:
    """Collects what a run says; presses Ctrl-C after the row of ``stop_at``."""

    def __init__(self, stop_at=None):
        self.lines, self.stop_at = [], stop_at

    def __call__(self, line):
        self.lines.append(line)
        if self.stop_at and line.strip().startswith(f"{self.stop_at} |"):
            self.stop_at = None
            os.kill(os.getpid(), signal.SIGINT)


def create(out, screen=None, **overrides):
    return Run.create(GRPOConfig(**settings(rewards="odd", out=str(out), **overrides)), screen or Screen())


def timeless(metrics):
    return [{k: v for k, v in m.items() if "seconds" not in k} for m in metrics]


def assert_same_adapters(a, b):
    a, b = adapters(a.trainer), adapters(b.trainer)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def finished(tmp_path):
    screen = Screen()
    run = create(tmp_path / "run", screen)
    return run, screen.lines, run.train()


def test_files(finished):
    run, _, result = finished
    names = {p.name for p in run.folder.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "checkpoints", "before.json", "result.json", "adapter", "curves.png"
    }  # fmt: skip
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert all(set(m) == FIELDS | {"seconds"} for m in metrics)
    assert (run.folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in list_checkpoints(run.folder / "checkpoints")] == ["step-000003", "step-000004"]
    assert GRPOConfig.load(run.folder / "config.json") == run.config
    assert json.loads((run.folder / "result.json").read_text()) == result
    assert result["before"] == json.loads((run.folder / "before.json").read_text())
    assert result["before"]["count"] == result["after"]["count"] == 3
    assert result["peak_memory_bytes"] > 10**6 and result["tokens_per_second"] > 0


def test_saved_batches_are_what_was_learned_from(tmp_path):
    run = create(tmp_path / "run", save_batches=True)
    run.train()
    files = sorted((run.folder / "batches").iterdir())
    assert [f.name for f in files] == [f"step-{n:06d}.safetensors" for n in (1, 2, 3, 4)]
    for file, metrics in zip(files, run.history(), strict=True):
        batch = RolloutBatch.load(file)
        assert batch.rewards.mean().item() == pytest.approx(metrics["reward"])
        assert batch.temperature == 1.0 and batch.advantages.any()


def test_adapter_is_the_trained_one(finished):
    run, _, _ = finished
    written = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    live = adapters(run.trainer)
    assert written.keys() == live.keys()
    assert all(torch.equal(written[name], live[name]) for name in live)
    description = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert (description["peft_type"], description["r"], description["lora_alpha"]) == ("LORA", 2, 4)


def test_table(finished):
    _, lines, _ = finished
    start = lines.index(table_header())
    assert tuple(c.strip() for c in lines[start].split("|")) == COLUMNS
    rows = lines[start + 1 : start + 5]
    assert [row.split("|")[0].strip() for row in rows] == ["1", "2", "3", "4"]
    assert len({len(row) for row in [lines[start], *rows]}) == 1
    assert any(line.startswith("held-out accuracy before:") for line in lines[:start])
    assert any(line.startswith("held-out accuracy after:") for line in lines[start:])
    assert any(line.startswith("held-out format after:") for line in lines[start:])


def test_a_folder_with_another_run_is_refused(finished):
    run, _, _ = finished
    before = {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="holds another run; continue it with --resume .*, or .* --out"):
        create(run.folder)
    assert {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()} == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder"):
        create(tmp_path)
    with pytest.raises(ValueError, match="is not an empty folder"):
        create(tmp_path / "notes.txt")


def test_an_empty_folder_is_taken(tmp_path):
    assert create(tmp_path).folder == tmp_path


def test_a_killed_run_resumes_bit_for_bit(finished, tmp_path):
    straight, _, result = finished
    folder = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "result.json").exists()
    run = Run.resume(folder, Screen())
    assert run.trainer.step_count == 2
    again = run.train()
    assert_same_adapters(straight, run)
    assert timeless(run.history()) == timeless(straight.history())
    assert (again["before"], again["after"]) == (result["before"], result["after"])


def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    long = settings(rewards="odd", steps=60, save_batches=True)
    straight = Run.create(GRPOConfig(**long, out=str(tmp_path / "straight")), Screen())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed processes: libraries split their sums by it
    straight.train()
    torch.set_num_threads(threads)
    seed = random.SystemRandom().randrange(10**6)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_TWENTY_TIMES, str(tmp_path / "killed"), repr(long), str(seed)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert int(done.stdout) >= 3, "the run was over before it could be killed"
    killed = Run.resume(tmp_path / "killed", Screen())
    assert_same_adapters(straight, killed)
    assert timeless(killed.history()) == timeless(straight.history())
    for file in (straight.folder / "batches").iterdir():
        assert (killed.folder / "batches" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_offload"])
def test_a_run_killed_on_the_gpu_resumes_bit_for_bit(optimizer, tmp_path):
    flags = "--random-weights tiny-qwen2 --quantize nf4 --steps 12 --max-completion-length 40 --task larger"
    flags += f" --optimizer {optimizer}"
    command = [sys.executable, "-m", "nanogrpo.grpo", "train"]
    start = lambda *words: subprocess.Popen([*command, *words], env=environment(), stdout=subprocess.DEVNULL)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start(*flags.split(), "--out", str(straight)).wait(timeout=240) == 0
    running = start(*flags.split(), "--out", str(killed))
    metrics, deadline = killed / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert start("--resume", str(killed)).wait(timeout=240) == 0
    timeless_of = lambda run: timeless(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    without_memory = lambda history: [{k: v for k, v in m.items() if "memory" not in k} for m in history]
    assert without_memory(timeless_of(killed)) == without_memory(timeless_of(straight))
    adapters_of = lambda run: load_file(run / "adapter" / "adapter_model.safetensors")
    expected, got = adapters_of(straight), adapters_of(killed)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def test_ctrl_c_saves_and_says_how_to_go_on(finished, tmp_path):
    straight, _, _ = finished
    screen, handler = Screen(stop_at=2), signal.getsignal(signal.SIGINT)
    run = create(tmp_path / "stopped", screen)
    assert run.train() is None
    assert signal.getsignal(signal.SIGINT) is handler
    assert run.trainer.step_count == 2
    assert screen.lines[-1].endswith(f"nanogrpo train --resume {run.folder}")
    assert (run.folder / "adapter" / "adapter_model.safetensors").exists()
    assert (run.folder / "curves.png").exists() and not (run.folder / "result.json").exists()
    resumed = Run.resume(run.folder, Screen())
    assert resumed.train() is not None
    assert_same_adapters(straight, resumed)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    run = create(tmp_path / "run")
    run.stop_requested = True
    with pytest.raises(KeyboardInterrupt):
        run._request_stop(signal.SIGINT, None)


def test_a_line_cut_short_is_dropped(finished):
    run, _, _ = finished
    path = run.folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 5, "lo')
    assert [m["step"] for m in run.history()] == [1, 2, 3, 4]
    Run.resume(run.folder, Screen())
    assert path.read_text() == whole


@pytest.mark.parametrize("cut", [None, 20])
def test_killed_between_metrics_and_checkpoint(finished, tmp_path, cut):
    """The line of a step without its checkpoint, whole or cut, is written anew and leaves neither gap nor double."""
    straight, _, _ = finished
    run = create(tmp_path / "stopped", Screen(stop_at=2))
    run.train()
    line = json.dumps({"step": 3, "loss": -1.0, "reward": 0.0}) + "\n"
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write(line[:cut])
    resumed = Run.resume(run.folder, Screen())
    resumed.train()
    assert timeless(resumed.history()) == timeless(straight.history())


def test_metrics_are_written_before_the_checkpoint(tmp_path, monkeypatch):
    def killed(*args, **options):
        raise SystemExit

    monkeypatch.setattr("nanogrpo.grpo.run.save_checkpoint", killed)
    run = create(tmp_path / "run")
    with pytest.raises(SystemExit):
        run.train()
    assert [m["step"] for m in run.history()] == [1]
    assert Run.resume(run.folder, Screen()).history() == []


def test_three_skipped_steps_end_the_run_with_their_rollouts(tmp_path):
    screen = Screen()
    run = create(tmp_path / "run", screen, steps=6)
    original = run.trainer.objective.micro_loss

    def broken(*args, **kwargs):
        out = original(*args, **kwargs)
        if run.trainer.step_count in (0, 2, 3, 4):
            out.loss = out.loss * math.nan
        return out

    run.trainer.objective.micro_loss = broken
    with pytest.raises(ValueError, match="3 steps in a row had a loss or gradient that is not finite"):
        run.train()
    assert run.trainer.step_count == 5
    assert sum("left the adapters as they were" in line for line in screen.lines) == 4
    assert len(RolloutBatch.load(run.folder / "batches" / "step-000005.safetensors")) == 8
    assert [m["skipped"] for m in run.history()] == [1, 0, 1, 1, 1]


def test_a_smaller_token_budget_is_said(tmp_path):
    screen = Screen()
    run = create(tmp_path / "run", screen, steps=2)
    run.trainer.objective.token_budget = 512
    run.train()
    assert screen.lines.count("out of memory: going on with a token budget of 512") == 1


def test_a_damaged_checkpoint_is_named(finished):
    run, _, _ = finished
    state = list_checkpoints(run.folder / "checkpoints")[-1] / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    with pytest.raises(ValueError, match="checkpoint .*step-000004 is damaged"):
        Run.resume(run.folder, Screen())


def test_damaged_metrics_are_named(finished):
    run, _, _ = finished
    (run.folder / "metrics.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="metrics.jsonl is damaged"):
        Run.resume(run.folder, Screen())


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume: it has no config.json"):
        Run.resume(tmp_path, Screen())


def test_a_lengthened_run_is_the_longer_one(tmp_path):
    """Up to where it stood the two have the same steps; the learning rate of those after is the longer schedule's."""
    flat = {
        "min_lr_ratio": 1.0
    }  # without a decay the schedule of the first steps does not depend on the length
    long = create(tmp_path / "long", steps=5, **flat)
    long.train()
    create(tmp_path / "short", steps=3, **flat).train()
    assert (tmp_path / "short" / "result.json").exists()
    resumed = Run.resume(tmp_path / "short", Screen(), steps=5)
    resumed.train()
    assert_same_adapters(long, resumed)
    assert timeless(resumed.history()) == timeless(long.history())
    assert GRPOConfig.load(tmp_path / "short" / "config.json").steps == 5


def test_resuming_from_an_older_checkpoint(finished, tmp_path):
    straight, _, _ = finished
    run = create(tmp_path / "other", keep_checkpoints=3)
    run.train()
    checkpoints = run.folder / "checkpoints"
    assert [p.name for p in list_checkpoints(checkpoints)] == ["step-000002", "step-000003", "step-000004"]
    (checkpoints / "step-000004" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="step-000004 is damaged.*--resume-step 3$"):
        Run.resume(run.folder, Screen())
    assert len(run.history()) == 4  # refused, nothing touched
    with pytest.raises(
        ValueError, match="no checkpoint of step 1, only step-000002, step-000003, step-000004"
    ):
        Run.resume(run.folder, Screen(), from_step=1)
    resumed = Run.resume(run.folder, Screen(), from_step=2)
    assert [p.name for p in list_checkpoints(checkpoints)] == ["step-000002"]
    assert [m["step"] for m in resumed.history()] == [1, 2]
    resumed.train()
    assert_same_adapters(straight, resumed)


def test_fewer_checkpoints(finished, tmp_path):
    """Only every third step is saved, and the last; a kill in between repeats what was lost."""
    straight, _, _ = finished
    run = create(tmp_path / "other", save_every=3)
    run.train()
    names = [p.name for p in list_checkpoints(run.folder / "checkpoints")]
    assert names == ["step-000003", "step-000004"]
    resumed = Run.resume(run.folder, Screen(), from_step=3)
    assert [m["step"] for m in resumed.history()] == [1, 2, 3]
    resumed.train()
    assert_same_adapters(straight, resumed)
    stopped = create(tmp_path / "stopped", Screen(stop_at=2), save_every=3)
    stopped.train()
    assert [p.name for p in list_checkpoints(stopped.folder / "checkpoints")] == ["step-000002"]


def test_a_reward_that_raises_loses_nothing(tmp_path, monkeypatch):
    run = create(tmp_path / "run", save_every=10)

    def fragile(completion, example):
        if run.trainer.step_count == 2:
            raise RuntimeError("no answer")
        return odd(completion, example)

    run.trainer.rewards = [WeightedReward(fragile, 1.0)]
    with pytest.raises(RewardError, match=r"fragile raised .*no answer.* on completion .*--resume .*run$"):
        run.train()
    assert [p.name for p in list_checkpoints(run.folder / "checkpoints")] == ["step-000002"]
    assert [m["step"] for m in run.history()] == [1, 2]
    assert Run.resume(run.folder, Screen()).train() is not None


def test_rewards_in_processes_change_nothing(finished, tmp_path):
    straight, _, _ = finished
    run = create(tmp_path / "other", reward_processes=2)
    run.trainer.rewards = [WeightedReward(slow_rewards.odd, 1.0)]
    run.train()
    assert_same_adapters(straight, run)
    assert run.trainer.reward_processes.workers == []


# The disk is full from step 2 on: files of this process may not grow beyond a few bytes.
DISK_FULL = """
import resource, sys
import pytest
import tiny_run
from nanogrpo.grpo import GRPOConfig
from nanogrpo.grpo.run import Run

def say(line):
    if line.strip().startswith("2 |"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))

patch = pytest.MonkeyPatch()
tiny_run.install(patch.setattr, patch.setitem)
try:
    Run.create(GRPOConfig(**tiny_run.settings(rewards="odd", out=sys.argv[1])), say).train()
except OSError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    "space, named", [(1, "step 3 could not be written"), (5000, "step-000003 could not be")]
)
def test_a_full_disk_is_named_and_nothing_is_lost(finished, tmp_path, space, named):
    straight, _, _ = finished
    folder = tmp_path / "full"
    command = [sys.executable, "-c", DISK_FULL, str(folder), str(space)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and named in done.stderr, done.stderr
    assert f"nanogrpo train --resume {folder}" in done.stderr
    run = Run.resume(folder, Screen())
    assert run.trainer.step_count == 2
    run.train()
    assert_same_adapters(straight, run)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        create(tmp_path / "file" / "run")


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard needs the package: pip install tensorboard"):
        create(tmp_path / "run", tensorboard=True).train()


def test_tensorboard_gets_every_metric(tmp_path, monkeypatch):
    class Writer:
        written, closed = [], 0

        def __init__(self, folder, purge_step):
            self.written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            self.written.append((name, value, step))

        def close(self):
            Writer.closed += 1

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = create(tmp_path / "run", tensorboard=True)
    run.train()
    assert Writer.written[0] == (str(run.folder / "tensorboard"), 1) and Writer.closed == 1
    expected = [(name, value, m["step"]) for m in run.history() for name, value in m.items()]
    assert Writer.written[1:] == expected


def test_tensorboard_files(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = create(tmp_path / "run", tensorboard=True)
    run.train()
    events = loader.EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    rewards = [event.value for event in events.Scalars("reward")]
    assert rewards == pytest.approx([m["reward"] for m in run.history()])
