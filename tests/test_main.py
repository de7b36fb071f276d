"""The command line: its flags, its output, and errors of one line."""

import dataclasses
import json
import struct
import subprocess

import pytest
import torch
from nanogrpo.grpo import GRPOConfig
from nanogrpo.grpo.__main__ import main
from nanogrpo.grpo.rewards import REWARDS
from nanogrpo.rollout import Policy
from safetensors.torch import load_file
from tiny_run import install, odd, settings, tiny_policy


@pytest.fixture
def tiny(monkeypatch):
    install(monkeypatch.setattr, monkeypatch.setitem)
    monkeypatch.setattr(Policy, "load", staticmethod(lambda *args, **options: tiny_policy()))


def flags(**overrides):
    pairs = settings(rewards="odd", **overrides).items()
    return [part for name, value in pairs for part in ("--" + name.replace("_", "-"), str(value))]


def refused(capsys, *arguments):
    """The one line on stderr of a command that ends with code 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nanogrpo: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_help_mentions_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(GRPOConfig):
        flag = "--" + field.name.replace("_", "-")
        assert f"{flag} " in text or f"{flag}," in text, flag
        assert " ".join(field.metadata["help"].split()) in text, flag
    assert "--resume" in text and "--no-share-prefix" in text


def test_flags_are_typed(monkeypatch):
    seen = []

    class Recorder:
        @staticmethod
        def create(config, **options):
            seen.append(config)
            return Recorder

        @staticmethod
        def train():
            pass

    monkeypatch.setattr("nanogrpo.grpo.run.Run", Recorder)
    command = "train --lr 1e-3 --steps 7 --no-share-prefix --vram-limit 2 --quantize nf4 --out here"
    assert main(command.split()) == 0
    assert seen == [
        GRPOConfig(lr=1e-3, steps=7, share_prefix=False, vram_limit=2.0, quantize="nf4", out="here")
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "largr"], "unknown task 'largr'; nearest is 'larger'"),
        (["--algorithm", "gropo"], "nearest is 'grpo'"),
        (["--rewards", "corect"], "unknown reward 'corect'; nearest is 'correct'"),
        (["--group-size", "1"], "group_size must be at least 2, got 1"),
        (["--lr", "0"], "lr must be greater than 0"),
        (["--device", "gpu"], "device must be cpu or cuda, got 'gpu'"),
        (["--vram-limit", "1", "--device", "cpu"], "vram_limit needs a CUDA device"),
        (["--random-weights", "phi-5"], "unknown shape 'phi-5'; nearest is 'phi-4'"),
        (["--random-weights", "phi-4", "--model", "x/y"], "model and random_weights exclude each other"),
        (["--model", "./no-such-model"], "'./no-such-model' does not exist"),
        (["--model", "no-such.gguf"], "'no-such.gguf' does not exist"),
        (["--device", "cuda:x"], "device must be cpu or cuda, got 'cuda:x'"),
        (["--min-lr-ratio", "5"], "min_lr_ratio must be from 0 to 1, got 5.0"),
    ],
)
def test_train_errors(capsys, tmp_path, arguments, message):
    assert message in refused(capsys, "train", "--out", str(tmp_path / "run"), *arguments)


@pytest.mark.parametrize(
    "setting, message",
    [
        (["--token-budget", "0"], "token_budget must be at least 1, got 0"),
        (["--max-completion-length", "5000"], "exceeds the model's context"),
        (["--kv-memory", "1e-7"], "kv_memory of 107 bytes holds 0 blocks"),
        (["--lora-r", "129"], "LoRA r must be an integer from 1 to 128, got 129"),
        (["--held-out", "9999999"], "cannot hold out 9999999"),
    ],
)
def test_a_run_that_is_refused_leaves_no_folder(capsys, tmp_path, setting, message):
    out = tmp_path / "run"
    shape = [
        "--random-weights",
        "tiny-llama",
        "--device",
        "cpu",
        "--group-size",
        "2",
        "--prompts-per-step",
        "1",
    ]
    assert message in refused(capsys, "train", *shape, "--out", str(out), *setting)
    assert not out.exists()


@pytest.mark.parametrize("keep", [0, 3, 12, 24, 40])
def test_a_truncated_gguf_file_is_named(capsys, tmp_path, keep):
    key = b"general.architecture"
    header = b"GGUF" + struct.pack("<IQQ", 3, 5, 9) + struct.pack("<Q", len(key)) + key
    path = tmp_path / "cut.gguf"
    path.write_bytes(header[:keep])
    assert "cut.gguf" in refused(capsys, "train", "--model", str(path), "--out", str(tmp_path / "run"))


@pytest.mark.parametrize("flag", ["--steps", "--quantise", "--nonsense"])
def test_flags_that_do_not_parse(capsys, flag):
    with pytest.raises(SystemExit) as caught:
        main(["train", flag, "x"])
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_train_and_resume(tiny, capsys, tmp_path):
    out = str(tmp_path / "run")
    assert main(["train", *flags(out=out)]) == 0
    printed = capsys.readouterr()
    assert "held-out accuracy after:" in printed.out and printed.err == ""
    assert "holds another run" in refused(capsys, "train", *flags(out=out))
    message = refused(capsys, "train", "--resume", out, "--lr", "0.5")
    assert "--resume takes all settings but --steps from the run; drop --lr" in message
    assert main(["train", "--resume", out]) == 0
    assert "a run of 4 steps can be lengthened, not cut to 3" in refused(
        capsys, "train", "--resume", out, "--steps", "3"
    )
    capsys.readouterr()
    assert main(["train", "--resume", out, "--steps", "5", "--resume-step", "3"]) == 0
    rows = [line.split("|")[0].strip() for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert rows == ["Step", "4", "5"]
    picture = tmp_path / "curves.png"
    assert main(["curves", out, out, "--out", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "has no steps to draw yet" in refused(capsys, "curves", out, "--out", str(picture))
    assert "holds no run" in refused(capsys, "curves", str(tmp_path / "none"), "--out", str(picture))
    assert "--resume-step goes with --resume" in refused(capsys, "train", "--resume-step", "3")


def test_random_weights_run_unevaluated(capsys, tmp_path):
    out = tmp_path / "run"
    small = ["--steps", "2", "--group-size", "2", "--prompts-per-step", "1", "--max-completion-length", "4"]
    shape = ["--random-weights", "tiny-llama", "--quantize", "nf4", "--checkpoint-layers", "--device", "cpu"]
    assert main(["train", *small, *shape, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "tiny-llama with random weights" in printed.out and "held-out" not in printed.out
    assert printed.err == ""
    assert main(["train", "--resume", str(out)]) == 0
    assert json.loads((out / "result.json").read_text())["before"] is None


def test_plan(capsys):
    shape = ["--random-weights", "llama-3.1-8b", "--quantize", "nf4", "--max-completion-length", "1024"]
    assert main(["plan", *shape, "--prompt-length", "128"]) == 0
    printed = capsys.readouterr().out
    for part in ("weights", "adapters", "gradients", "optimizer", "KV cache", "checkpoints", "logits"):
        assert f"\n{part} " in printed
    assert "h200 (141 GiB): fits" in printed
    assert main(["plan", *shape, "--card", "6"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert "unknown card 'gtx'" in refused(capsys, "plan", *shape, "--card", "gtx")
    for card in ("0", "-3", "nan", "inf"):
        assert "positive number of GiB, got" in refused(capsys, "plan", *shape, "--card", card)
    assert "at least 1 token, got 0" in refused(capsys, "plan", *shape, "--prompt-length", "0")
    assert main(["plan", "--task", "add"]) == 0  # the packaged model, the task's own prompts
    assert "prompts of 1" in capsys.readouterr().out


def test_resume_of_nothing(capsys, tmp_path):
    assert "holds no run to resume" in refused(capsys, "train", "--resume", str(tmp_path))


def test_sample_and_eval_with_an_adapter(tiny, capsys, tmp_path):
    tiny_policy().save_adapter(tmp_path / "adapter")
    adapter = ["--adapter", str(tmp_path / "adapter")]
    assert main(["sample", "hello", "--max-tokens", "4", *adapter]) == 0
    assert capsys.readouterr().out.endswith("\n")
    assert main(["eval", "--task", "add", "--held-out", "3", "--max-tokens", "2", *adapter]) == 0
    assert capsys.readouterr().out.startswith("add: held-out accuracy 0.0% (0/3, 95% interval ")


def test_replay_of_a_run(tiny, capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["train", *flags(out=str(out), steps=2), "--save-batches"]) == 0
    batches = sorted(str(file) for file in (out / "batches").iterdir())
    capsys.readouterr()
    options = ["--losses", "grpo,dapo", "--estimators", "grpo,rloo", "--kl-coefs", "0,0.1"]
    adapter = ["--adapter", str(out / "adapter"), "--out", str(tmp_path / "replay")]
    assert main(["replay", *batches, *options, *adapter]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("2 batches, 8 cells") and len(printed) == 1 + 9 + 1
    assert {p.name for p in (tmp_path / "replay").iterdir()} == {"replay.json", "replay.png"}


def test_replay_and_verify_errors(tiny, capsys, tmp_path):
    (tmp_path / "other").write_bytes(b"x")
    assert "is no readable safetensors file" in refused(capsys, "replay", str(tmp_path / "other"))
    assert "No such file" in refused(capsys, "replay", str(tmp_path / "none"))
    assert "nobody" in refused(capsys, "verify", "--against", "nobody")
    assert "No such file" in refused(capsys, "replay", str(tmp_path))
    with pytest.raises(SystemExit):
        main(["replay", "x", "--kl-coefs", "much"])
    assert "expected numbers, got 'much'" in capsys.readouterr().err


def test_sample_and_eval_errors(tiny, capsys, tmp_path):
    assert "is no adapter folder" in refused(capsys, "sample", "hello", "--adapter", str(tmp_path))
    assert "nearest is 'add'" in refused(capsys, "eval", "--task", "addd")
    assert "max_tokens must be at least 1" in refused(capsys, "sample", "hello", "--max-tokens", "0")
    assert "finite, got inf" in refused(capsys, "sample", "hello", "--temperature", "inf")
    assert "cannot hold out 0" in refused(capsys, "eval", "--held-out", "0")


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-phi3"])
def test_export_is_the_adapter_of_the_run(shape, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "odd", odd)
    out, model = tmp_path / "run", "adapter_model.safetensors"
    settings = (
        "--steps 3 --group-size 4 --prompts-per-step 1 --max-completion-length 3 --lora-r 4 --rewards odd"
    )
    command = ["train", *settings.split(), "--random-weights", shape, "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    assert main(["export", str(out), "--out", str(tmp_path / "last")]) == 0
    assert "adapter after step 3" in capsys.readouterr().out
    folders = (out / "adapter", tmp_path / "last")
    written, exported = (load_file(folder / model) for folder in folders)
    assert written.keys() == exported.keys()
    assert all(torch.equal(written[name], exported[name]) for name in written)
    assert any(tensor.any() for name, tensor in exported.items() if "lora_B" in name)
    descriptions = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    for description in descriptions:
        description.pop("base_model_name_or_path")
    assert descriptions[0] == descriptions[1]
    assert main(["export", str(out), "--step", "2", "--out", str(tmp_path / "earlier")]) == 0
    earlier = load_file(tmp_path / "earlier" / model)
    assert any(not torch.equal(earlier[name], exported[name]) for name in exported)


def test_export_errors(tiny, capsys, tmp_path):
    assert "holds no run" in refused(capsys, "export", str(tmp_path), "--out", "x")
    out = tmp_path / "run"
    assert main(["train", *flags(out=str(out))]) == 0
    capsys.readouterr()
    assert "no checkpoint of step 9" in refused(capsys, "export", str(out), "--step", "9", "--out", "x")
    state = out / "checkpoints" / "step-000004" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    assert "step-000004 is damaged" in refused(capsys, "export", str(out), "--out", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_bench_runs_the_benchmark_files(capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(
        "subprocess.run",
        lambda command, cwd: ran.append((command, cwd)) or subprocess.CompletedProcess(command, 3),
    )
    assert main(["bench", "linear_logprob"]) == 3
    [(command, folder)] = ran
    assert command[1:3] == ["-m", "pytest"] and folder.name == "benchmarks"
    assert command[3:] == [str(folder / "bench_linear_logprob.py")]
    main(["bench"])
    assert len(ran[1][0]) == 3 + len(list(folder.glob("bench_*.py")))
    assert "unknown operation 'linear'" in refused(capsys, "bench", "linear")


def test_bench_without_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("nanogrpo.grpo.__main__.__file__", str(tmp_path / "grpo" / "__main__.py"))
    assert "clone the repository" in refused(capsys, "bench")
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "bench needs pytest and pytest-benchmark" in refused(capsys, "bench")
