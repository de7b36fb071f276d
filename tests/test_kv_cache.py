"""The block allocator under random operations, and the tensors of the cache."""

import pytest
import torch
from checkpoints import small_config
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from nanogrpo.rollout.kv_cache import COPIED_AT_ONCE, BlockAllocator, KVCache, OutOfBlocks


class Allocation(RuleBasedStateMachine):
    """Tables of blocks that grow, are copied by sharing, and are released from the end."""

    def __init__(self):
        super().__init__()
        self.allocator = BlockAllocator(6)
        self.tables, self.contents = [], []

    @rule(token=st.integers(0, 1), pick=st.integers(0, 99))
    def append(self, token, pick):
        """A new table, or one more block on an old one: found where published, else fresh and published."""
        index = pick % (len(self.tables) + 1)
        table = self.tables[index] if index < len(self.tables) else []
        previous = table[-1] if table else -1
        free = self.allocator.num_free
        block = self.allocator.find(previous, (token,))
        if block is not None:
            self.allocator.share(block)
            assert self.allocator.num_free == free
        elif free:
            block = self.allocator.allocate()
            self.allocator.publish(block, previous, (token,))
            assert self.allocator.find(previous, (token,)) == block
        else:
            with pytest.raises(OutOfBlocks):
                self.allocator.allocate()
            return
        if index == len(self.tables):
            self.tables.append(table)
        table.append(block)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 99))
    def fork(self, pick):
        table = self.tables[pick % len(self.tables)]
        self.tables.append([self.allocator.share(block) for block in table])

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 99))
    def release(self, pick):
        for block in reversed(self.tables.pop(pick % len(self.tables))):
            self.allocator.release(block)

    @invariant()
    def consistent(self):
        self.allocator.check_invariants(self.tables)
        assert self.allocator.num_free == 6 - len({block for table in self.tables for block in table})


TestAllocation = Allocation.TestCase


def test_first_publication_wins_and_dies_with_its_block():
    allocator = BlockAllocator(2)
    first, second = allocator.allocate(), allocator.allocate()
    allocator.publish(first, -1, (1, 2))
    allocator.publish(second, -1, (1, 2))
    assert allocator.find(-1, (1, 2)) == first
    allocator.release(second)
    assert allocator.find(-1, (1, 2)) == first
    allocator.release(first)
    assert allocator.find(-1, (1, 2)) is None
    allocator.check_invariants([])


def test_many_blocks_are_those_that_one_after_another_would_be():
    one, many = BlockAllocator(5), BlockAllocator(5)
    for count in (0, 2, 1):
        assert many.allocate_many(count) == [one.allocate() for _ in range(count)]
    with pytest.raises(OutOfBlocks):
        many.allocate_many(3)
    assert many.num_free == 2 and many.ref_counts == one.ref_counts
    many.release_many([2, 0])
    one.release(2)
    one.release(0)
    assert many.free == one.free
    assert many.allocate_many(4) == [one.allocate() for _ in range(4)] and many.num_free == 0
    many.check_invariants()


def test_free_blocks_are_not_shared_or_released():
    allocator = BlockAllocator(1)
    with pytest.raises(ValueError, match="block 0 is free"):
        allocator.share(0)
    with pytest.raises(ValueError, match="block 0 is already free"):
        allocator.release(0)


def test_check_invariants_sees_a_leak():
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    with pytest.raises(AssertionError, match="differ from the block tables"):
        allocator.check_invariants([])
    allocator.free.append(block)
    with pytest.raises(AssertionError, match="1 owners"):
        allocator.check_invariants()


def test_cache_tensors_and_copies():
    config = small_config()
    cache = KVCache(config, 5, 16, device="cpu", dtype=torch.float32)
    expected = 2 * config.num_hidden_layers * 5 * 16 * config.num_key_value_heads * config.head_dim * 4
    assert cache.data.nbytes == expected == 5 * KVCache.bytes_per_block(config, 16, torch.float32)
    cache.data.copy_(torch.randn(cache.data.shape))
    before = cache.data.clone()
    k, v = cache.layer(1)
    assert torch.equal(k, before[:, 1, 0]) and torch.equal(v, before[:, 1, 1])
    assert k.data_ptr() == cache.data[:, 1].data_ptr(), "a layer must be a view"
    cache.copy_blocks([])
    assert torch.equal(cache.data, before)
    cache.copy_blocks([(0, 3), (0, 4), (1, 2)])
    assert torch.equal(cache.data, before[[0, 1, 1, 0, 0]])


def test_many_blocks_are_copied_in_parts():
    count = COPIED_AT_ONCE + 3
    cache = KVCache(small_config(), 2 * count, 16, device="cpu", dtype=torch.float32)
    cache.data.copy_(torch.randn(cache.data.shape))
    before = cache.data[:count].clone()
    cache.copy_blocks([(i, 2 * count - 1 - i) for i in range(count)])
    assert torch.equal(cache.data[:count], before) and torch.equal(cache.data[count:].flip(0), before)


def test_addresses_say_where_each_layer_begins_in_caches_of_any_size():
    config, strides = small_config(), set()
    addresses = torch.zeros(config.num_hidden_layers, 2, dtype=torch.int64)
    for num_blocks in (3, 7):
        cache = KVCache(config, num_blocks, 16, device="cpu", dtype=torch.float16, addresses=addresses)
        for index, (k_address, v_address) in enumerate(addresses.tolist()):
            k, v = cache.layer(index)
            assert (k.data_ptr(), v.data_ptr()) == (k_address, v_address)
            strides.add((k.stride(), v.stride()))
    assert len(strides) == 1
