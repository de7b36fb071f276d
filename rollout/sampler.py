"""Group rollouts: prompts in, G completions a prompt out, with the log-probability of every sampled token."""

from dataclasses import dataclass, field

import torch

from .attention import PagedAttention
from .kv_cache import BlockAllocator, KVCache
from .model import MIN_ROWS
from .sampling import SamplingParams, counter_uniform, sample
from .scheduler import Scheduler
from .streaming import TextStream


@dataclass(frozen=True)
class Completion:
    """What a prompt was answered with.

    token_ids: the sampled tokens, the end token included; logprobs: one a token, at the sampling temperature over
    the full vocabulary; finish_reason: "stop" (an end or stop token, or a stop string) or "length"; text: decoded
    without special tokens, cut before a stop string; kept_mass: the share of the distribution inside the filters
    at each token, None where no filter cut it.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    kept_mass: list[float] | None = field(default=None)


class Sampler:
    """Generates on the live policy through a paged KV cache that exists only while it generates."""

    def __init__(self, policy, *, max_batch=64, kv_memory=None, block_size=16):
        """max_batch: sequences that run at once; kv_memory: bytes for keys and values, None: what the call needs;
        block_size: tokens a KV block, a power of two of at least 16."""
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        if block_size < 16 or block_size & (block_size - 1):
            raise ValueError(f"block_size must be a power of two of at least 16, got {block_size}")
        self.policy = policy
        self.max_batch = max_batch
        self.kv_memory = kv_memory
        self.block_size = block_size

    @torch.no_grad()
    def generate(self, prompts, params=None, *, group_size=1, on_text=None):
        """Complete every prompt ``group_size`` times.

        Args:
            prompts: list of lists of token ids, none empty.
            params: ``SamplingParams``.
            group_size: completions a prompt.
            on_text: called as on_text(prompt index, member, piece) whenever a completion's text grows; its pieces
                joined are the completion's text.

        Returns:
            list (a prompt) of lists (a member of its group) of ``Completion``, in the order of ``prompts``.

        Raises:
            ValueError: an empty prompt, a token id outside the vocabulary, a prompt that with its completion does
                not fit the model's context or the KV memory, or a group larger than max_batch.
        """
        params = params or SamplingParams()
        self._check(prompts, params, group_size)
        num_blocks = self._num_blocks(prompts, params, group_size)
        device, dtype = self.policy.device, self.policy.dtype
        cache = KVCache(self.policy.config, num_blocks, self.block_size, device=device, dtype=dtype)
        scheduler = Scheduler(BlockAllocator(num_blocks), self.block_size, self.max_batch)
        for index, prompt in enumerate(prompts):
            scheduler.add_group(index, prompt, group_size)
        results = [[None] * group_size for _ in prompts]
        streams = {}
        while scheduler.has_work():
            admitted = scheduler.admit()
            if admitted:
                sequences, logits, rows = self._prefill(cache, scheduler, admitted)
            else:
                scheduler.grow()
                sequences = scheduler.running
                logits, rows = self._decode(cache, sequences)
            self._extend(sequences, logits, rows, params)
            if on_text is not None:
                self._stream(sequences, params, streams, on_text)
            for sequence in [s for s in sequences if s.finish_reason]:
                scheduler.finish(sequence)
                results[sequence.prompt_index][sequence.group_index] = self._complete(sequence, params)
        return results

    def _stream(self, sequences, params, streams, on_text):
        for sequence in sequences:
            key = sequence.prompt_index, sequence.group_index
            stream = streams.setdefault(key, TextStream(self.policy.tokenizer.decode, params.stop))
            if sequence.finish_reason:
                piece = stream.finish(self._complete(sequence, params).text)
            else:
                piece = stream.grow(sequence.completion)
            if piece:
                on_text(*key, piece)

    def _check(self, prompts, params, group_size):
        config = self.policy.config
        if not 1 <= group_size <= self.max_batch:
            raise ValueError(
                f"group_size must be between 1 and max_batch ({self.max_batch}), got {group_size}"
            )
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty")
            bad = next((t for t in prompt if not 0 <= t < config.vocab_size), None)
            if bad is not None:
                raise ValueError(
                    f"prompt {index} holds token {bad}, outside the vocabulary of {config.vocab_size}"
                )
            if len(prompt) + params.max_tokens > config.max_position_embeddings:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; with max_tokens {params.max_tokens} that exceeds the "
                    f"model's context of {config.max_position_embeddings}"
                )
        bad = [t for t in (*params.stop_token_ids, *params.logit_bias) if not 0 <= t < config.vocab_size]
        if bad:
            raise ValueError(
                f"SamplingParams names token {bad[0]}, outside the vocabulary of {config.vocab_size}"
            )

    def _num_blocks(self, prompts, params, group_size):
        """Blocks in the cache: what kv_memory holds, or what max_batch of the longest sequences need."""
        if not prompts:
            return 1
        longest = -(-(max(map(len, prompts)) + params.max_tokens) // self.block_size)
        rows = min(self.max_batch, len(prompts) * group_size)
        if self.kv_memory is None:
            return longest * rows
        block_bytes = KVCache.bytes_per_block(self.policy.config, self.block_size, self.policy.dtype)
        num_blocks = self.kv_memory // block_bytes
        if num_blocks < longest:
            raise ValueError(
                f"kv_memory of {self.kv_memory} bytes holds {num_blocks} blocks of {self.block_size} tokens "
                f"({block_bytes} bytes each); the longest request needs {longest}"
            )
        return int(min(num_blocks, longest * rows))

    def _prefill(self, cache, scheduler, admitted):
        """Compute the uncached tokens of ``admitted`` and fork their groups: (sequences, logits, row of each)."""
        ids, positions, slots, cu_seqlens = [], [], [], [0]
        for sequence in admitted:
            new = range(sequence.num_cached, len(sequence))
            ids += sequence.token_ids[sequence.num_cached :]
            positions += new
            slots += [self._slot(sequence, position) for position in new]
            cu_seqlens.append(len(ids))
        source = list(range(len(ids)))
        logits = self._forward(cache, admitted, ids, positions, slots, source, cu_seqlens)
        sequences, rows = [], []
        for row, leader in enumerate(admitted):
            leader.num_cached = len(leader)
            members, copies = scheduler.fork(leader)
            cache.copy_blocks(copies)
            sequences += members
            rows += [row] * len(members)
        scheduler.start(sequences)
        return sequences, logits, rows

    def _decode(self, cache, sequences):
        """Compute the last token of ``sequences``: (logits, row of each); equal sequences are computed once."""
        distinct, rows = {}, []
        for sequence in sequences:
            rows.append(distinct.setdefault(tuple(sequence.token_ids), len(distinct)))
            sequence.num_cached = len(sequence)
        leaders = [sequences[rows.index(row)] for row in range(len(distinct))]
        ids = [leader.token_ids[-1] for leader in leaders]
        positions = [len(leader) - 1 for leader in leaders]
        slots = [self._slot(sequence, len(sequence) - 1) for sequence in sequences]
        return self._forward(cache, leaders, ids, positions, slots, rows, None), rows

    def _slot(self, sequence, position):
        return (
            sequence.block_table[position // self.block_size] * self.block_size + position % self.block_size
        )

    def _forward(self, cache, sequences, ids, positions, slots, source, cu_seqlens):
        """Float32 logits (S, V) after the last token of each sequence; ``source`` is the token of each slot."""
        device = self.policy.device
        tables = [sequence.block_table for sequence in sequences]
        context_lens = [len(sequence) for sequence in sequences]
        if len(ids) < MIN_ROWS:  # padding: tokens that store nothing, of sequences that see nothing
            padding = MIN_ROWS - len(ids)
            ids, positions = ids + [0] * padding, positions + [0] * padding
            if cu_seqlens is None:
                tables, context_lens = tables + [[]] * padding, context_lens + [0] * padding
            else:
                tables, context_lens, cu_seqlens = [*tables, []], [*context_lens, 0], [*cu_seqlens, len(ids)]
        width = max(map(len, tables))
        tables = [table + [0] * (width - len(table)) for table in tables]
        int32 = lambda values: torch.tensor(values, dtype=torch.int32, device=device)
        int64 = lambda values: torch.tensor(values, dtype=torch.int64, device=device)
        borders = None if cu_seqlens is None else int32(cu_seqlens)
        attend = PagedAttention(
            cache, int64(slots), int64(source), int32(tables), int32(context_lens), borders
        )
        hidden_states = self.policy.model(int64(ids), int64(positions), attend)
        last = slice(None) if borders is None else borders[1:].long() - 1
        return self.policy.model.logits(hidden_states[last])[: len(sequences)]

    def _extend(self, sequences, logits, rows, params):
        """Draw the next token of every sequence from its row of logits and decide which of them it ends."""
        stop_ids = self._stop_ids(params)
        generated = [len(s) - s.prompt_length for s in sequences]
        of_row = dict(zip(rows, sequences, strict=True))  # sequences of one row have the same tokens
        leaders = [of_row[row] for row in range(len(logits))]
        banned = None
        if params.min_tokens and stop_ids:
            early = [len(s) - s.prompt_length < params.min_tokens for s in leaders]
            ends = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            ends[list(stop_ids)] = True
            banned = torch.tensor(early, device=logits.device)[:, None] & ends[None, :]
        uniforms = counter_uniform(
            params.seed, [s.prompt_index for s in sequences], [s.group_index for s in sequences], generated
        )
        histories = [s.token_ids for s in leaders] if params.repetition_penalty != 1 else None
        rows = torch.tensor(rows, device=logits.device)
        drawn = sample(logits, rows, torch.from_numpy(uniforms), params, histories=histories, banned=banned)
        for sequence, token, logprob, kept in zip(sequences, *(x.tolist() for x in drawn), strict=True):
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.kept_mass.append(kept)
            count = len(sequence) - sequence.prompt_length
            if token in stop_ids or (
                params.stop and count >= params.min_tokens and self._stopped(sequence, params)
            ):
                sequence.finish_reason = "stop"
            elif count == params.max_tokens:
                sequence.finish_reason = "length"

    def _stop_ids(self, params):
        ends = () if params.ignore_eos else self.policy.tokenizer.eos_token_ids
        return {*ends, *params.stop_token_ids}

    def _stopped(self, sequence, params):
        text = self.policy.tokenizer.decode(sequence.completion)
        return any(stop in text for stop in params.stop)

    def _complete(self, sequence, params):
        text = self.policy.tokenizer.decode(sequence.completion)
        cut = min((text.index(stop) for stop in params.stop if stop in text), default=len(text))
        return Completion(
            token_ids=sequence.completion,
            logprobs=sequence.logprobs,
            finish_reason=sequence.finish_reason,
            text=text[:cut],
            kept_mass=sequence.kept_mass if params.filters else None,
        )
