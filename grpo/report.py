"""What a run shows: a row a step while it runs, its curves as a picture, and TensorBoard files."""

import importlib

COLUMNS = ("Step", "Training Loss", "reward", "reward_std", "completion_length", "kl")


def table_header():
    return " | ".join(f"{name:>{_width(name)}}" for name in COLUMNS)


def table_row(metrics):
    """One step of the live table: ``metrics`` as ``GRPOTrainer.step`` returns them."""
    values = {"Step": f"{metrics['step']:d}", "Training Loss": f"{metrics['loss']:.6f}"}
    values |= {name: f"{metrics[name]:.6f}" for name in COLUMNS[2:]}
    return " | ".join(f"{values[name]:>{_width(name)}}" for name in COLUMNS)


def _width(name):
    return max(len(name), 4 if name == "Step" else 9)


def plot_curves(histories, path, title):
    """Draw reward, reward_std, completion_length and kl against steps into a PNG.

    histories: a run's label to its metrics a step; of several the labels stand in a legend.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, COLUMNS[2:], strict=True):
        for label, history in histories.items():
            steps = [metrics["step"] for metrics in history]
            axes.plot(steps, [metrics[name] for metrics in history], linewidth=1.2, label=label)
        if len(histories) > 1:
            axes.legend(fontsize=8)
        axes.set_xlabel("step")
        axes.set_title(name)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def open_tensorboard(folder, step):
    """A writer of TensorBoard files under ``folder``/tensorboard that goes on after ``step``; has ``add_scalar``.

    Raises ValueError where the tensorboard package is not installed.
    """
    try:
        library = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise ValueError(f"--tensorboard needs the package: pip install tensorboard ({error})") from error
    return library.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
