"""Group rollouts: prompts in, G completions a prompt out, with the log-probability of every sampled token."""

from dataclasses import dataclass, field

import numpy as np
import torch

from .decoding import Decoder, mark_seen
from .kv_cache import BlockAllocator, KVCache, on_device
from .policy import without_autocast
from .sampling import SamplingParams
from .scheduler import Scheduler
from .streaming import TextStream

KV_DTYPES = {None: None, "int8": torch.int8}  # what ``Sampler`` takes as kv_dtype
AHEAD = 2  # steps that a GPU has to do while the host looks at what was drawn before


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

    @torch.inference_mode(False)  # what is kept between calls must stay writable outside of it
    def __init__(
        self, policy, *, max_batch=64, kv_memory=None, kv_tokens=None, block_size=16, window=None,
        cuda_graphs=True, prefill_tokens=None, kv_dtype=None,
    ):  # fmt: skip
        """None of these but kv_dtype changes a completion, as far as products do not depend on the number of rows.

        Args:
            policy: ``Policy``, read live.
            max_batch: sequences that run at once.
            kv_memory, kv_tokens: bytes for keys and values, or tokens whose keys and values fit; None: what the call
                needs.
            block_size: tokens a KV block, a power of two of at least 16.
            window: decode steps between two looks of the host at what was drawn; None: 8 on a GPU, 1 on the CPU.
            cuda_graphs: capture steps on a GPU, and keep them for later calls.
            prefill_tokens: most tokens of one prefill; None: 512 on a GPU, which are captured, 2048 on the CPU.
            kv_dtype: "int8" keeps keys and values as 8-bit codes, D + 4 bytes a head instead of 2 D: nearly twice the
                context in the same memory. Each value then errs by at most 1/254 of the largest of its row. Log-probs
                are those of the policy that sees such keys and values, and the trainer's differ from them, keys
                more than values: by 0.04 a token on average for SmolLM2-135M. None: the policy's dtype.
        """
        positive = {"max_batch": max_batch, "window": window, "prefill_tokens": prefill_tokens}
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if kv_memory is not None and kv_tokens is not None:
            raise ValueError(f"expected kv_memory or kv_tokens, not both, got {kv_memory} and {kv_tokens}")
        if block_size < 16 or block_size & (block_size - 1):
            raise ValueError(f"block_size must be a power of two of at least 16, got {block_size}")
        if kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be one of {list(KV_DTYPES)}, got {kv_dtype!r}")
        self.policy = policy
        self.max_batch = max_batch
        self.kv_memory = kv_memory
        self.kv_tokens = kv_tokens
        self.block_size = block_size
        self.window = window or (8 if policy.device.type == "cuda" else 1)
        self.prefill_tokens = prefill_tokens or (512 if policy.device.type == "cuda" else 2048)
        self.decoder = Decoder(policy, graphs=cuda_graphs, kv_dtype=KV_DTYPES[kv_dtype])

    @torch.inference_mode(False)
    @torch.no_grad()
    @without_autocast
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
        self.decoder.draw.set(params, self._stop_ids(params))
        num_blocks = self._num_blocks(prompts, params, group_size)
        cache = self.decoder.cache(num_blocks, self.block_size)
        scheduler = Scheduler(BlockAllocator(num_blocks), self.block_size, self.max_batch)
        for index, prompt in enumerate(prompts):
            scheduler.add_group(index, prompt, group_size, params.max_tokens)
        results = [[None] * group_size for _ in prompts]
        streams = {}
        while scheduler.has_work():
            admitted = scheduler.admit()
            if admitted:
                looks = self._prefill(cache, scheduler, admitted, params)
            else:
                looks = self._decode(cache, scheduler, params)
            for sequences, drawn in looks:
                self._extend(sequences, drawn, params)
                ended = [sequence for sequence in sequences if sequence.finish_reason]
                for sequence, completion in zip(ended, self._complete(ended, params), strict=True):
                    scheduler.finish(sequence)
                    results[sequence.prompt_index][sequence.group_index] = completion
                if on_text is not None:
                    self._stream(sequences, results, streams, params.stop, on_text)
        return results

    def _stream(self, sequences, results, streams, stop, on_text):
        for sequence in sequences:
            key = prompt, member = sequence.prompt_index, sequence.group_index
            stream = streams.setdefault(key, TextStream(self.policy.tokenizer.decode, stop))
            if sequence.finish_reason:
                piece = stream.finish(results[prompt][member].text)
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
            bad = min(prompt) if min(prompt) < 0 else max(prompt)
            if not 0 <= bad < config.vocab_size:
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
        """Blocks in the cache: what the groups that fit max_batch need at once, or what kv_memory holds of it."""
        if not prompts:
            return 1
        needs, longest = [], 0
        for prompt in prompts:  # full blocks of the prompt are shared, all others belong to one member
            shared = len(prompt) // self.block_size
            whole = -(-(len(prompt) + params.max_tokens) // self.block_size)
            needs.append(shared + group_size * (whole - shared))
            longest = max(longest, whole)
        wanted = sum(sorted(needs)[-(self.max_batch // group_size) :])
        if self.kv_memory is None and self.kv_tokens is None:
            return wanted
        block_bytes = KVCache.bytes_per_block(self.policy.config, self.block_size, self.decoder.kv_dtype)
        given, num_blocks = f"kv_tokens of {self.kv_tokens}", (self.kv_tokens or 0) // self.block_size
        if self.kv_memory is not None:
            given, num_blocks = f"kv_memory of {self.kv_memory} bytes", int(self.kv_memory // block_bytes)
        if num_blocks < longest:
            raise ValueError(
                f"{given} holds {num_blocks} blocks of {self.block_size} tokens ({block_bytes} bytes each); the "
                f"longest request needs {longest}"
            )
        return min(num_blocks, wanted)

    def _prefill(self, cache, scheduler, admitted, params):
        """Compute the uncached tokens of ``admitted``, fork their groups and draw: yields (sequences, drawn)."""
        launched = []
        for parts in self._parts(admitted):
            hidden_states = self.decoder.prefill(cache, parts)
            leaders, rows = [], []
            for row, (sequence, stop) in enumerate(parts):
                sequence.num_cached = stop
                if stop == len(sequence):
                    leaders.append(sequence)
                    rows.append(row)
            for start in range(0, len(leaders), self.decoder.draw.most_rows):
                some = slice(start, start + self.decoder.draw.most_rows)
                ends = hidden_states[on_device(rows[some], self.policy.device)]
                launched.append(self._draw_first(cache, scheduler, leaders[some], ends, params))
        if scheduler.remaining() > 1:
            self.decoder.prepare(cache, scheduler.running, self.window)
        for sequences, drawn in launched:  # read after all launches: the device need not wait in between
            yield sequences, [x[None].cpu().numpy() for x in drawn]

    def _parts(self, admitted):
        """Lists of (sequence, stop): what one forward computes of each, ``prefill_tokens`` in all."""
        parts, room = [], self.prefill_tokens
        for sequence in admitted:
            start, end = sequence.num_cached, len(sequence)  # it grows while the parts are computed
            while start < end:
                stop = min(end, start + room)
                parts.append((sequence, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    yield parts
                    parts, room = [], self.prefill_tokens
        if parts:
            yield parts

    def _draw_first(self, cache, scheduler, leaders, hidden_states, params):
        """Fork the groups of ``leaders`` and draw a token for each member: (sequences, drawn)."""
        sequences, rows, copies = [], [], []
        for row, leader in enumerate(leaders):
            members, pairs = scheduler.fork(leader)
            sequences += members
            rows += [row] * len(members)
            copies += pairs
        cache.copy_blocks(copies)
        scheduler.start(sequences)
        device, logits, seen = self.policy.device, self.policy.model.logits(hidden_states), None
        if params.repetition_penalty != 1:
            seen = torch.zeros(logits.shape, dtype=torch.bool, device=device)
            mark_seen(seen, leaders)
        members = [s.prompt_index for s in sequences], [s.group_index for s in sequences]
        counts = [len(s) - s.prompt_length for s in sequences]
        rows, *members, counts = on_device([rows, *members, counts], device)
        tokens, logprobs, kept = self.decoder.draw(logits, rows, members, counts, seen)
        return sequences, (tokens, logprobs, torch.ones_like(logprobs) if kept is None else kept)

    def _decode(self, cache, scheduler, params):
        """Let the running sequences draw until they are to be others: yields (sequences, drawn) at each look."""
        steps = scheduler.grow(min(self.window, scheduler.remaining()))
        sequences = list(scheduler.running)
        run = self.decoder.start(cache, sequences, steps, self.window)
        self.decoder.open(cache, run)
        run.advance(steps)
        while run.steps:
            run.close()
            steps = self._next_steps(scheduler, run, params)
            if steps:
                self.decoder.open(cache, run)
                run.advance(min(steps, AHEAD))
            drawn = run.read()
            alive = [row for row, sequence in enumerate(sequences) if not sequence.finish_reason]
            yield [sequences[row] for row in alive], [x[:, alive] for x in drawn]
            if steps and self._goes_on(scheduler, run, params):
                more = min(steps - run.steps, scheduler.remaining() - run.unread)
                run.advance(max(0, more))

    def _next_steps(self, scheduler, run, params):
        """Steps of a window that can be launched before the last is read; 0 where the host must look first."""
        steps = min(self.window, scheduler.remaining() - run.unread)
        if not self.decoder.looks_ahead or steps <= 0 or not scheduler.reserve(run.unread + steps):
            return 0
        return steps if self._goes_on(scheduler, run, params) else 0

    def _goes_on(self, scheduler, run, params):
        """Whether ``run`` still is what the running sequences need."""
        rows = len(scheduler.running)
        # The device does not know of stop strings, and waiting groups take the place of rows that have ended.
        stale = rows < len(run.sequences) and (params.stop or scheduler.has_rows(rows))
        return not stale and self.decoder.fits(run, scheduler.running)

    def _extend(self, sequences, drawn, params):
        """Append what was drawn in some steps, each (steps, B), up to the end of each completion."""
        tokens, logprobs, kept = drawn
        steps = len(tokens)
        ends = np.isin(tokens, self.decoder.draw.stop_ids)
        until_end = np.where(ends.any(0), ends.argmax(0) + 1, steps + 1)
        room = np.fromiter((s.max_length - len(s) for s in sequences), dtype=np.int64, count=len(sequences))
        columns = [x.T.tolist() for x in (drawn if params.filters else drawn[:2])]
        if params.stop:
            for row, sequence in enumerate(sequences):
                found = self._until_stop_string(sequence, columns[0][row][: room[row]], params)
                until_end[row] = min(until_end[row], found)
        counts = np.minimum(np.minimum(until_end, room), steps).tolist()
        for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            sequence.token_ids += columns[0][row][:count]
            sequence.logprobs += columns[1][row][:count]
            if params.filters:
                sequence.kept_mass += columns[2][row][:count]
            sequence.num_cached = len(sequence) - 1
        for row in np.flatnonzero((until_end <= steps) | (room <= steps)).tolist():
            sequences[row].finish_reason = "stop" if until_end[row] <= room[row] else "length"

    def _until_stop_string(self, sequence, tokens, params):
        """The number of ``tokens`` that completes a stop string; beyond them if none does."""
        completion = sequence.completion
        whole = self.policy.tokenizer.decode(completion + tokens)
        found = any(stop in whole for stop in params.stop)
        for count in range(1, len(tokens) + 1 if found else 1):
            text = self.policy.tokenizer.decode(completion + tokens[:count])
            if len(completion) + count >= params.min_tokens and any(stop in text for stop in params.stop):
                return count
        return len(tokens) + 1

    def _stop_ids(self, params):
        ends = () if params.ignore_eos else self.policy.tokenizer.eos_token_ids
        return {*ends, *params.stop_token_ids}

    def _complete(self, sequences, params):
        """The ``Completion`` of each of ``sequences``, which have ended."""
        completions = []
        texts = self.policy.tokenizer.decode_batch([s.completion for s in sequences])
        for sequence, text in zip(sequences, texts, strict=True):
            cut = min((text.index(stop) for stop in params.stop if stop in text), default=len(text))
            kept = sequence.kept_mass if params.filters else None
            completions.append(
                Completion(sequence.completion, sequence.logprobs, sequence.finish_reason, text[:cut], kept)
            )
        return completions
