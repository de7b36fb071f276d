"""What a batch of rollouts is trained for: a policy loss on advantages, PPO with a critic, or preference pairs.

An objective does two things for ``GRPOTrainer``. ``prepare`` turns the rollouts of a step into the sequences to
train on, with whatever the loss needs beside them. ``micro_loss`` is the loss of some of those sequences; divided by
what ``prepare`` counted over the whole batch, the losses of its micro-batches sum to the batch's.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..rollout import split_by_budget
from .advantages import gae_advantages, group_advantages, group_has_signal, multi_reward_advantages, whiten
from .distributed import Ranks
from .loss import kl_penalty, kl_reward_penalty, loss_denominator, policy_loss
from .measurement import unmeasured


@dataclass
class MicroLoss:
    """loss: scalar with a graph; logprobs (S, L): the policy's, detached; kl: k3 summed over tokens, if measured."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    kl: float | None


def estimate_advantages(batch, rewards, estimator, *, in_baseline=None):
    """(S,) advantages of ``batch`` by any estimator of ``group_advantages``, or by "gdpo", reward by reward.

    rewards (S,): those of the batch, possibly less a penalty, which "gdpo" takes as one more reward.
    """
    if estimator == "gdpo":
        penalty = rewards - batch.rewards
        terms = torch.cat([batch.reward_terms, penalty[:, None]], 1)
        weights = torch.cat([batch.reward_weights, torch.ones(1)])
        return multi_reward_advantages(terms, batch.group_ids, weights, in_baseline=in_baseline)
    lengths = batch.completion_lengths()
    return group_advantages(rewards, batch.group_ids, estimator, lengths=lengths, in_baseline=in_baseline)


def has_signal(batch, config):
    """(S,) bool: whether a row's group can teach anything, as the run's estimator and baseline see it."""
    inside = ~batch.truncated if config.truncated == "drop" else torch.ones_like(batch.truncated)
    columns = [batch.rewards]
    if config.estimator == "gdpo":
        columns = batch.reward_terms.unbind(1)
    found = torch.zeros_like(batch.truncated)
    for column in columns:
        applies = ~column.isnan()
        found |= group_has_signal(column.nan_to_num(), batch.group_ids, in_baseline=inside & applies)
    return found


class PolicyObjective:
    """``policy_loss`` of a preset on one advantage a completion."""

    unit = 1  # sequences that a micro-batch must hold together

    def __init__(self, policy, config, ranks=None):
        self.policy = policy
        self.config = config
        self.ranks = ranks or Ranks()
        self.loss_config = config.loss_config()
        self.token_budget = config.token_budget
        self.meter = unmeasured  # the step's StepMeter

    def named_parameters(self):
        """Trainable parameters besides the adapters: none."""
        return {}

    def prepare(self, batch):
        """(the sequences to train on, metrics); remembers the denominator of the whole batch."""
        learn = torch.ones(len(batch), dtype=torch.bool)
        if self.config.truncated != "keep":
            learn = ~batch.truncated
        rewards, metrics = self.penalised(batch)
        in_baseline = ~batch.truncated if self.config.truncated == "drop" else None
        batch.advantages = estimate_advantages(batch, rewards, self.config.estimator, in_baseline=in_baseline)
        mask = batch.padded_mask() & learn[:, None]
        self.denominator = loss_denominator(mask, self.loss_config)
        # Without a KL term a row of zero advantage has no gradient; the denominator has counted it.
        without_kl = self.loss_config.kl_coef == 0 or self.loss_config.kl_place == "reward"
        if without_kl and self.loss_config.denominator_scope == "batch":
            learn &= batch.advantages != 0
        self.per_micro_batch = self.loss_config.denominator_scope == "micro-batch"
        return batch.select(learn.nonzero().squeeze(1).tolist()), metrics

    def penalised(self, batch):
        """(rewards less the KL penalty of each completion, metrics), where the KL's place is the reward."""
        penalty, metrics = self.token_penalty(batch)
        return (batch.rewards if penalty is None else batch.rewards - penalty.sum(1)), metrics

    def token_penalty(self, batch, scored=None):
        """((S, L) KL penalties of the sampled tokens or None where the KL is not in the reward, metrics).

        Both log-probs are the trainer's: the sampler's rounding would pass for a difference between completions.
        scored (N,): the policy's, where they are known.
        """
        if self.loss_config.kl_place != "reward" or self.loss_config.kl_coef == 0:
            return None, {}
        mask = batch.padded_mask()
        scored = batch.padded(self.measured_by_all(batch, self.score) if scored is None else scored)
        with self.policy.disable_adapters():
            reference = batch.padded(self.measured_by_all(batch, self.score))
        k3 = kl_penalty(scored, reference, "k3")[mask]
        penalty = kl_reward_penalty(scored, reference, mask, self.loss_config)
        return penalty, {"kl": k3.mean().item()}

    def micro_loss(self, micro, *, on_policy, micro_batches):
        """``MicroLoss`` of ``micro``, one of ``micro_batches``; on_policy: these are the weights that sampled it."""
        logprobs = self.padded(micro, self.score(micro))
        return self._policy_loss(micro, logprobs, micro.advantages, on_policy, micro_batches)

    def _policy_loss(self, micro, logprobs, advantages, on_policy, micro_batches):
        mask = micro.padded_mask().to(self.policy.device)
        sampled = self.padded(micro, micro.sampler_logprobs)
        denominator = self.denominator
        if self.per_micro_batch:
            denominator = micro_batches * loss_denominator(micro.padded_mask(), self.loss_config)
        with_kl = self.loss_config.kl_coef > 0 and self.loss_config.kl_place == "loss"
        out = policy_loss(
            logprobs,
            logprobs.detach() if on_policy else self.padded(micro, micro.per_token["old_logprobs"]),
            advantages.to(self.policy.device),
            mask,
            self.loss_config,
            ref_logprobs=self.padded(micro, self.reference(micro)) if with_kl else None,
            sampler_logprobs=sampled,
            denominator=denominator.to(self.policy.device),
        )
        kl = (out.metrics["kl_k3"] * mask.sum()).item() if with_kl else None
        return MicroLoss(out.loss, logprobs.detach(), kl)

    def padded(self, batch, values):
        return batch.padded(values.to(self.policy.device))

    def score(self, batch, **options):
        return self.policy.score(
            batch.input_ids,
            batch.completion_mask,
            cu_seqlens=batch.cu_seqlens,
            temperature=self.config.temperature,
            share_prefix=self.config.share_prefix,
            **options,
        )

    @torch.no_grad()
    def measured(self, batch, score):
        """``score`` of a batch of any size without gradients, within the token budget; its (N,) results, joined."""
        runs = split_by_budget(batch.sequences(), self.token_budget, share_prefix=self.config.share_prefix)
        return torch.cat([score(batch.select(rows)) for rows in runs])

    def measured_by_all(self, batch, score):
        """``measured`` on the CPU, each rank its share of the groups and as much at once as its memory holds."""
        mine, local = batch.select(self.ranks.rows(batch)), None
        if len(mine):
            local = self.within_memory(mine, lambda: self.measured(mine, score)).cpu()
        found = [part for part in self.ranks.gather(local) if part is not None]
        return torch.cat(found)

    def within_memory(self, batch, work):
        """``work()``; out of memory, again with half the token budget, which changes results by rounding alone."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                longest = max(map(len, batch.sequences())) * self.unit
                smaller = max(longest, self.token_budget // 2)
                if smaller >= self.token_budget:
                    raise
                self.token_budget = smaller
            if self.policy.steps is not None:
                self.policy.steps.clear()  # what larger micro-batches work in
                self.policy.graph_pool.give_back()  # also what was reserved, where no step of decode is left
            torch.cuda.empty_cache()

    def reference(self, batch):
        """(N,) log-probs under the base model, without gradients."""
        with self.meter("scoring"), self.policy.disable_adapters():
            return self.measured(batch, self.score)


class PPOObjective(PolicyObjective):
    """PPO (arXiv 1707.06347): advantages by GAE from a value head on the policy's own last hidden states.

    The value of a token is that of the state before it, so it is read from the hidden state that predicts the token.
    A completion's reward comes with its last token; a KL penalty in the reward comes token by token.
    """

    def __init__(self, policy, config, ranks=None):
        super().__init__(policy, config, ranks)
        # From zero: the first advantages are those of the rewards themselves.
        weight = torch.zeros(policy.config.hidden_size + 1, device=policy.device)
        self.value_weight = torch.nn.Parameter(weight)

    def named_parameters(self):
        return {"value_head.weight": self.value_weight}

    def values(self, hidden_states):
        """(K,) values of K hidden states (K, D), in float32."""
        weight, bias = self.value_weight[:-1], self.value_weight[-1]
        return hidden_states.float() @ weight + bias

    def prepare(self, batch):
        learn = torch.ones(len(batch), dtype=torch.bool)
        if self.config.truncated != "keep":
            learn = ~batch.truncated
        mask = batch.padded_mask()
        scored = self.measured_by_all(batch, lambda rows: torch.stack(self._score_with_values(rows), 1))
        penalty, metrics = self.token_penalty(batch, scored[:, 0])
        rewards = torch.zeros(mask.shape) if penalty is None else -penalty
        rewards[torch.arange(len(batch)), batch.completion_lengths() - 1] += batch.rewards
        old_values = batch.padded(scored[:, 1])
        advantages, returns = gae_advantages(
            rewards, old_values, mask, gamma=self.config.gamma, lam=self.config.gae_lambda
        )
        learned = mask & learn[:, None]
        advantages = whiten(advantages, learned)
        self.denominator = loss_denominator(learned, self.loss_config)
        self.per_micro_batch = False
        self.tokens = learned.sum()
        columns = {"advantages": advantages, "returns": returns, "old_values": old_values}
        batch.per_token = {name: batch.unpadded(rows.float()) for name, rows in columns.items()}
        error = (returns - old_values)[mask]
        metrics["value_error"] = error.square().mean().item()
        return batch.select(learn.nonzero().squeeze(1).tolist()), metrics

    def micro_loss(self, micro, *, on_policy, micro_batches):
        flat_logprobs, flat_values = self._score_with_values(micro)
        logprobs, values = self.padded(micro, flat_logprobs), self.padded(micro, flat_values)
        rows = {name: self.padded(micro, values) for name, values in micro.per_token.items()}
        result = self._policy_loss(micro, logprobs, rows["advantages"], on_policy, micro_batches)
        mask = micro.padded_mask().to(self.policy.device)
        error = value_loss(values, rows["old_values"], rows["returns"], mask, self.config.value_clip)
        result.loss = result.loss + self.config.value_coef * error / self.tokens.clamp(min=1)
        return result

    def _score_with_values(self, batch):
        """(N,) log-probs and (N,) values of the completion tokens, 0 elsewhere."""
        logprobs, hidden_states = self.score(batch, return_hidden_states=True)
        mask = batch.completion_mask.to(logprobs.device)
        return logprobs, logprobs.new_zeros(mask.shape).masked_scatter(mask, self.values(hidden_states))


def value_loss(values, old_values, returns, mask, clip):
    """Sum over ``mask`` of max((V - R)^2, (V_clipped - R)^2) / 2, V_clipped within ``clip`` of old V; all (S, L).

    The clip is that of PPO's reference implementation (arXiv 2005.12729, section 2).
    """
    # What stands outside the mask is replaced before any arithmetic: NaN there reaches no gradient.
    values, old_values, returns = (torch.where(mask, rows, 0.0) for rows in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return worse.sum() / 2


class OnlineDPOObjective(PolicyObjective):
    """Online DPO (arXiv 2402.04792): the best and the worst completion of each prompt, ranked by reward.

        -log sigmoid(beta [(log pi - log ref)(best) - (log pi - log ref)(worst)]), the mean over pairs

    Log-probs are summed over a completion. A group without two different rewards gives no pair; among equals the
    first counts.
    """

    unit = 2

    def prepare(self, batch):
        rewards, metrics = self.penalised(batch)
        learn = torch.arange(len(batch))
        if self.config.truncated != "keep":
            learn = learn[~batch.truncated]
        pairs = best_and_worst(rewards[learn], batch.group_ids[learn])
        self.pairs = len(pairs)
        metrics["pairs"] = len(pairs)
        return batch.select([learn[row].item() for pair in pairs for row in pair]), metrics

    def micro_loss(self, micro, *, on_policy, micro_batches):
        logprobs = self.padded(micro, self.score(micro))
        reference = self.padded(micro, self.reference(micro))
        best, worst = (logprobs - reference).sum(1).view(-1, 2).unbind(1)
        loss = -F.logsigmoid(self.config.dpo_beta * (best - worst)).sum() / max(1, self.pairs)
        k3 = kl_penalty(logprobs.detach(), reference, "k3")  # 0 where padded: both log-probs are 0 there
        return MicroLoss(loss, logprobs.detach(), k3.sum().item())


def best_and_worst(rewards, group_ids):
    """[(row of the highest, row of the lowest reward)] of each group whose rewards are not all equal."""
    signal = group_has_signal(rewards, group_ids)
    pairs = []
    for group in group_ids[signal].unique().tolist():
        rows = (group_ids == group).nonzero().squeeze(1)
        pairs.append((rows[rewards[rows].argmax()].item(), rows[rewards[rows].argmin()].item()))
    return pairs


OBJECTIVES = {"policy": PolicyObjective, "ppo": PPOObjective, "online_dpo": OnlineDPOObjective}
