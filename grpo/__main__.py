"""The command line: nanogrpo train, plan, sample, eval, export, bench, replay, verify."""

import argparse
import dataclasses
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

from .config import GRPOConfig, kind_of


def main(argv=None):
    """Run the command line; returns the exit code. Errors of input are one line on stderr and exit code 2."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"nanogrpo: {error}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(prog="nanogrpo", description="GRPO fine-tuning in very little VRAM")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="fine-tune a policy on a task")
    for field in dataclasses.fields(GRPOConfig):
        _add_flag(train, field)
    train.add_argument(
        "--resume",
        metavar="FOLDER",
        help="continue the run in this folder, with its settings; --steps lengthens it",
    )
    train.add_argument(
        "--resume-step", type=int, metavar="N", help="go on from the checkpoint of step N instead of the last"
    )
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="the GPU memory that a run would take, by part; needs no GPU")
    for field in dataclasses.fields(GRPOConfig):
        _add_flag(plan, field)
    plan.add_argument("--prompt-length", type=int, help="tokens of a prompt; default: the task's longest")
    plan.add_argument(
        "--card", help="a card or its GiB of memory: rtx-4090, h100, 12, ...; default: all known"
    )
    plan.set_defaults(run=_plan)

    sample = commands.add_parser("sample", help="answer one prompt")
    sample.add_argument("prompt", help="what the user says")
    _add_policy_flags(sample)
    sample.add_argument("--max-tokens", type=int, default=88)
    sample.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    sample.add_argument("--seed", type=int, default=0)
    sample.set_defaults(run=_sample)

    evaluation = commands.add_parser("eval", help="measure held-out accuracy on a task")
    _add_policy_flags(evaluation)
    evaluation.add_argument("--task", default="larger")
    evaluation.add_argument("--held-out", type=int, default=200)
    evaluation.add_argument("--max-tokens", type=int, default=8)
    evaluation.set_defaults(run=_evaluate)

    replay = commands.add_parser(
        "replay", help="the gradients that other losses would have given saved rollouts"
    )
    replay.add_argument("batches", nargs="+", metavar="BATCH", help="files that train --save-batches wrote")
    _add_policy_flags(replay)
    lists = {"type": _names, "metavar": "NAME,..."}
    replay.add_argument("--losses", **lists, default=["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
    replay.add_argument("--estimators", **lists, default=["grpo", "dr_grpo"])
    replay.add_argument("--kl-coefs", type=_numbers, metavar="X,...", default=[0.0], help="0 is no KL term")
    replay.add_argument("--kl-gradients", **lists, default=[None], help="default: each loss's own")
    replay.add_argument("--aggregates", **lists, default=[None], help="default: each loss's own")
    replay.add_argument("--max-completion-length", type=int, help="the run's; default: the longest there is")
    replay.add_argument("--token-budget", type=int, default=4096)
    replay.add_argument("--out", default="replay", help="folder for replay.json and replay.png")
    replay.set_defaults(run=_replay)

    export = commands.add_parser("export", help="a run's adapter as a folder in PEFT's format")
    export.add_argument("run_folder", metavar="RUN", help="folder of a run, finished or not")
    export.add_argument("--out", required=True, help="folder to write")
    export.add_argument(
        "--step", type=int, metavar="N", help="of the checkpoint of step N; default: the last"
    )
    export.set_defaults(run=_export)

    curves = commands.add_parser("curves", help="the curves of several runs in one picture")
    curves.add_argument("run_folders", nargs="+", metavar="RUN", help="folders of runs, finished or not")
    curves.add_argument("--out", required=True, help="PNG to write")
    curves.set_defaults(run=_curves)

    bench = commands.add_parser(
        "bench", help="time the kernels and their peers; needs a checkout and pytest-benchmark"
    )
    bench.add_argument("operations", nargs="*", metavar="OPERATION", help="linear_logprob, ...; default: all")
    bench.set_defaults(run=_bench)

    verify = commands.add_parser("verify", help="our losses beside another library's, on the same tensors")
    verify.add_argument("--against", required=True, help="trl, liger or verl")
    verify.set_defaults(run=_verify)
    return parser


def _names(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def _add_flag(parser, field):
    """A flag for a field of ``GRPOConfig``, typed by its annotation; left out, it does not appear in the result."""
    kind = kind_of(field)
    help = field.metadata["help"]
    if field.default is not None:
        help += f" (default: {field.default})"
    typed = {"type": kind, "metavar": kind.__name__.upper()}
    if kind is bool:
        typed = {"action": argparse.BooleanOptionalAction}
    parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=help, **typed)


def _add_policy_flags(parser):
    parser.add_argument("--model", help="hub name, folder or .gguf file; default: the packaged SmolLM2")
    parser.add_argument("--adapter", help="folder of an adapter in PEFT's format")
    parser.add_argument("--quantize", choices=("nf4", "int4"))
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")


def _load(arguments):
    from ..rollout import Policy

    policy = Policy.load(arguments.model, quantize=arguments.quantize, lora=None, device=arguments.device)
    if arguments.adapter:
        policy.load_adapter(arguments.adapter)
    return policy


def _numbers(text):
    try:
        return [float(name) for name in _names(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers, got {text!r}") from error


def _replay(arguments):
    from ..rollout import LoraConfig
    from .replay import grid, replay
    from .rollout_batch import RolloutBatch

    cells = grid(
        arguments.losses,
        arguments.estimators,
        arguments.kl_coefs,
        arguments.kl_gradients,
        arguments.aggregates,
    )
    batches = [RolloutBatch.load(path) for path in arguments.batches]
    Path(arguments.out).mkdir(parents=True, exist_ok=True)  # refused before the work, not after it
    policy = _load(arguments)
    if policy.lora is None:
        policy.add_adapters(LoraConfig())
    options = {
        "token_budget": arguments.token_budget,
        "max_completion_length": arguments.max_completion_length,
    }
    result = replay(policy, batches, cells, **options)
    result.save(arguments.out)
    print(f"{len(batches)} batches, {len(cells)} cells; mean [95% bootstrap interval over batches]")
    print("\n".join(result.table()))
    print(f"the cosine between every two: {arguments.out}/replay.png and replay.json")
    return 0


def _verify(arguments):
    from .verify import run

    return run(arguments.against)


def _export(arguments):
    from .export import export_adapter

    step = export_adapter(arguments.run_folder, arguments.out, arguments.step)
    print(f"adapter after step {step}: {arguments.out}")
    return 0


def _curves(arguments):
    from .report import plot_curves
    from .run import read_config, read_history

    histories, tasks = {}, {}
    for folder in arguments.run_folders:
        config, history = read_config(folder), read_history(folder)
        if not history:
            raise ValueError(f"{folder} has no steps to draw yet")
        label = f"seed {config.seed}"
        histories[label if label not in histories else str(folder)] = history
        tasks[config.task] = None
    plot_curves(histories, arguments.out, ", ".join(tasks))
    print(f"{len(histories)} runs: {arguments.out}")
    return 0


def _bench(arguments):
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    files = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if not files:
        raise ValueError(
            f"bench runs the benchmark files of a checkout, and there are none in {folder}: clone the repository "
            "and install it with pip install -e"
        )
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError(
            "bench needs pytest and pytest-benchmark: pip install pytest-benchmark, or make bench"
        )
    for name in arguments.operations:
        if name not in files:
            raise ValueError(f"unknown operation {name!r}, expected some of {', '.join(files)}")
    chosen = [str(files[name]) for name in arguments.operations or files]
    print(
        f"{len(chosen)} benchmark files; peers that are not installed are left out, make bench installs them"
    )
    # From the benchmarks' folder: from the root, ``kernels`` would stand before Hugging Face's package of that name.
    return subprocess.run([sys.executable, "-m", "pytest", *chosen], cwd=folder).returncode


def _settings(arguments):
    """The settings of a run that were given on the command line."""
    names = [field.name for field in dataclasses.fields(GRPOConfig)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _plan(arguments):
    from .memory import plan_report
    from .trainer import describe

    config = GRPOConfig(**_settings(arguments))
    model, prompt_length = describe(config)
    if arguments.prompt_length is not None:
        prompt_length = arguments.prompt_length
    print("\n".join(plan_report(model, config, prompt_length, arguments.card)))
    return 0


def _train(arguments):
    from .distributed import launched
    from .run import Run, read_config

    settings = _settings(arguments)
    resumed = arguments.resume
    if resumed:
        steps = settings.pop("steps", None)
        if settings:
            flag = next(iter(settings)).replace("_", "-")
            raise ValueError(f"--resume takes all settings but --steps from the run; drop --{flag}")
        device = read_config(resumed).device
    elif arguments.resume_step is not None:
        raise ValueError("--resume-step goes with --resume")
    else:
        config = GRPOConfig(**settings)
        device = config.device
    with launched(device) as ranks:
        if resumed:
            run = Run.resume(resumed, steps=steps, from_step=arguments.resume_step, ranks=ranks)
        else:
            run = Run.create(config, ranks=ranks)
        run.train()
    return 0


def _sample(arguments):
    from ..rollout import Sampler, SamplingParams

    params = SamplingParams(
        max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.seed
    )
    policy = _load(arguments)
    prompt = policy.tokenizer.apply_chat_template([{"role": "user", "content": arguments.prompt}])
    show = lambda prompt, member, piece: print(piece, end="", flush=True)
    start = time.perf_counter()
    [[completion]] = Sampler(policy, max_batch=1).generate([prompt], params, on_text=show)
    seconds = time.perf_counter() - start
    print(flush=True)
    count = len(completion.token_ids)
    print(f"{count} tokens, {count / seconds:.1f} tokens/s with the prompt's {len(prompt)}", file=sys.stderr)
    return 0


def _evaluate(arguments):
    from .evaluation import evaluate
    from .tasks import find_task

    task = find_task(arguments.task)
    _, held_out = task.split(arguments.held_out)
    examples = task.draw_each(held_out, "held out")
    accuracy, _ = evaluate(_load(arguments), examples, max_tokens=arguments.max_tokens)
    print(f"{task.name}: held-out accuracy {accuracy}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
