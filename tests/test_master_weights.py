"""Originals in the CPU's memory: AdamW's own results, gradients in float32, nothing on the card but the adapters."""

import gc

import pytest
import torch
from checkpoints import small_config
from nanogrpo.grpo import GRPOConfig
from nanogrpo.grpo.checkpoint import load_checkpoint, save_checkpoint
from nanogrpo.grpo.master_weights import MasterWeights
from nanogrpo.grpo.optimizer import make_optimizer
from nanogrpo.rollout import LoraConfig
from nanogrpo.rollout.layer_steps import LayerSteps
from tiny import KeptSteps, tiny_policy, tiny_weights
from tiny_run import adapters, tiny_trainer, wake

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def small_policy(device="cpu", dtype="bfloat16", **lora):
    """In bfloat16, with steps as a GPU runs them; dtype: of the adapters, whose values are the same in all."""
    config = small_config("qwen2")
    weights = {name: w.to(device, torch.bfloat16) for name, w in tiny_weights(config).items()}
    policy = tiny_policy(config, weights, lora=LoraConfig(r=4, alpha=8, dtype=dtype, **lora))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.adapters().values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator).bfloat16())
    policy.model.checkpoint_layers = True
    if device == "cpu":
        policy.steps = LayerSteps(policy, graphs=False)
        policy.steps.graphs = KeptSteps()
    return policy


def backward(policy, seed=0):
    ids = torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, 10:] = True
    logprobs = policy.score(ids, mask)
    (
        torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device).view_as(logprobs) * logprobs
    ).sum().backward()


@pytest.mark.parametrize("algorithm, token_budget", [("grpo", 2048), ("grpo", 40), ("ppo", 40)])
def test_steps_are_those_of_adamw(algorithm, token_budget):
    found = []
    for optimizer in ("adamw", "adamw_offload"):
        settings = {"algorithm": algorithm, "token_budget": token_budget, "num_iterations": 2}
        trainer = tiny_trainer(optimizer=optimizer, **settings)
        wake(trainer)
        if trainer.masters is not None:
            for adapter, original in trainer.masters.originals.items():
                original.data.copy_(adapter)
        metrics = [trainer.step() for _ in range(3)]
        found.append((adapters(trainer), [(m["loss"], m["grad_norm"]) for m in metrics]))
    (plain, expected), (ours, got) = found
    assert got == expected and all(norm > 0 for _, norm in got)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("device", DEVICES)
def test_updates_below_a_rounding_add_up(device):
    policy = small_policy(device)
    masters = MasterWeights(policy)
    reference = {
        name: torch.nn.Parameter(p.detach().float().clone()) for name, p in policy.adapters().items()
    }
    optimizers = [
        make_optimizer("adamw_offload", masters.parameters.values(), 1e-6),
        make_optimizer("adamw", reference.values(), 1e-6),
    ]
    masters.keep_moments(optimizers[0])
    before = {name: p.detach().clone() for name, p in policy.adapters().items()}
    for seed in range(3):
        backward(policy, seed)
        assert all(p.grad is None for p in policy.adapters().values())
        for name, original in masters.parameters.items():
            assert original.grad.dtype == torch.float32 and original.grad.isfinite().all()
            reference[name].grad = original.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        masters.publish()
    moved = 0
    for name, adapter in policy.adapters().items():
        assert torch.equal(masters.parameters[name], reference[name])
        assert torch.equal(adapter, reference[name].to(adapter.dtype))
        moved += int((masters.parameters[name] != before[name]).sum() > 0)
    assert moved == len(before), "the originals moved by less than their rounding"


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_captured_steps_are_those_of_float32_adapters(device):
    found = []
    for dtype in ("float32", "bfloat16"):
        policy = small_policy(device, dtype)
        parameters = policy.adapters() if dtype == "float32" else MasterWeights(policy).parameters
        for seed in range(3):
            backward(policy, seed)
        found.append([parameter.grad for parameter in parameters.values()])
    for plain, ours in zip(*found, strict=True):
        assert torch.equal(ours, plain) and not torch.equal(ours, ours.bfloat16().float())


def test_a_checkpoint_goes_where_the_moments_lie(tmp_path):
    first, second = (tiny_trainer(optimizer="adamw_offload") for _ in range(2))
    first.step()
    save_checkpoint(tmp_path, 1, first.named_parameters(), first.optimizer)
    places = [t.data_ptr() for moments in second.masters.moments.values() for t in moments]
    assert second.restore(tmp_path / "step-000001") == 1
    state = second.optimizer.state
    assert places == [
        state[p][name].data_ptr() for p in second.masters.moments for name in ("exp_avg", "exp_avg_sq")
    ]
    for trainer in (first, second):
        trainer.step()
    expected = adapters(first)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapters(second).items())
    plain = tiny_trainer(optimizer="adamw")  # the two optimisers' checkpoints are one another's
    assert load_checkpoint(tmp_path / "step-000001", plain.named_parameters(), plain.optimizer) == 1


def test_a_run_that_has_made_no_step_goes_on(tmp_path):
    """The value head has no moments yet where the adapters' lie ready."""
    first, second = (tiny_trainer(algorithm="ppo", optimizer="adamw_offload") for _ in range(2))
    save_checkpoint(tmp_path, 1, first.named_parameters(), first.optimizer)
    first.step_count = second.restore(tmp_path / "step-000001")
    assert first.step()["loss"] == second.step()["loss"]


def test_adapters_that_are_frozen_stay_out():
    policy = small_policy(targets=("q_proj", "down_proj"))
    frozen = {name for name in policy.adapters() if "q_proj" in name or "layers.1" in name}
    for name in frozen:
        policy.adapters()[name].requires_grad_(False)
    masters = MasterWeights(policy)
    assert masters.parameters.keys() == policy.adapters().keys() - frozen
    backward(policy)
    assert all(original.grad is not None for original in masters.parameters.values())


def test_half_precision_originals_are_refused():
    with pytest.raises(ValueError, match="float32 originals of the adapters, got lora_dtype bfloat16"):
        GRPOConfig(optimizer="adamw_offload", lora_dtype="bfloat16")


@pytest.mark.gpu
def test_the_card_holds_the_adapters_alone():
    policy = small_policy("cuda")
    backward(policy)  # what steps work in
    for parameter in policy.adapters().values():
        parameter.grad = None
    gc.collect()
    before = torch.cuda.memory_allocated()
    masters = MasterWeights(policy)
    optimizer = make_optimizer("adamw_offload", masters.parameters.values(), 1e-3)
    masters.keep_moments(optimizer)
    for seed in range(2):
        backward(policy, seed)
        torch.nn.utils.clip_grad_norm_(masters.parameters.values(), 1.0)
        optimizer.step()
        masters.publish()
    gc.collect()
    counts = 512 * len(masters.parameters)  # of steps, one a parameter
    assert torch.cuda.memory_allocated() - before <= counts
