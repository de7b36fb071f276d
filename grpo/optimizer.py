"""The optimiser of a run, and what of it a checkpoint holds."""

import importlib

import torch

BETAS = (0.9, 0.99)
OPTIMIZERS = ("adamw", "adamw8bit", "adamw_offload")
BLOCK = 256  # values that share a scale in 8 bits
MIN_8BIT = 4096  # smaller tensors keep float32 moments


def make_optimizer(name, parameters, lr):
    """AdamW (arXiv 1711.05101) without weight decay; "adamw8bit" is bitsandbytes' (arXiv 2110.02861).

    "adamw_offload" is "adamw", on ``MasterWeights``.

    Raises ValueError where bitsandbytes is not installed.
    """
    parameters = list(parameters)
    if name != "adamw8bit":
        return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
    try:
        library = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f"optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes ({error})"
        ) from error
    return library.optim.AdamW8bit(parameters, lr=lr, betas=BETAS, weight_decay=0.0, min_8bit_size=MIN_8BIT)


def moment_shapes(optimizer, parameter):
    """{name: shape} of what the optimiser has learned of ``parameter``: no count of steps, no constant."""
    shape = tuple(parameter.shape)
    if isinstance(optimizer, torch.optim.AdamW):
        return {"exp_avg": shape, "exp_avg_sq": shape}
    moments = {"state1": shape, "state2": shape}
    if parameter.numel() >= MIN_8BIT:
        blocks = -(-parameter.numel() // BLOCK)
        moments |= {"absmax1": (blocks,), "absmax2": (blocks,)}
    return moments


def step_tensor(optimizer, parameter):
    """How often ``parameter`` was stepped, as a tensor on the CPU."""
    step = optimizer.state[parameter]["step"]
    return step.cpu() if isinstance(step, torch.Tensor) else torch.tensor(step)


def restore(optimizer, parameter, moments, step):
    """Give the optimiser ``moments`` ({name: CPU tensor}) and ``step`` (as ``step_tensor``) for ``parameter``."""
    known = optimizer.state[parameter]
    place = lambda name, tensor: known[name].copy_(tensor) if name in known else tensor.to(parameter.device)
    state = {name: place(name, tensor) for name, tensor in moments.items()}
    # torch counts on the parameter's device, in a tensor of each parameter's own; bitsandbytes in a number.
    torch_counts = isinstance(optimizer, torch.optim.AdamW)
    state["step"] = step.clone().to(parameter.device) if torch_counts else int(step)
    if "absmax1" in moments:  # the code books of 8 bits, one pair for all parameters
        if not optimizer.name2qmap:
            optimizer.fill_qmap()
        for key, name in (("qmap1", "dynamic"), ("qmap2", "udynamic")):
            optimizer.name2qmap[name] = optimizer.name2qmap[name].to(parameter.device)
            state[key] = optimizer.name2qmap[name]
    optimizer.state[parameter] = state
