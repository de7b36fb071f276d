"""Who runs next: admission, growth, preemption and completion of sequences, on plain integers (no torch).

A group waits until its prompt fits, is prefilled once by its leader, and is then forked into its members: full
prompt blocks are shared, the last partly filled block is copied. Rows that finish leave at once and waiting
ones enter (continuous batching). When blocks run out the youngest group gives its blocks back and is recomputed
later; its tokens are kept, and since noise is keyed by position the result does not change.
"""

import itertools
import sys
from collections import deque
from dataclasses import dataclass, field

from .kv_cache import OutOfBlocks


@dataclass(eq=False)
class Sequence:
    """One completion under way: the prompt and what has been generated after it."""

    prompt_index: int
    group_index: int
    token_ids: list[int]
    prompt_length: int
    max_length: int = sys.maxsize  # tokens, prompt included, at which the completion ends
    logprobs: list[float] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    block_table: list[int] = field(default_factory=list)
    num_cached: int = 0  # leading tokens whose keys and values stand in the cache
    unforked: int = 0  # members of the group still to be forked from this leader

    def __len__(self):
        return len(self.token_ids)

    @property
    def completion(self):
        return self.token_ids[self.prompt_length :]


class Scheduler:
    def __init__(self, allocator, block_size, max_batch):
        self.allocator = allocator
        self.block_size = block_size
        self.max_batch = max_batch
        self.waiting = deque()
        self.running = []

    def add_group(self, prompt_index, prompt, group_size, max_tokens=None):
        """Queue a prompt for ``group_size`` completions; only its leader waits, members are forked from it."""
        max_length = sys.maxsize if max_tokens is None else len(prompt) + max_tokens
        leader = Sequence(prompt_index, 0, list(prompt), len(prompt), max_length, unforked=group_size - 1)
        self.waiting.append(leader)

    def has_work(self):
        return bool(self.waiting or self.running)

    def remaining(self):
        """Tokens that the running sequence with the most before it still may generate."""
        return max((s.max_length - len(s.token_ids) for s in self.running), default=0)

    def admit(self):
        """Sequences to prefill now, in order; each has its block table, shared blocks counted as cached."""
        admitted, rows = [], len(self.running)
        while self.has_rows(rows):
            sequence = self.waiting[0]
            # Every member will at once want a last block of its own.
            if not self._map_blocks(sequence, spare=sequence.unforked + len(self.running) + len(admitted)):
                break
            admitted.append(self.waiting.popleft())
            rows += 1 + sequence.unforked
        return admitted

    def has_rows(self, taken):
        """Whether a group waits and finds rows enough where ``taken`` are taken."""
        return bool(self.waiting) and taken + 1 + self.waiting[0].unforked <= self.max_batch

    def _map_blocks(self, sequence, spare):
        """Give ``sequence`` blocks for all its tokens, shared where published; False, nothing taken, if short."""
        table, cached = [], 0
        full = (
            len(sequence) - 1
        ) // self.block_size  # the last token is computed in any case, for its logits
        for start in range(0, full * self.block_size, self.block_size):
            tokens = tuple(sequence.token_ids[start : start + self.block_size])
            block = self.allocator.find(table[-1] if table else -1, tokens)
            if block is None:
                break
            table.append(self.allocator.share(block))
            cached += self.block_size
        missing = -(-len(sequence) // self.block_size) - len(table)
        if missing + (spare if self.running else 0) > self.allocator.num_free:
            self.allocator.release_many(table[::-1])
            return False
        table += self.allocator.allocate_many(missing)
        sequence.block_table, sequence.num_cached = table, cached
        self._publish(sequence)
        return True

    def _publish(self, sequence):
        # Blocks are published before they are computed: a forward stores all its tokens before it reads any.
        for i in range(len(sequence) // self.block_size):
            tokens = tuple(sequence.token_ids[i * self.block_size : (i + 1) * self.block_size])
            self.allocator.publish(sequence.block_table[i], sequence.block_table[i - 1] if i else -1, tokens)

    def fork(self, leader):
        """The group's sequences (leader first) and the (source, destination) block copies that they need."""
        members, copies = [leader], []
        partial = len(leader) % self.block_size != 0
        shared = leader.block_table[:-1] if partial else leader.block_table
        for offset in range(1, leader.unforked + 1):
            member = Sequence(
                leader.prompt_index, leader.group_index + offset, list(leader.token_ids),
                leader.prompt_length, leader.max_length,
            )  # fmt: skip
            if (
                partial and not self.allocator.num_free
            ):  # the rest of the group waits for a prefill of its own
                member.unforked = leader.unforked - offset
                self.waiting.appendleft(member)
                break
            own = [self.allocator.allocate()] if partial else []
            member.block_table = [self.allocator.share(block) for block in shared] + own
            member.num_cached = leader.num_cached
            copies.extend((leader.block_table[-1], block) for block in own)
            members.append(member)
        leader.unforked = 0
        return members, copies

    def start(self, sequences):
        self.running.extend(sequences)

    def grow(self, steps=1):
        """Make room for ``steps`` more tokens of every running sequence, or for fewer; returns for how many.

        Before anything is preempted ``steps`` is halved; if there is not even room for one, the youngest yield.
        """
        while not self.reserve(steps):
            if steps > 1:
                steps //= 2
            else:
                self._preempt(for_group=self._first_without_room().prompt_index)
        return steps

    def reserve(self, steps):
        """Make room for ``steps`` more tokens of every running sequence; if there is none, take nothing: False."""
        missing = [self._missing(sequence, steps) for sequence in self.running]
        try:
            blocks = iter(self.allocator.allocate_many(sum(missing)))
        except OutOfBlocks:
            return False
        for sequence, count in zip(self.running, missing, strict=True):
            if count:
                sequence.block_table += itertools.islice(blocks, count)
        return True

    def _first_without_room(self):
        """The oldest sequence that finds no block for one more token, those before it having taken theirs."""
        free = self.allocator.num_free
        for sequence in self.running:
            free -= self._missing(sequence, 1)
            if free < 0:
                return sequence

    def _missing(self, sequence, steps):
        """Blocks that ``sequence`` lacks to store its last token and ``steps`` - 1 more."""
        length = len(sequence.token_ids)
        stored = length + steps - 1
        if stored >= sequence.max_length:  # the last token of a completion is never stored
            stored = max(length, sequence.max_length - 1)
        missing = -(-stored // self.block_size) - len(sequence.block_table)
        return missing if missing > 0 else 0

    def _preempt(self, for_group):
        """Take the blocks of the youngest group, or of its youngest member if it is the group that asks."""
        youngest = self.running[-1].prompt_index
        victims = [s for s in self.running if s.prompt_index == youngest]
        if youngest == for_group:
            victims = victims[-1:]
        self.running = [s for s in self.running if s not in victims]
        for sequence in reversed(victims):
            self._release(sequence)
            self.waiting.appendleft(sequence)

    def finish(self, sequence):
        self.running.remove(sequence)
        self._release(sequence)

    def _release(self, sequence):
        self.allocator.release_many(sequence.block_table[::-1])
        sequence.block_table, sequence.num_cached = [], 0

    def check_invariants(self):
        self.allocator.check_invariants([s.block_table for s in self.running])
        assert not any(s.block_table for s in self.waiting)
