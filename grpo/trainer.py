"""One GRPO step after another: rollout, rewards, advantages, micro-batches, update."""

import contextlib
import time

import torch

from ..rollout import LoraConfig, Policy, Sampler, SamplingParams, split_by_budget
from .advantages import group_advantages, group_has_signal
from .loss import kl_penalty, loss_denominator, policy_loss
from .rewards import parse_rewards, total_reward
from .rollout_batch import RolloutBatch
from .tasks import find_task


class GRPOTrainer:
    """Trains the adapters of a policy on a task; ``step`` is the whole algorithm.

    All randomness is keyed by (seed, step): a trainer whose ``step_count``, adapters and optimiser are restored
    goes on as if it had never stopped.
    """

    def __init__(self, config, policy=None, *, task=None, rewards=None):
        """policy: default loaded from the config; task: a ``Task``; rewards: list of ``WeightedReward``."""
        self.config = config
        self.policy = policy or load_policy(config)
        self.task = task or find_task(config.task)
        self.rewards = rewards or parse_rewards(config.rewards)
        self.train_sets, self.held_out_sets = self.task.split(config.held_out)
        self.sampler = Sampler(self.policy, max_batch=config.prompts_per_step * config.group_size)
        self.loss_config = config.loss_config()
        self.parameters = list(self.policy.adapters().values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.step_count = 0

    def step(self):
        """One step of the algorithm; returns its metrics, a flat dict of numbers."""
        step = self.step_count + 1
        clock = _Clock(self.policy.device)
        with clock("rollout"):
            batch, completions = self.collect(step)
        denominator = loss_denominator(batch.padded_mask(), self.loss_config)
        trained = self._worth_training(batch)
        with clock("reference"):
            kl = self._measure_kl(batch)
        metrics = {}
        with clock("train"):
            for iteration in range(self.config.num_iterations):
                metrics = self._update(trained, denominator, step, first=metrics if iteration else None)
        self.step_count = step
        lengths = batch.completion_lengths().double()
        groups = self.config.prompts_per_step
        return {
            "step": step,
            **metrics,
            "reward": batch.rewards.mean().item(),
            "reward_std": batch.rewards.view(groups, -1).std(dim=1).mean().item(),
            "completion_length": lengths.mean().item(),
            "kl": kl if self.config.kl_coef == 0 else metrics["kl"],
            "signal_share": group_has_signal(batch.rewards, batch.group_ids).double().mean().item(),
            "truncated_share": sum(c.finish_reason == "length" for c in completions) / len(completions),
            "completion_tokens": int(lengths.sum()),
            "trained_tokens": int(trained.completion_mask.sum()),
            **clock.seconds,
        }

    def collect(self, step):
        """The rollouts of ``step`` as a ``RolloutBatch``, and their ``Completion`` objects."""
        config = self.config
        examples = self.task.draw(self.train_sets, config.prompts_per_step, f"{config.seed}/{step}")
        prompts = [self.policy.tokenizer.apply_chat_template(list(e.messages)) for e in examples]
        params = SamplingParams(
            max_tokens=config.max_completion_length,
            temperature=config.temperature,
            seed=config.seed * 1_000_003 + step,
        )
        groups = self.sampler.generate(prompts, params, group_size=config.group_size)
        rewards = torch.tensor(
            [
                total_reward(self.rewards, c, e)
                for e, group in zip(examples, groups, strict=True)
                for c in group
            ]
        )
        group_ids = torch.arange(len(prompts)).repeat_interleave(config.group_size)
        advantages = group_advantages(rewards, group_ids, config.estimator)
        batch = RolloutBatch.from_groups(prompts, groups, rewards, advantages)
        return batch, [completion for group in groups for completion in group]

    def _worth_training(self, batch):
        """Without a KL term a row of zero advantage has no gradient; a batch's denominator still counts it."""
        if self.config.kl_coef > 0 or self.loss_config.denominator_scope == "micro-batch":
            return batch
        return batch.select(batch.advantages.nonzero().squeeze(1).tolist())

    def _update(self, batch, denominator, step, first=None):
        """One optimiser step over ``batch`` in micro-batches; returns the metrics, sums over micro-batches.

        ``first``: metrics of the first update on this batch, None when this is it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        totals = {"loss": 0.0, "kl": 0.0, "sampler_logprob_diff_max": 0.0}
        difference_sum = 0.0
        runs = split_by_budget(
            batch.sequences(), self.config.token_budget, share_prefix=self.config.share_prefix
        )
        for rows in runs:
            micro = batch.select(rows)
            if self.loss_config.denominator_scope == "micro-batch":
                denominator = len(runs) * loss_denominator(micro.padded_mask(), self.loss_config)
            out, difference = self._micro_loss(micro, denominator, on_policy=first is None)
            out.loss.backward()
            totals["loss"] += out.loss.item()
            if self.config.kl_coef > 0:
                totals["kl"] += out.kl.detach().sum().item() / max(1, int(batch.completion_mask.sum()))
            totals["sampler_logprob_diff_max"] = max(
                totals["sampler_logprob_diff_max"], difference.max().item()
            )
            difference_sum += difference.sum().item()
        totals["sampler_logprob_diff_mean"] = difference_sum / max(1, int(batch.completion_mask.sum()))
        totals["grad_norm"] = 0.0
        if runs:
            totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(
                self.parameters, self.config.max_grad_norm
            ).item()
        totals["lr"] = self.config.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = totals["lr"]
        if runs:
            self.optimizer.step()
        if first is not None:  # the sampler is compared with the policy that sampled
            keep = ("sampler_logprob_diff_max", "sampler_logprob_diff_mean")
            totals.update({name: first[name] for name in keep})
        return totals

    def _micro_loss(self, micro, denominator, *, on_policy):
        """(``LossOutput`` with a graph, |new - sampler| log-probs of the completion tokens) of a micro-batch."""
        sampled = micro.padded(micro.sampler_logprobs).to(self.policy.device)
        logprobs = micro.padded(self._score(micro))
        mask = micro.padded_mask().to(self.policy.device)
        ref_logprobs = None
        if self.config.kl_coef > 0:
            with torch.no_grad(), self.policy.disable_adapters():
                ref_logprobs = micro.padded(self._score(micro))
        out = policy_loss(
            logprobs,
            logprobs.detach() if on_policy else sampled,
            micro.advantages.to(self.policy.device),
            mask,
            self.loss_config,
            ref_logprobs=ref_logprobs,
            denominator=denominator.to(self.policy.device),
        )
        return out, torch.where(mask, (logprobs.detach() - sampled).abs(), 0)

    def _score(self, batch):
        return self.policy.score(
            batch.input_ids,
            batch.completion_mask,
            cu_seqlens=batch.cu_seqlens,
            temperature=self.config.temperature,
            share_prefix=self.config.share_prefix,
        )

    @torch.no_grad()
    def _measure_kl(self, batch):
        """Mean k3 of the first group against the base model: a look at the drift where the loss has no KL term."""
        if self.config.kl_coef > 0:
            return None
        group = batch.select(list(range(self.config.group_size)))
        with self.policy.disable_adapters():
            reference = self._score(group).cpu()
        penalty = kl_penalty(group.sampler_logprobs, reference, "k3")
        return penalty[group.completion_mask].mean().item()


def load_policy(config):
    """The policy that ``config`` names, with fresh adapters."""
    if config.vram_limit is not None:
        limit_vram(config)
    return Policy.load(
        config.model,
        quantize=config.quantize,
        lora=LoraConfig(r=config.lora_r, alpha=config.lora_alpha),
        device=config.device,
        dtype=None if config.dtype is None else getattr(torch, config.dtype),
        seed=config.seed,
    )


def limit_vram(config):
    """Make the allocator refuse more than ``vram_limit`` GiB of the GPU's memory."""
    if not torch.cuda.is_available() or (config.device or "cuda").split(":")[0] != "cuda":
        raise ValueError("vram_limit needs a CUDA device, and this run is on the CPU")
    device = torch.device(config.device or "cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, config.vram_limit * 2**30 / total), device)


class _Clock:
    """Seconds by phase, with the device's work finished at the end of each."""

    def __init__(self, device):
        self.device = device
        self.seconds = {}

    @contextlib.contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[f"seconds_{phase}"] = time.perf_counter() - start
