"""What one step learned from: prompts and completions end to end, with everything the loss needs beside them."""

from dataclasses import dataclass, fields

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


@dataclass
class RolloutBatch:
    """S sequences of N tokens in all, packed without padding.

    input_ids (N,) int64: prompt and completion of every sequence; cu_seqlens (S+1,) int64: their borders;
    completion_mask (N,) bool: tokens that were sampled; sampler_logprobs (N,) float32: their log-probs when sampled,
    0 elsewhere; rewards and advantages (S,) float32; group_ids (S,) int64: equal for completions of one prompt.
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    completion_mask: torch.Tensor
    sampler_logprobs: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    group_ids: torch.Tensor

    @classmethod
    def from_groups(cls, prompts, groups, rewards, advantages):
        """prompts: token ids a group; groups: lists of ``Completion``; rewards, advantages (S,) in that order."""
        ids, mask, logprobs, borders, group_ids = [], [], [], [0], []
        for group_id, (prompt, completions) in enumerate(zip(prompts, groups, strict=True)):
            for completion in completions:
                ids += [*prompt, *completion.token_ids]
                mask += [False] * len(prompt) + [True] * len(completion.token_ids)
                logprobs += [0.0] * len(prompt) + completion.logprobs
                borders.append(len(ids))
                group_ids.append(group_id)
        return cls(
            input_ids=torch.tensor(ids, dtype=torch.int64),
            cu_seqlens=torch.tensor(borders, dtype=torch.int64),
            completion_mask=torch.tensor(mask, dtype=torch.bool),
            sampler_logprobs=torch.tensor(logprobs, dtype=torch.float32),
            rewards=rewards,
            advantages=advantages,
            group_ids=torch.tensor(group_ids, dtype=torch.int64),
        )

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
        return RolloutBatch(
            input_ids=self.input_ids[tokens],
            cu_seqlens=lengths.cumsum(0),
            completion_mask=self.completion_mask[tokens],
            sampler_logprobs=self.sampler_logprobs[tokens],
            rewards=self.rewards[rows],
            advantages=self.advantages[rows],
            group_ids=self.group_ids[rows],
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

    def save(self, path):
        """Write to a safetensors file, to be replayed."""
        save_file({f.name: getattr(self, f.name).contiguous() for f in fields(self)}, path)

    @classmethod
    def load(cls, path):
        """Read what ``save`` wrote; ValueError naming the file if it is damaged or no rollout batch."""
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file: {error}") from error
        expected = {f.name for f in fields(cls)}
        if set(tensors) != expected:
            raise ValueError(f"{path} holds {sorted(tensors)}, expected {sorted(expected)}")
        return cls(**tensors)
