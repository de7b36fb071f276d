"""A whole training run in its folder: configuration, live table, checkpoints, curves, and the result at the end."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from .checkpoint import choose_checkpoint, list_checkpoints, save_checkpoint
from .config import GRPOConfig
from .distributed import Ranks
from .evaluation import Accuracy, evaluate
from .progress import shown_progress
from .report import open_tensorboard, plot_curves, table_header, table_row
from .rewards import RewardError
from .trainer import GRPOTrainer

SKIPPED_IN_A_ROW = 3  # steps without a finite gradient that end a run


class Run:
    """The files of a run and the loop around ``GRPOTrainer.step``.

    Under ``folder``: config.json, metrics.jsonl, checkpoints/, before.json, result.json, adapter/, curves.png, and
    with save_batches the rollouts of each step in batches/.
    A checkpoint follows every ``save_every`` steps, so a killed run loses these at most. Of several ranks the first
    alone writes and speaks; all read the folder when they resume.
    """

    def __init__(self, config, folder, say=print, ranks=None):
        self.config = config
        self.folder = Path(folder)
        self.ranks = ranks or Ranks()
        self.say = say if self.ranks.main else _silent
        self.stop_requested = False
        self.token_budget = config.token_budget
        self.skipped = 0  # steps in a row
        self.saved = None  # step of the last checkpoint
        self.fresh = False  # created by this process, without a step so far

    @classmethod
    def create(cls, config, say=print, ranks=None):
        """A new run; ValueError if its folder holds another."""
        run = cls(config, config.out or default_folder(config), say, ranks)
        if run.ranks.main:
            run._claim_folder()
        run.fresh = True
        run.ranks.gather(None)  # nobody loads a model for a folder that is refused
        with run._discarded_if_refused():
            run.trainer = GRPOTrainer(config, ranks=run.ranks)
            if run.ranks.main:
                config.save(run.folder / "config.json")
        return run

    @contextlib.contextmanager
    def _discarded_if_refused(self):
        """Settings that turn out wrong before a new run's first step leave no folder that a second try would meet."""
        try:
            yield
        except (RewardError, ConnectionError):
            raise
        except (ValueError, OSError):
            if self.fresh and self.ranks.main and not list_checkpoints(self.folder / "checkpoints"):
                for name in ("config.json", "before.json"):
                    for path in (self.folder / name, self.folder / f"{name}.partial"):
                        path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty: there is something worth keeping
                    self.folder.rmdir()
            raise

    def _claim_folder(self):
        folder = self.folder
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

    @classmethod
    def resume(cls, folder, say=print, *, steps=None, from_step=None, ranks=None):
        """A run as a checkpoint left it; metrics of later steps are dropped and will be written again.

        steps: a new total, to lengthen the run (the learning rate then follows the longer schedule); from_step: go
        on from the checkpoint of this step instead of the last, and drop those after it. Raises ValueError naming
        what is damaged or missing.
        """
        folder, config = Path(folder), read_config(folder)
        if steps is not None:
            if steps < config.steps:
                raise ValueError(f"a run of {config.steps} steps can be lengthened, not cut to {steps}")
            config = replace(config, steps=steps)
        run = cls(config, folder, say, ranks)
        run.trainer = trainer = GRPOTrainer(config, ranks=run.ranks)
        checkpoint = choose_checkpoint(folder / "checkpoints", from_step)
        if checkpoint is not None:
            run.saved = trainer.restore(checkpoint)
        history = [m for m in run.history() if m["step"] <= trainer.step_count]
        for metrics in history[::-1]:
            if not metrics.get("skipped"):
                break
            run.skipped += 1
        run.ranks.gather(None)  # every rank has read what the first is about to change
        if run.ranks.main:
            for later in list_checkpoints(folder / "checkpoints"):
                if checkpoint is not None and later > checkpoint:
                    shutil.rmtree(later)
            config.save(folder / "config.json")
            _write_whole(folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in history))
        return run

    def history(self):
        """The metrics of all steps so far."""
        return read_history(self.folder)

    def train(self):
        """Run to the last step, or until SIGINT or SIGTERM; returns the result, or None if stopped early."""
        trainer, config = self.trainer, self.config
        self.say(f"{config.task}: {trainer.task.description}; policy {trainer.policy.name}")
        self.say(
            f"{config.steps} steps of {config.prompts_per_step} prompts x {config.group_size} completions, "
            f"{config.algorithm}, LoRA r={config.lora_r}, {trainer.policy.dtype} on {trainer.policy.device}"
        )
        with self._discarded_if_refused():
            writer = open_tensorboard(self.folder, trainer.step_count) if self._writes_tensorboard() else None
            before = self._measure_before()
        if before is not None:
            self.say(f"held-out accuracy before: {Accuracy(before['correct'], before['count'])}")
        self.say(table_header())
        handlers = {s: signal.signal(s, self._request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self._discarded_if_refused():
                while trainer.step_count < config.steps and not self.ranks.any(self.stop_requested):
                    self._step(writer)
            self._save()
        except (RewardError, ConnectionError) as error:
            # Both come before the step has changed anything.
            self._save()
            raise type(error)(f"{error}; {self._way_on()}") from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            trainer.close()
            if writer is not None:
                writer.close()
        history = self.history() if self.ranks.main else []
        if self.ranks.main:
            trainer.policy.save_adapter(self.folder / "adapter")
            if history:
                plot_curves({f"seed {config.seed}": history}, self.folder / "curves.png", config.task)
        if trainer.step_count < config.steps:
            self.say(f"stopped after step {trainer.step_count}, everything is saved; {self._way_on()}")
            return None
        return self._finish(before, history)

    def _way_on(self):
        return f"continue with: nanogrpo train --resume {self.folder}"

    def _writes_tensorboard(self):
        return self.config.tensorboard and self.ranks.main

    def _step(self, writer):
        trainer = self.trainer
        start = time.perf_counter()
        with shown_progress(sys.stderr if self.ranks.main else None, trainer.progress):
            metrics = trainer.step()
        metrics["seconds"] = time.perf_counter() - start
        self.fresh = False
        if self.ranks.main:
            try:
                if self.config.save_batches:
                    self._save_batch()
                # Metrics first: a kill before the checkpoint leaves a line that resuming drops, never a gap.
                with open(self.folder / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(metrics) + "\n")
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"step {metrics['step']} could not be written to {self.folder}: {error}; {self._way_on()}"
                ) from error
            if writer is not None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, metrics["step"])
        if metrics["step"] % self.config.save_every == 0:
            self._save()
        self.say(table_row(metrics))
        self._watch(metrics)

    def _save(self):
        """Write a checkpoint of the steps so far, unless there is one."""
        trainer = self.trainer
        if self.ranks.main and trainer.step_count and self.saved != trainer.step_count:
            try:
                save_checkpoint(
                    self.folder / "checkpoints",
                    trainer.step_count,
                    trainer.named_parameters(),
                    trainer.optimizer,
                    keep=self.config.keep_checkpoints,
                )
            except OSError as error:
                raise OSError(f"{error}; those before it are whole; {self._way_on()}") from error
        self.saved = trainer.step_count

    def _batch_path(self):
        return self.folder / "batches" / f"step-{self.trainer.step_count:06d}.safetensors"

    def _save_batch(self):
        path = self._batch_path()
        path.parent.mkdir(exist_ok=True)
        self.trainer.batch.save(path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)

    def _watch(self, metrics):
        """Say what a step had to give up, and end a run that gets nowhere."""
        if metrics["token_budget"] < self.token_budget:
            self.token_budget = metrics["token_budget"]
            self.say(f"out of memory: going on with a token budget of {self.token_budget}")
        self.skipped = self.skipped + 1 if metrics["skipped"] else 0
        if not self.skipped:
            return
        self.say(f"step {metrics['step']} left the adapters as they were: its loss or gradient is not finite")
        if self.skipped >= SKIPPED_IN_A_ROW:
            if self.ranks.main:
                self._save_batch()
                self._save()
            raise ValueError(
                f"{SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite; the last rollouts "
                f"are in {self._batch_path()}, the adapters as they were before in {self.folder}/checkpoints"
            )

    def _request_stop(self, number, frame):
        # torchrun passes on what it gets, so that one Ctrl-C may come twice.
        if self.stop_requested and self.ranks.world == 1:
            raise KeyboardInterrupt
        self.stop_requested = True
        self.say("stopping after this step")

    def _evaluate(self):
        """The held-out result; every rank answers its part of the questions."""
        trainer = self.trainer
        examples = trainer.task.draw_each(trainer.held_out_sets, "held out")
        mine = self.ranks.part(len(examples))
        accuracy, completions = evaluate(
            trainer.policy, examples[mine.start : mine.stop], max_tokens=self.config.max_completion_length
        )
        own = zip(completions, examples[mine.start : mine.stop], strict=True)
        formatted = sum(c.finish_reason == "stop" and e.in_format(c.text) for c, e in own)
        parts = self.ranks.gather((accuracy.correct, formatted, [c.text for c in completions]))
        return {
            "correct": sum(correct for correct, _, _ in parts),
            "formatted": sum(formatted for _, formatted, _ in parts),
            "count": len(examples),
            "question": examples[0].messages[-1]["content"],
            "expected": examples[0].reply,
            "reply": next(text for *_, texts in parts for text in texts),
        }

    def _measure_before(self):
        """The base model's held-out result, measured once a run; None where its weights are random."""
        if self.config.random_weights is not None:
            return None
        path = self.folder / "before.json"
        [known, *_] = self.ranks.gather(_read_json(path, path.read_bytes()) if path.exists() else None)
        if known is None:
            with self.trainer.policy.disable_adapters():
                known = self._evaluate()
            if self.ranks.main:
                _write_whole(path, json.dumps(known, indent=2) + "\n")
        return known

    def _finish(self, before, history):
        after = None if before is None else self._evaluate()
        if not self.ranks.main:
            return {}
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
            for name, key in (("accuracy", "correct"), ("format", "formatted")):
                then, now = (Accuracy(r[key], r["count"]) for r in (before, after))
                self.say(f"held-out {name} before: {then}")
                self.say(f"held-out {name} after:  {now}")
            self.say(f"  {after['question']}")
            self.say(f"  before: {before['reply']!r}")
            self.say(f"  after:  {after['reply']!r} (expected {after['expected']!r})")
        self.say(
            f"{config_line(self.config)}: {seconds:.0f} s of training, "
            f"{result['tokens_per_second']:.0f} sampled tokens/s, "
            f"peak {memory} {peak / 2**30:.2f} GiB; see {self.folder}"
        )
        return result


def default_folder(config):
    """runs/TASK-seedSEED, where a task's name may be a path."""
    return Path("runs") / f"{re.sub('[^A-Za-z0-9_.-]+', '-', config.task)}-seed{config.seed}"


def read_config(folder):
    """The ``GRPOConfig`` of the run in ``folder``; ValueError where there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run to resume: it has no config.json")
    return GRPOConfig.load(path)


def read_history(folder):
    """The metrics of all steps of the run in ``folder``; a last line cut short by a kill is left out."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    history = [_read_json(path, line) for line in lines if line.endswith(b"\n")]
    for metrics in history:
        if not isinstance(metrics, dict) or not isinstance(metrics.get("step"), int):
            raise ValueError(f"{path} is damaged: {str(metrics)[:60]!r} are no metrics of a step")
    return history


def _silent(line):
    """What a rank says that is not the first."""


def config_line(config):
    return f"{config.steps} steps, seed {config.seed}"


def _peak_memory(history):
    """(what was measured, bytes): of the CUDA allocator on a GPU, of the whole process on the CPU."""
    if "memory_allocated" in history[-1]:
        return "GPU memory", max(m["memory_allocated"] for m in history)
    return "memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read_json(path, data):
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _write_whole(path, text):
    """Replace ``path`` by ``text`` at once: a reader or a kill never meets half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
