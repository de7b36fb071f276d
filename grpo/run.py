"""A whole training run in its folder: configuration, live table, checkpoints, curves, and the result at the end."""

import json
import os
import resource
import signal
import time
from pathlib import Path

from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .config import GRPOConfig
from .evaluation import Accuracy, evaluate
from .report import plot_curves, table_header, table_row
from .trainer import GRPOTrainer

SKIPPED_IN_A_ROW = 3  # steps without a finite gradient that end a run


class Run:
    """The files of a run and the loop around ``GRPOTrainer.step``.

    Under ``folder``: config.json, metrics.jsonl, checkpoints/, before.json, result.json, adapter/, curves.png, and
    with save_batches the rollouts of each step in batches/.
    A checkpoint follows every step, so a killed run loses the step in flight at most.
    """

    def __init__(self, config, folder, say=print):
        self.config = config
        self.folder = Path(folder)
        self.say = say
        self.stop_requested = False
        self.token_budget = config.token_budget

    @classmethod
    def create(cls, config, say=print):
        """A new run; ValueError if its folder holds another."""
        folder = Path(config.out or f"runs/{config.task}-seed{config.seed}")
        if (folder / "config.json").exists():
            raise ValueError(
                f"{folder} holds another run; continue it with --resume {folder}, or name another folder with --out"
            )
        # A run killed while it wrote its very first file has left nothing but that.
        if folder.exists() and (
            not folder.is_dir() or any(p.name != "config.json.partial" for p in folder.iterdir())
        ):
            raise ValueError(f"{folder} is not an empty folder; name another one with --out")
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(config, folder, say)
        run.trainer = GRPOTrainer(config)
        config.save(folder / "config.json")
        return run

    @classmethod
    def resume(cls, folder, say=print):
        """A run as its last checkpoint left it; metrics of later steps are dropped and will be written again."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no run to resume: it has no config.json")
        run = cls(GRPOConfig.load(folder / "config.json"), folder, say)
        run.trainer = GRPOTrainer(run.config)
        checkpoints = list_checkpoints(folder / "checkpoints")
        if checkpoints:
            run.trainer.step_count = load_checkpoint(
                checkpoints[-1], run.trainer.named_parameters(), run.trainer.optimizer
            )
        history = [m for m in run.history() if m["step"] <= run.trainer.step_count]
        _write_whole(folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in history))
        return run

    def history(self):
        """The metrics of all steps so far; a last line cut short by a kill is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def train(self):
        """Run to the last step, or until SIGINT or SIGTERM; returns the result, or None if stopped early."""
        trainer, config = self.trainer, self.config
        self.say(f"{config.task}: {trainer.task.description}; policy {trainer.policy.name}")
        self.say(
            f"{config.steps} steps of {config.prompts_per_step} prompts x {config.group_size} completions, "
            f"{config.algorithm}, LoRA r={config.lora_r}, {trainer.policy.dtype} on {trainer.policy.device}"
        )
        before = self._measure_before()
        if before is not None:
            self.say(f"held-out accuracy before: {Accuracy(before['correct'], before['count'])}")
        self.say(table_header())
        handlers = {s: signal.signal(s, self._request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while trainer.step_count < config.steps and not self.stop_requested:
                start = time.perf_counter()
                metrics = trainer.step()
                metrics["seconds"] = time.perf_counter() - start
                if config.save_batches:
                    self._save_batch()
                # Metrics first: a kill before the checkpoint leaves a line that resuming drops, never a gap.
                with open(self.folder / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(metrics) + "\n")
                save_checkpoint(
                    self.folder / "checkpoints",
                    trainer.step_count,
                    trainer.named_parameters(),
                    trainer.optimizer,
                )
                self.say(table_row(metrics))
                self._watch(metrics)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        trainer.policy.save_adapter(self.folder / "adapter")
        if history := self.history():
            plot_curves(history, self.folder / "curves.png", f"{config.task}, seed {config.seed}")
        if trainer.step_count < config.steps:
            self.say(
                f"stopped after step {trainer.step_count}, everything is saved; continue with: "
                f"nanogrpo train --resume {self.folder}"
            )
            return None
        return self._finish(before, history)

    def _save_batch(self):
        path = self.folder / "batches" / f"step-{self.trainer.step_count:06d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        self.trainer.batch.save(path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
        return path

    def _watch(self, metrics):
        """Say what a step had to give up, and end a run that gets nowhere."""
        if metrics["token_budget"] < self.token_budget:
            self.token_budget = metrics["token_budget"]
            self.say(f"out of memory: going on with a token budget of {self.token_budget}")
        if not metrics["skipped"]:
            return
        self.say(f"step {metrics['step']} left the adapters as they were: its loss or gradient is not finite")
        if (
            all(m["skipped"] for m in self.history()[-SKIPPED_IN_A_ROW:])
            and metrics["step"] >= SKIPPED_IN_A_ROW
        ):
            path = self._save_batch()
            raise ValueError(
                f"{SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite; the last rollouts "
                f"are in {path}, the adapters as they were before in {self.folder}/checkpoints"
            )

    def _request_stop(self, number, frame):
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True
        self.say("stopping after this step")

    def _evaluate(self):
        trainer = self.trainer
        examples = trainer.task.draw_each(trainer.held_out_sets, "held out")
        accuracy, completions = evaluate(
            trainer.policy, examples, max_tokens=self.config.max_completion_length
        )
        return {
            "correct": accuracy.correct,
            "count": accuracy.count,
            "question": examples[0].messages[-1]["content"],
            "expected": examples[0].reply,
            "reply": completions[0].text,
        }

    def _measure_before(self):
        """The base model's held-out result, measured once a run; None where its weights are random."""
        if self.config.random_weights is not None:
            return None
        path = self.folder / "before.json"
        if not path.exists():
            with self.trainer.policy.disable_adapters():
                _write_whole(path, json.dumps(self._evaluate(), indent=2) + "\n")
        return json.loads(path.read_text())

    def _finish(self, before, history):
        after = None if before is None else self._evaluate()
        seconds = sum(m["seconds"] for m in history)
        rollout_seconds = sum(m["seconds_rollout"] for m in history)
        memory, peak = _peak_memory(history)
        result = {
            "before": before,
            "after": after,
            "training_seconds": seconds,
            "tokens_per_second": sum(m["completion_tokens"] for m in history) / rollout_seconds,
            "peak_memory_bytes": peak,
        }
        _write_whole(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        if before is not None:
            then, now = (Accuracy(r["correct"], r["count"]) for r in (before, after))
            self.say(f"held-out accuracy before: {then}")
            self.say(f"held-out accuracy after:  {now}")
            self.say(f"  {after['question']}")
            self.say(f"  before: {before['reply']!r}")
            self.say(f"  after:  {after['reply']!r} (expected {after['expected']!r})")
        self.say(
            f"{config_line(self.config)}: {seconds:.0f} s of training, "
            f"{result['tokens_per_second']:.0f} sampled tokens/s, "
            f"peak {memory} {peak / 2**30:.2f} GiB; see {self.folder}"
        )
        return result


def config_line(config):
    return f"{config.steps} steps, seed {config.seed}"


def _peak_memory(history):
    """(what was measured, bytes): of the CUDA allocator on a GPU, of the whole process on the CPU."""
    if "memory_allocated" in history[-1]:
        return "GPU memory", max(m["memory_allocated"] for m in history)
    return "memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write_whole(path, text):
    """Replace ``path`` by ``text`` at once: a reader or a kill never meets half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
