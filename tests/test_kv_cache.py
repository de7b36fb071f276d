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


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.int8])


def filled(config, num_blocks, dtype, **options):
    cache = KVCache(config, num_blocks, 16, device="cpu", dtype=dtype, **options)
    cache.data.copy_(torch.randint(-128, 128, cache.data.shape))
    return cache


@DTYPES
def test_cache_tensors_and_copies(dtype):
    config = small_config()
    cache = filled(config, 5, dtype)
    row = config.head_dim * 4 if dtype == torch.float32 else config.head_dim + 4
    expected = 2 * config.num_hidden_layers * 5 * 16 * config.num_key_value_heads * row
    assert cache.data.nbytes == expected == 5 * KVCache.bytes_per_block(config, 16, dtype)
    before, size = cache.data.clone().flatten(3), 16 * config.num_key_value_heads * config.head_dim
    k, v = cache.layer(1)
    assert k.shape == v.shape == (5, 16, config.num_key_value_heads, config.head_dim)
    for i, x in enumerate((k, v)):
        assert torch.equal(x.flatten(1), before[1, :, i, :size])
    assert k.data_ptr() == cache.data[1].data_ptr(), "a layer must be a view"
    cache.copy_blocks([])
    assert torch.equal(cache.data.flatten(3), before)
    cache.copy_blocks([(0, 3), (0, 4), (1, 2)])
    assert torch.equal(cache.data.flatten(3), before[:, [0, 1, 1, 0, 0]])


def test_codes_hold_nearly_twice_the_tokens():
    sizes = [KVCache.bytes_per_block(small_config(head_dim=128), 16, x) for x in (torch.bfloat16, torch.int8)]
    assert sizes[0] / sizes[1] == 256 / 132


def test_scales_stand_behind_the_codes_of_their_block():
    config = small_config()
    cache = KVCache(config, 3, 16, device="cpu", dtype=torch.int8)
    cache.data.zero_()
    assert KVCache(config, 3, 16, device="cpu", dtype=torch.float16).scales(0) is None
    number = 0
    for layer in range(config.num_hidden_layers):
        for scale, codes in zip(cache.scales(layer), cache.layer(layer), strict=True):
            assert scale.shape == codes.shape[:3] and scale.dtype == torch.float32
            scale.copy_(torch.arange(number, number + scale.numel()).view(scale.shape))
            number += scale.numel()
            assert (codes == 0).all(), "a scale lies in the codes"
    everything = torch.cat([x.flatten() for i in range(config.num_hidden_layers) for x in cache.scales(i)])
    assert torch.equal(everything, torch.arange(number).float()), "two scales share a place"


@DTYPES
def test_many_blocks_are_copied_in_parts(dtype):
    count = COPIED_AT_ONCE + 3
    cache = filled(small_config(), 2 * count, dtype)
    before = cache.data[:, :count].clone()
    cache.copy_blocks([(i, 2 * count - 1 - i) for i in range(count)])
    assert torch.equal(cache.data[:, :count], before) and torch.equal(cache.data[:, count:].flip(1), before)


@DTYPES
def test_addresses_say_where_each_layer_begins_in_caches_of_any_size(dtype):
    config, strides = small_config(), set()
    addresses = torch.zeros(config.num_hidden_layers, 4 if dtype == torch.int8 else 2, dtype=torch.int64)
    for num_blocks in (3, 7):
        cache = filled(config, num_blocks, dtype, addresses=addresses)
        for index, own in enumerate(addresses.tolist()):
            tensors = *cache.layer(index), *(cache.scales(index) or ())
            assert [x.data_ptr() for x in tensors] == own
            assert all(address % 16 == 0 for address in own), "kernels take them as multiples of 16"
            strides.add(tuple(x.stride() for x in tensors))
    assert len(strides) == 1
