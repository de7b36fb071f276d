"""What one step learned from: prompts and completions end to end, with everything the loss needs beside them."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PER_SEQUENCE = ("rewards", "advantages", "group_ids", "truncated", "reward_terms")
PER_TOKEN = ("input_ids", "completion_mask", "sampler_logprobs")


@dataclass
class RolloutBatch:
    """S sequences of N tokens in all, packed without padding.

    input_ids (N,) int64: prompt and completion of every sequence; cu_seqlens (S+1,) int64: their borders;
    completion_mask (N,) bool: tokens that were sampled; sampler_logprobs (N,) float32: their log-probs when sampled,
    0 elsewhere; rewards and advantages (S,) float32; group_ids (S,) int64: equal for completions of one prompt;
    truncated (S,) bool: cut off by the length limit; reward_terms (S, K) float32: what each reward function said, NaN
    where it does not apply; reward_weights (K,) float32; temperature () float64: that of the sampling, at which every
    log-prob of the batch is taken; per_token: name to (N,) float32, what an objective adds.
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    completion_mask: torch.Tensor
    sampler_logprobs: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    group_ids: torch.Tensor
    truncated: torch.Tensor
    reward_terms: torch.Tensor
    reward_weights: torch.Tensor
    temperature: torch.Tensor
    per_token: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def from_groups(cls, prompts, groups, rewards, reward_terms, reward_weights, temperature):
        """Pack fresh rollouts; advantages are 0 until an estimator fills them in.

        prompts: token ids a group; groups: lists of ``Completion``; the others as the fields, in that order.
        """
        ids, mask, logprobs, borders, group_ids, truncated = [], [], [], [0], [], []
        for group_id, (prompt, completions) in enumerate(zip(prompts, groups, strict=True)):
            for completion in completions:
                ids += [*prompt, *completion.token_ids]
                mask += [False] * len(prompt) + [True] * len(completion.token_ids)
                logprobs += [0.0] * len(prompt) + completion.logprobs
                borders.append(len(ids))
                group_ids.append(group_id)
                truncated.append(completion.finish_reason == "length")
        return cls(
            input_ids=torch.tensor(ids, dtype=torch.int64),
            cu_seqlens=torch.tensor(borders, dtype=torch.int64),
            completion_mask=torch.tensor(mask, dtype=torch.bool),
            sampler_logprobs=torch.tensor(logprobs, dtype=torch.float32),
            rewards=rewards,
            advantages=torch.zeros_like(rewards),
            group_ids=torch.tensor(group_ids, dtype=torch.int64),
            truncated=torch.tensor(truncated, dtype=torch.bool),
            reward_terms=reward_terms,
            reward_weights=reward_weights,
            temperature=torch.tensor(temperature, dtype=torch.float64),
        )

    @classmethod
    def cat(cls, batches):
        """One batch of all sequences of ``batches``; the groups of different batches stay apart."""
        borders, group_ids, tokens, groups = [torch.zeros(1, dtype=torch.int64)], [], 0, 0
        for batch in batches:
            borders.append(batch.cu_seqlens[1:] + tokens)
            group_ids.append(batch.group_ids + groups)
            tokens += batch.input_ids.numel()
            groups += int(batch.group_ids.max()) + 1 if len(batch) else 0
        joined = {f: torch.cat([getattr(b, f) for b in batches]) for f in (*PER_TOKEN, *PER_SEQUENCE)}
        joined |= {"cu_seqlens": torch.cat(borders), "group_ids": torch.cat(group_ids)}
        extra = {n: torch.cat([b.per_token[n] for b in batches]) for n in batches[0].per_token}
        return replace(batches[0], **joined, per_token=extra)

    def __len__(self):
        return self.cu_seqlens.numel() - 1

    def sequences(self):
        """The token ids of each sequence, as lists."""
        ids, borders = self.input_ids.tolist(), self.cu_seqlens.tolist()
        return [ids[a:b] for a, b in zip(borders, borders[1:], strict=False)]

    def completion_lengths(self):
        """(S,) int64: sampled tokens of each sequence."""
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), self.completion_mask.long().cumsum(0)])
        return sums[self.cu_seqlens].diff()

    def select(self, indices):
        """The batch of the sequences at ``indices`` (a list), in that order."""
        borders = self.cu_seqlens.tolist()
        spans = [torch.arange(borders[i], borders[i + 1]) for i in indices]
        tokens = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64)
        lengths = torch.tensor([0, *(len(span) for span in spans)])
        rows = torch.tensor(indices, dtype=torch.int64)
        return replace(
            self,
            cu_seqlens=lengths.cumsum(0),
            **{name: getattr(self, name)[tokens] for name in PER_TOKEN},
            **{name: getattr(self, name)[rows] for name in PER_SEQUENCE},
            per_token={name: values[tokens] for name, values in self.per_token.items()},
        )

    def padded_mask(self):
        """(S, L) bool: row s is True in its first completion_length columns; L is the longest completion."""
        lengths = self.completion_lengths()
        return torch.arange(int(lengths.max()) if len(self) else 0)[None, :] < lengths[:, None]

    def padded(self, values):
        """Lay per-token ``values`` (N,) of the completions out as (S, L) rows, 0 elsewhere; differentiable."""
        mask = self.padded_mask().to(values.device)
        return values.new_zeros(mask.shape).masked_scatter(
            mask, values[self.completion_mask.to(values.device)]
        )

    def unpadded(self, rows):
        """The inverse of ``padded``: (S, L) rows to per-token values (N,), 0 outside the completions."""
        mask = self.completion_mask.to(rows.device)
        return rows.new_zeros(mask.shape).masked_scatter(mask, rows[self.padded_mask().to(rows.device)])

    def save(self, path):
        """Write to a safetensors file, to be replayed."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "per_token"}
        tensors |= {f"per_token.{name}": values for name, values in self.per_token.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    @classmethod
    def load(cls, path):
        """Read what ``save`` wrote; ValueError naming the file if it is damaged or no rollout batch."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"No such file: {path}, expected a rollout batch that a run saved")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file: {error}") from error
        extra = {name: tensors.pop(name) for name in list(tensors) if name.startswith("per_token.")}
        expected = {f.name for f in fields(cls)} - {"per_token"}
        if set(tensors) != expected:
            raise ValueError(f"{path} holds {sorted(tensors)}, expected {sorted(expected)}")
        batch = cls(**tensors, per_token={name.removeprefix("per_token."): v for name, v in extra.items()})
        batch._check(path)
        return batch

    def _check(self, path):
        """ValueError naming the file unless shapes, dtypes and borders are those of the class's docstring."""
        tokens, rows = self.input_ids.numel(), self.cu_seqlens.numel() - 1
        expected = {
            "input_ids": torch.int64,
            "completion_mask": torch.bool,
            "sampler_logprobs": torch.float32,
        }
        lengths = dict.fromkeys(PER_TOKEN, tokens) | dict.fromkeys(PER_SEQUENCE, rows)
        checked = [(name, getattr(self, name), length) for name, length in lengths.items()]
        # Names of its own: PPO's advantages are one a token, beside those of the sequences.
        checked += [(name, tensor, tokens) for name, tensor in self.per_token.items()]
        for name, tensor, length in checked:
            dtype = expected.get(name, tensor.dtype)
            if tensor.shape[:1] != (length,) or tensor.dtype != dtype:
                got = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(f"{path}: {name} is {got}, expected {dtype} of length {length}")
        if tokens and self.input_ids.min() < 0:
            raise ValueError(f"{path}: input_ids holds {int(self.input_ids.min())}, expected none below 0")
        temperature = self.temperature
        if temperature.shape != () or not 0 < temperature < torch.inf:
            raise ValueError(f"{path}: temperature is {temperature.tolist()}, expected a finite number > 0")
        borders = self.cu_seqlens
        if not rows > 0 or borders[0] != 0 or borders[-1] != tokens or (borders.diff() < 2).any():
            raise ValueError(
                f"{path}: cu_seqlens is {borders.tolist()[:8]}, expected to rise from 0 to {tokens}"
            )
