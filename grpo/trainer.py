"""One GRPO step after another: rollout, rewards, advantages, micro-batches, update."""

import contextlib
import math
from dataclasses import replace

import torch

from ..rollout import (
    LoraConfig,
    Policy,
    Sampler,
    SamplingParams,
    open_checkpoint,
    resolve_checkpoint,
    split_by_budget,
)
from ..rollout.cuda_context import lean_cuda
from ..rollout.layer_steps import padded_tokens
from ..rollout.policy import choose_device
from ..rollout.random_weights import find_shape, random_policy
from .algorithms import find_algorithm
from .checkpoint import load_checkpoint
from .distributed import Ranks, seed_from
from .loss import kl_penalty
from .master_weights import MasterWeights
from .measurement import StepMeter, unmeasured
from .memory import check_fits, limit_vram, micro_batch, pool_bytes
from .objectives import OBJECTIVES, has_signal
from .optimizer import make_optimizer
from .reward_pool import score
from .reward_processes import RewardProcesses
from .rewards import WeightedReward, parse_rewards, soft_overlong, total_reward
from .rollout_batch import RolloutBatch
from .tasks import find_task


class GRPOTrainer:
    """Trains the adapters of a policy on a task; ``step`` is the whole algorithm.

    All randomness is keyed by (seed, step): a trainer whose ``step_count``, parameters and optimiser are restored
    goes on as if it had never stopped.
    """

    def __init__(self, config, policy=None, *, task=None, rewards=None, ranks=None):
        """policy: default loaded from the config; task: a ``Task``; rewards: list of ``WeightedReward``; ranks: the
        processes that train together, default this one alone."""
        self.config = config
        self.ranks = ranks or Ranks()
        if config.prompts_per_step < self.ranks.world:
            raise ValueError(
                f"prompts_per_step must be at least the {self.ranks.world} ranks, got {config.prompts_per_step}"
            )
        self.policy = policy or load_policy(config)
        self.task = task or find_task(config.task)
        self.rewards = list(rewards or parse_rewards(config.rewards))
        if config.overlong_buffer:
            punishment = soft_overlong(config.max_completion_length, config.overlong_buffer)
            self.rewards.append(WeightedReward(punishment, 1.0))
        self.train_sets, self.held_out_sets = self.task.split(config.held_out)
        self.sampler = Sampler(
            self.policy,
            max_batch=len(self.ranks.part(config.prompts_per_step)) * config.group_size,
            kv_memory=None if config.kv_memory is None else int(config.kv_memory * 2**30),
            kv_dtype=config.kv_dtype,
        )
        objective = OBJECTIVES[find_algorithm(config.algorithm).objective]
        self.objective = objective(self.policy, config, self.ranks)
        if self.objective.loss_config.denominator_scope == "micro-batch" and self.ranks.world > 1:
            raise ValueError(f"{config.algorithm} divides by its own micro-batches and has no sum over ranks")
        self.reward_processes = RewardProcesses(config.reward_processes) if config.reward_processes else None
        self.masters = MasterWeights(self.policy) if config.optimizer == "adamw_offload" else None
        self.optimizer = make_optimizer(config.optimizer, self.named_parameters().values(), config.lr)
        if self.masters is not None:
            self.masters.keep_moments(self.optimizer)
        self.step_count = 0
        self.batch = None  # the rollouts of the last step
        self.longest = {}  # token budget: tokens of the longest micro-batch that is expected
        self.meter = unmeasured  # within a step its StepMeter
        self.micro_batches = (0, 0)  # done, of how many, in the update in progress

    def named_parameters(self):
        """Dict of everything that is trained: the live adapters, or their originals, by PEFT's names, then what the
        objective adds."""
        adapters = self.policy.adapters() if self.masters is None else self.masters.parameters
        return {**adapters, **self.objective.named_parameters()}

    def restore(self, checkpoint):
        """Go on from a checkpoint's folder; returns its step."""
        self.step_count = load_checkpoint(checkpoint, self.named_parameters(), self.optimizer)
        if self.masters is not None:
            self.masters.publish()
        return self.step_count

    def step(self):
        """One step of the algorithm; returns its metrics, a flat dict of numbers."""
        step = self.step_count + 1
        self.meter = self.objective.meter = StepMeter(self.policy.device)
        self.optimizer.zero_grad(set_to_none=True)  # the last step's gradients make room for the rollout
        batch, sampled = self.collect(step)
        with self.meter("scoring"):
            trained, prepared = self.objective.prepare(batch)
        trained = trained.select(self.ranks.rows(trained))
        metrics = {}
        for iteration in range(self.config.num_iterations):
            metrics = self._update(trained, step, first=metrics if iteration else None)
        with self.meter("scoring"):
            if "kl" not in metrics | prepared:
                prepared["kl"] = self._measure_kl(batch)
        self.step_count, self.batch, self.micro_batches = step, batch, (0, 0)
        return {"step": step, **sampled, **prepared, **metrics, **self.meter.metrics()}

    def progress(self):
        """(step in progress, its phase, micro-batches done, of how many): to be asked from another thread."""
        running = list(getattr(self.meter, "running", ()))
        return self.step_count + 1, running[-1] if running else "waiting", *self.micro_batches

    def close(self):
        """End the processes that score, where there are any; the next step starts new ones."""
        if self.reward_processes:
            self.reward_processes.close()

    def collect(self, step):
        """The rollouts of ``step`` and what was seen of them: (``RolloutBatch``, dict of metrics).

        With dynamic sampling (DAPO, arXiv 2503.14476) groups without signal are left out and new prompts drawn for
        them, for as many rounds as the config allows; a batch that stays without any signal is kept as it is.
        """
        wanted, kept, rounds = self.config.prompts_per_step, [], []
        for number in range(self.config.dynamic_sampling):
            rounds.append(self._rollout(step, number))
            signal = has_signal(rounds[-1], self.config)
            kept.append(rounds[-1].select(signal.nonzero().squeeze(1).tolist()))
            if sum(map(len, kept)) >= wanted * self.config.group_size:
                break
        everything = RolloutBatch.cat(rounds)
        batch = everything
        if self.config.dynamic_sampling > 1 and any(map(len, kept)):
            batch = RolloutBatch.cat(kept)
            batch = batch.select(list(range(min(len(batch), wanted * self.config.group_size))))
        lengths = everything.completion_lengths()
        size = self.config.group_size
        groups = everything.rewards.view(-1, size)
        return batch, {
            "reward": everything.rewards.mean().item(),
            "reward_std": groups.std(dim=1).mean().item() if size > 1 else 0.0,
            "completion_length": lengths.double().mean().item(),
            "signal_share": has_signal(everything, self.config).double().mean().item(),
            "truncated_share": everything.truncated.double().mean().item(),
            "completion_tokens": int(lengths.sum()),
        }

    def _rollout(self, step, number):
        """Freshly sampled groups, rewarded: round ``number`` of ``step``."""
        config = self.config
        key = f"{config.seed}/{step}" + (f"/{number}" if number else "")
        examples = self.task.draw(self.train_sets, config.prompts_per_step, key)
        mine = self.ranks.part(len(examples))
        examples = examples[mine.start : mine.stop]
        prompts = [self.policy.tokenizer.apply_chat_template(list(e.messages)) for e in examples]
        params = SamplingParams(
            max_tokens=config.max_completion_length,
            temperature=config.temperature,
            seed=seed_from(config.seed * 1_000_003 + step + (number << 40), mine.start),
        )
        with self.meter("rollout"):
            self._make_room(prompts)
            groups = self.sampler.generate(prompts, params, group_size=config.group_size)
        # Reward functions get copies: what they do to a completion must not reach the batch.
        copy = lambda c: replace(c, token_ids=list(c.token_ids), logprobs=list(c.logprobs))
        pairs = [(copy(c), e) for e, group in zip(examples, groups, strict=True) for c in group]
        with self.meter("reward"):
            score_all = self.reward_processes.score if self.reward_processes else score
            terms = score_all(self.rewards, pairs, timeout=config.reward_timeout)
        rewards = torch.tensor([total_reward(self.rewards, row) for row in terms])
        weights = torch.tensor([reward.weight for reward in self.rewards])
        terms = torch.tensor([[math.nan if value is None else value for value in row] for row in terms])
        batch = RolloutBatch.from_groups(prompts, groups, rewards, terms, weights, config.temperature)
        return RolloutBatch.cat(self.ranks.gather(batch))

    def _make_room(self, prompts):
        """Have keys and values take the place of what training has freed, not one beside it; and the layers' graphs
        theirs in one piece, for the longest micro-batch that the first prompts under a token budget allow."""
        torch.cuda.empty_cache()
        if self.policy.steps is None or not self.policy.model.checkpoint_layers:
            return
        budget = self.token_budget
        if budget not in self.longest:
            config = replace(self.config, token_budget=budget)
            self.longest[budget], _ = micro_batch(len(prompts), max(map(len, prompts)), config)
        longest = self.longest[budget]
        size = pool_bytes(
            self.policy.config, self.policy.dtype.itemsize, padded_tokens(longest),
            quantize=self.config.quantize, r=self.config.lora_r,
        )  # fmt: skip
        with contextlib.suppress(torch.OutOfMemoryError):  # then piece by piece, or with fewer tokens
            self.policy.steps.reserve(longest, size)

    def _update(self, batch, step, first=None):
        """One optimiser step over ``batch``; returns its metrics. A loss or gradient that is not finite is no step.

        ``first``: metrics of the first update on this batch, None when this is it.
        """
        on_policy = first is None
        work = lambda: self._run_micro_batches(batch, on_policy)
        totals = _joined(self.ranks.gather(self.objective.within_memory(batch, work)))
        parameters = list(self.named_parameters().values())
        if totals["trained_tokens"]:
            self.ranks.sum_gradients(parameters)
        totals["grad_norm"] = self._clip_gradients(parameters)
        finite = math.isfinite(totals["loss"]) and math.isfinite(totals["grad_norm"])
        # A step is skipped when none of its updates was made.
        totals["skipped"] = int(not finite and (first is None or first["skipped"] == 1))
        totals["lr"] = self.config.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = totals["lr"]
        if finite:
            with self.meter("optimizer"):
                self.optimizer.step()
                if self.masters is not None:
                    self.masters.publish()
        if first is not None:  # the sampler is compared with the policy that sampled
            keep = ("sampler_logprob_diff_max", "sampler_logprob_diff_mean")
            totals.update({name: first[name] for name in keep})
        return totals

    def _clip_gradients(self, parameters):
        """The norm of all gradients, which are scaled down where it is larger than ``max_grad_norm``.

        ``clip_grad_norm_`` to the bit; but gradients to be multiplied by 1 stay unread in the CPU's memory, if there.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return 0.0
        norm = torch.nn.utils.get_total_norm(gradients)
        if not norm + 1e-6 <= self.config.max_grad_norm:  # NaN, too, does as it does there
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        return norm.item()

    @property
    def token_budget(self):
        """Packed tokens a micro-batch: the config's, or less after running out of memory."""
        return self.objective.token_budget

    def _run_micro_batches(self, batch, on_policy):
        self.optimizer.zero_grad(set_to_none=True)
        tokens = int(batch.completion_mask.sum())
        totals = {"loss": 0.0, "sampler_logprob_diff_max": 0.0, "trained_tokens": tokens}
        totals |= {"difference_sum": 0.0, "kl_sum": None}
        scored = []
        runs = split_by_budget(
            batch.sequences(),
            self.token_budget,
            share_prefix=self.config.share_prefix,
            unit=self.objective.unit,
        )
        for index, rows in enumerate(runs):
            self.micro_batches = (index, len(runs))
            micro = batch.select(rows)
            with self.meter("forward"):
                out = self.objective.micro_loss(micro, on_policy=on_policy, micro_batches=len(runs))
            with self.meter("backward"):
                out.loss.backward()
            totals["loss"] += out.loss.item()
            if out.kl is not None:
                totals["kl_sum"] = (totals["kl_sum"] or 0.0) + out.kl
            scored.append(micro.unpadded(out.logprobs.cpu()))
            # Outside the completions both are 0.
            difference = (out.logprobs.cpu() - micro.padded(micro.sampler_logprobs)).abs()
            largest = max(totals["sampler_logprob_diff_max"], difference.max().item())
            totals["sampler_logprob_diff_max"] = largest
            totals["difference_sum"] += difference.sum().item()
        if on_policy and runs:
            batch.per_token["old_logprobs"] = torch.cat(scored)  # what later iterations are compared with
        return totals | {"token_budget": self.token_budget}

    @torch.no_grad()
    def _measure_kl(self, batch):
        """Mean k3 of the first group against the base model: a look at the drift where the loss has no KL term."""
        group = batch.select(list(range(self.config.group_size)))
        penalty = kl_penalty(group.sampler_logprobs, self.objective.reference(group).cpu(), "k3")
        return penalty[group.completion_mask].mean().item()


def _joined(parts):
    """The metrics of an update from what each rank's micro-batches came to."""
    tokens = sum(part["trained_tokens"] for part in parts)
    kl = [part["kl_sum"] for part in parts if part["kl_sum"] is not None]
    joined = {
        "loss": math.fsum(part["loss"] for part in parts),
        "trained_tokens": tokens,
        "token_budget": min(part["token_budget"] for part in parts),
        "sampler_logprob_diff_max": max(part["sampler_logprob_diff_max"] for part in parts),
        "sampler_logprob_diff_mean": sum(part["difference_sum"] for part in parts) / max(1, tokens),
    }
    return joined | ({"kl": sum(kl) / max(1, tokens)} if kl else {})


def describe(config):
    """(``ModelConfig``, tokens of the longest prompt) of a run, for ``plan_memory``; no weight is read."""
    checkpoint = open_checkpoint(resolve_checkpoint(config.model))
    model = checkpoint.config
    if config.random_weights is not None:
        _, model = find_shape(config.random_weights)
    task = find_task(config.task)
    examples = task.draw(task.split(config.held_out)[0], 64, "lengths")
    prompts = [checkpoint.tokenizer.apply_chat_template(list(e.messages)) for e in examples]
    return model, max(map(len, prompts))


def load_policy(config):
    """The policy that ``config`` names, with fresh adapters."""
    device = choose_device(config.device)
    if device.type == "cuda":
        lean_cuda(device)
    if config.vram_limit is not None:
        limit_vram(config)
        model, prompt_length = describe(config)
        check_fits(model, config, prompt_length)
    lora_dtype = config.lora_dtype
    if config.optimizer == "adamw_offload":  # of the originals; the adapters themselves are of the model's
        lora_dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    settings = {
        "quantize": config.quantize,
        "lora": LoraConfig(r=config.lora_r, alpha=config.lora_alpha, dtype=lora_dtype),
        "device": config.device,
        "dtype": None if config.dtype is None else getattr(torch, config.dtype),
        "seed": config.seed,
    }
    if config.random_weights is not None:
        policy = random_policy(config.random_weights, **settings)
    else:
        policy = Policy.load(config.model, **settings)
    checkpoint = config.checkpoint_layers
    policy.model.checkpoint_layers = policy.device.type == "cuda" if checkpoint is None else checkpoint
    policy.model.offload_checkpoints = config.offload_checkpoints
    return policy
