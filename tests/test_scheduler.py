"""The scheduler without a model: every group completes in tiny caches, and no block leaks."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from nanogrpo.rollout.kv_cache import BlockAllocator
from nanogrpo.rollout.scheduler import Scheduler

BLOCK = 4
ROOMY = 256  # blocks that hold everything drawn below at once


class Memory:
    """Stands in for keys and values: each slot holds the token prefix it was computed from."""

    def __init__(self, num_blocks):
        self.slots = [[None] * BLOCK for _ in range(num_blocks)]

    def store(self, sequence, start):
        for i in range(start, len(sequence)):
            self.slots[sequence.block_table[i // BLOCK]][i % BLOCK] = tuple(sequence.token_ids[: i + 1])

    def copy(self, pairs):
        for source, destination in pairs:
            self.slots[destination] = list(self.slots[source])

    def check(self, sequence):
        for i in range(len(sequence)):
            held = self.slots[sequence.block_table[i // BLOCK]][i % BLOCK]
            assert held == tuple(sequence.token_ids[: i + 1]), f"slot of token {i} holds {held}"


def next_token(sequence):
    """Depends on all tokens and the member, as keyed noise does."""
    return hash((tuple(sequence.token_ids), sequence.prompt_index, sequence.group_index)) % 3


def run(prompts, group_size, lengths, num_blocks, max_batch, window=1):
    """What the sampler does, in windows of decode steps, on a fake memory.

    Returns {(prompt, member): completion} and the preemptions seen.
    """
    allocator = BlockAllocator(num_blocks)
    scheduler, memory = Scheduler(allocator, BLOCK, max_batch), Memory(num_blocks)
    for index, prompt in enumerate(prompts):
        scheduler.add_group(index, prompt, group_size, max(map(max, lengths)))
    results, recomputed = {}, 0
    for _ in range(10_000):
        if not scheduler.has_work():
            break
        admitted = scheduler.admit()
        if admitted:
            for sequence in admitted:  # all are stored before any is read
                recomputed += bool(sequence.completion)
                assert sequence.num_cached < len(sequence)
                memory.store(sequence, sequence.num_cached)
            sequences = []
            for leader in admitted:
                memory.check(leader)
                leader.num_cached = len(leader)
                members, copies = scheduler.fork(leader)
                memory.copy(copies)
                sequences += members
            scheduler.start(sequences)
            steps = 1
        else:
            steps = scheduler.grow(window)
            assert 1 <= steps <= window
            sequences = list(scheduler.running)
            assert sequences, "nothing was admitted and nothing runs"
            for sequence in sequences:
                memory.store(sequence, len(sequence) - 1)
        scheduler.check_invariants()
        assert len(scheduler.running) <= max_batch
        for sequence in sequences:
            memory.check(sequence)
        for sequence in sequences:
            for step in range(steps):
                if step:  # stored by the device in its own time: there must be room
                    memory.store(sequence, len(sequence) - 1)
                sequence.token_ids.append(next_token(sequence))
                if len(sequence.completion) == lengths[sequence.prompt_index][sequence.group_index]:
                    key = (sequence.prompt_index, sequence.group_index)
                    assert key not in results
                    results[key] = sequence.completion
                    scheduler.finish(sequence)
                    break
        scheduler.check_invariants()
    assert not scheduler.has_work(), "the scheduler does not come to an end"
    assert allocator.num_free == num_blocks and not allocator.by_content
    return results, recomputed


@st.composite
def tasks(draw):
    group_size = draw(st.integers(1, 5))
    # Few distinct tokens and lengths around a block's border: prefixes are shared, last blocks full or partial.
    prompts = draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=13), min_size=1, max_size=6))
    one = st.integers(1, 14)
    group = st.lists(one, min_size=group_size, max_size=group_size)
    lengths = draw(st.lists(group, min_size=len(prompts), max_size=len(prompts)))
    longest = max(len(p) + max(n) for p, n in zip(prompts, lengths, strict=True))
    num_blocks = -(-longest // BLOCK) + draw(st.integers(0, 6))
    max_batch = group_size + draw(st.integers(0, 8))
    return prompts, group_size, lengths, num_blocks, max_batch, draw(st.sampled_from([1, 2, 5, 16]))


@given(tasks())
def test_every_group_completes_in_any_cache(task):
    prompts, group_size, lengths, num_blocks, max_batch, window = task
    results, _ = run(prompts, group_size, lengths, num_blocks, max_batch, window)
    assert set(results) == {(i, j) for i in range(len(prompts)) for j in range(group_size)}
    roomy, recomputed = run(prompts, group_size, lengths, ROOMY, 1000)
    assert results == roomy and recomputed == 0


class Scheduling(RuleBasedStateMachine):
    """Requests that come, are forked, grow, are preempted and leave early or late, in any order, in few blocks."""

    BLOCKS, LIMIT = 9, 24  # the longest request fits alone: 24 tokens in 6 blocks

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(BlockAllocator(self.BLOCKS), BLOCK, 6)
        self.memory, self.asked, self.left = Memory(self.BLOCKS), {}, []

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=13),
        group_size=st.integers(1, 5),
        more=st.integers(1, 11),
    )
    def add_group(self, prompt, group_size, more):
        index = len(self.asked)
        self.asked[index] = prompt, group_size
        self.scheduler.add_group(index, prompt, group_size, more)

    @rule()
    def admit_and_fork(self):
        for leader in self.scheduler.admit():
            self.memory.store(leader, leader.num_cached)
            leader.num_cached = len(leader)
            members, copies = self.scheduler.fork(leader)
            self.memory.copy(copies)
            self.scheduler.start(members)
            for sequence in members:
                self.memory.check(sequence)
                self.append(sequence)

    @rule(window=st.integers(1, 9))
    def decode(self, window):
        steps = self.scheduler.grow(window)
        for sequence in list(self.scheduler.running):
            for _ in range(steps):
                self.memory.store(sequence, len(sequence) - 1)
                self.memory.check(sequence)
                if self.append(sequence):
                    break

    def append(self, sequence):
        sequence.token_ids.append(next_token(sequence))
        if len(sequence) == sequence.max_length:
            self.leave(sequence)
            return True

    def leave(self, sequence):
        self.scheduler.finish(sequence)
        self.left.append((sequence.prompt_index, sequence.group_index))

    @precondition(lambda self: self.scheduler.running)
    @rule(pick=st.integers(0, 99))
    def cancel(self, pick):
        self.leave(self.scheduler.running[pick % len(self.scheduler.running)])

    @precondition(lambda self: self.scheduler.running)
    @rule(pick=st.integers(0, 99))
    def preempt(self, pick):
        asking = self.scheduler.running[pick % len(self.scheduler.running)]
        self.scheduler._preempt(for_group=asking.prompt_index)

    @invariant()
    def consistent(self):
        self.scheduler.check_invariants()
        assert len(self.scheduler.running) <= 6
        known = list(self.left)
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            prompt, _ = self.asked[sequence.prompt_index]
            assert sequence.token_ids[: sequence.prompt_length] == prompt
            first = sequence.group_index
            known += [(sequence.prompt_index, first + i) for i in range(sequence.unforked + 1)]
        expected = [(index, i) for index, (_, size) in self.asked.items() for i in range(size)]
        assert sorted(known) == expected, "a request was lost or doubled"


TestScheduling = Scheduling.TestCase


def test_many_random_tasks_preempt_and_agree():
    rng, preempted = random.Random(0), 0
    for _ in range(60):
        group_size = rng.randint(1, 6)
        prompts = [[rng.randint(0, 1) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(1, 6))]
        lengths = [[rng.randint(1, 16) for _ in range(group_size)] for _ in prompts]
        longest = max(len(p) + max(n) for p, n in zip(prompts, lengths, strict=True))
        num_blocks, max_batch = -(-longest // BLOCK) + rng.randint(0, 5), group_size + rng.randint(0, 6)
        window = rng.choice([1, 1, 3, 8])
        results, recomputed = run(prompts, group_size, lengths, num_blocks, max_batch, window)
        assert results == run(prompts, group_size, lengths, ROOMY, 1000)[0]
        preempted += recomputed > 0
    assert preempted > 15, "the caches were too large to test preemption"


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_a_group_shares_its_full_prompt_blocks(length):
    scheduler = Scheduler(BlockAllocator(64), BLOCK, 8)
    scheduler.add_group(0, list(range(length)), 8)
    (leader,) = scheduler.admit()
    leader.num_cached = length
    members, copies = scheduler.fork(leader)
    scheduler.start(members)
    partial = length % BLOCK != 0
    assert [m.group_index for m in members] == list(range(8))
    assert len(copies) == (7 if partial else 0)
    assert 64 - scheduler.allocator.num_free == length // BLOCK + (8 if partial else 0)
    scheduler.check_invariants()


def test_equal_prefixes_of_two_prompts_share_blocks():
    scheduler = Scheduler(BlockAllocator(64), BLOCK, 8)
    scheduler.add_group(0, [1] * 9, 1)
    scheduler.add_group(1, [1] * 8 + [2], 1)
    first, second = scheduler.admit()
    assert first.num_cached == 0 and second.num_cached == 8
    assert first.block_table[:2] == second.block_table[:2] and first.block_table[2] != second.block_table[2]


def test_the_last_token_is_computed_even_if_its_block_is_shared():
    scheduler = Scheduler(BlockAllocator(64), BLOCK, 8)
    scheduler.add_group(0, [1] * 8, 1)
    scheduler.add_group(1, [1] * 8, 1)
    _, second = scheduler.admit()
    assert second.num_cached == 4


def test_a_window_shrinks_before_anything_is_preempted():
    scheduler = Scheduler(BlockAllocator(5), BLOCK, 2)
    for index in range(2):
        scheduler.add_group(index, [index] * BLOCK, 1, 100)
    scheduler.start(scheduler.admit())
    for sequence in scheduler.running:
        sequence.token_ids.append(9)
    assert scheduler.grow(16) == 4 and len(scheduler.running) == 2
    assert [len(s.block_table) for s in scheduler.running] == [2, 2]
    scheduler.check_invariants()


def test_reserving_takes_all_or_nothing():
    scheduler = Scheduler(BlockAllocator(6), BLOCK, 2)
    for index in range(2):
        scheduler.add_group(index, [index] * BLOCK, 1, 3 * BLOCK)
    scheduler.start(scheduler.admit())
    assert scheduler.remaining() == 3 * BLOCK
    for sequence in scheduler.running:
        sequence.token_ids.append(9)
    tables = lambda: [len(s.block_table) for s in scheduler.running]
    assert scheduler.reserve(BLOCK + 1) and tables() == [3, 3] and not scheduler.allocator.num_free
    assert scheduler.reserve(2), "what is there already is not missing"
    assert (
        not scheduler.reserve(2 * BLOCK + 1) and tables() == [3, 3] and scheduler.remaining() == 3 * BLOCK - 1
    )
    scheduler.check_invariants()


def test_rows_for_a_waiting_group():
    scheduler = Scheduler(BlockAllocator(9), BLOCK, 5)
    assert not scheduler.has_rows(0)
    scheduler.add_group(0, [1], 3)
    assert scheduler.has_rows(2) and not scheduler.has_rows(3)


def test_no_block_is_taken_beyond_the_end_of_a_completion():
    scheduler = Scheduler(BlockAllocator(9), BLOCK, 1)
    scheduler.add_group(0, [0] * BLOCK, 1, BLOCK + 1)
    (sequence,) = scheduler.admit()
    scheduler.start([sequence])
    sequence.token_ids.append(9)
    assert scheduler.grow(16) == 16 and len(sequence.block_table) == 2


def test_a_group_enters_whole_or_waits():
    scheduler = Scheduler(BlockAllocator(64), BLOCK, 5)
    scheduler.add_group(0, [1], 3)
    scheduler.add_group(1, [2], 3)
    (leader,) = scheduler.admit()
    members, _ = scheduler.fork(leader)
    scheduler.start(members)
    assert scheduler.admit() == []
    scheduler.finish(members[0])
    assert [s.prompt_index for s in scheduler.admit()] == [1]


def test_ten_thousand_requests_through_a_cache_that_holds_three_percent_of_them():
    rng, window = random.Random(1), 8
    prompts = [[rng.randint(0, 99) for _ in range(rng.randint(1, 24))] for _ in range(10_000)]
    lengths = [rng.randint(1, 24) for _ in prompts]
    needed = sum(-(-(len(p) + n - 1) // BLOCK) for p, n in zip(prompts, lengths, strict=True))
    allocator = BlockAllocator(needed * 3 // 100)
    scheduler, finished, preempted = Scheduler(allocator, BLOCK, 1000), {}, 0
    for index, prompt in enumerate(prompts):
        scheduler.add_group(index, prompt, 1, lengths[index])
    while scheduler.has_work():
        admitted = scheduler.admit()
        if admitted:
            preempted += sum(len(s) > s.prompt_length for s in admitted)
            scheduler.start(admitted)
        steps = 1 if admitted else scheduler.grow(window)
        for sequence in admitted or list(scheduler.running):
            room = sequence.max_length - len(sequence)
            sequence.token_ids += [7] * min(room, steps)
            if room <= steps:
                assert sequence.prompt_index not in finished
                finished[sequence.prompt_index] = sequence.completion
                scheduler.finish(sequence)
    assert [len(finished[i]) for i in range(len(prompts))] == lengths
    assert preempted > 20 and allocator.num_free == allocator.num_blocks
    scheduler.check_invariants()
