"""The paged KV cache: block arithmetic on plain integers, and the tensors that it indexes.

A block holds the keys and values of ``block_size`` consecutive tokens. Sequences own blocks through their block
tables; a full block may be shared by any number of sequences that begin with the same tokens (PagedAttention,
arXiv 2309.06180).
"""

import contextlib
import math

import numpy as np
import torch

COPIED_AT_ONCE = 32  # blocks that stand once more in memory while they are copied


class OutOfBlocks(Exception):
    """No free block is left; the scheduler answers by preempting."""


class BlockAllocator:
    """Reference-counted block ids with a prefix index: equal leading blocks are found and shared while they live."""

    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))
        self.by_content = {}  # (previous block or -1, its tokens) -> block
        self.content = {}  # block -> its key in by_content

    @property
    def num_free(self):
        return len(self.free)

    def allocate(self):
        """A fresh block with one owner; raises ``OutOfBlocks``."""
        return self.allocate_many(1)[0]

    def allocate_many(self, count):
        """List of ``count`` fresh blocks with one owner each; if fewer are free, takes none: ``OutOfBlocks``."""
        if count > len(self.free):
            raise OutOfBlocks
        kept = len(self.free) - count
        blocks = self.free[kept:][::-1]
        del self.free[kept:]
        for block in blocks:
            self.ref_counts[block] = 1
        return blocks

    def share(self, block):
        """One more owner for a live block."""
        if self.ref_counts[block] == 0:
            raise ValueError(f"block {block} is free and cannot be shared")
        self.ref_counts[block] += 1
        return block

    def release(self, block):
        """One owner fewer; a block without owners is free and forgotten by the prefix index."""
        self.release_many([block])

    def release_many(self, blocks):
        """One owner fewer for each of ``blocks``, in their order."""
        for block in blocks:
            owners = self.ref_counts[block] - 1
            if owners < 0:
                raise ValueError(f"block {block} is already free")
            self.ref_counts[block] = owners
            if owners == 0:
                if block in self.content:
                    del self.by_content[self.content.pop(block)]
                self.free.append(block)

    def find(self, previous, tokens):
        """The live full block that holds ``tokens`` after block ``previous`` (-1: at the start), or None."""
        return self.by_content.get((previous, tokens))

    def publish(self, block, previous, tokens):
        """Let later sequences find this full block by its content, unless an equal one is published already."""
        key = (previous, tokens)
        if key not in self.by_content and block not in self.content:
            self.by_content[key] = block
            self.content[block] = key

    def check_invariants(self, tables=None):
        """Every block is free xor owned; with all live block ``tables`` given, counts equal the owners."""
        assert len(set(self.free)) == len(self.free)
        for block, count in enumerate(self.ref_counts):
            assert (count == 0) == (block in self.free), f"block {block}: {count} owners"
        assert {block: key for key, block in self.by_content.items()} == self.content
        for previous, _ in self.by_content:
            assert previous == -1 or self.ref_counts[previous] > 0, (
                "a published block outlived the one before it"
            )
        if tables is not None:
            owners = [0] * self.num_blocks
            for table in tables:
                for block in table:
                    owners[block] += 1
            assert owners == self.ref_counts, "reference counts differ from the block tables"


class KVCache:
    """Keys and values of all layers in one tensor (layers, num_blocks, 2, block_size, KV heads, head_dim).

    With dtype int8 they are codes with a float32 scale for each row of head_dim, which decoded errs by at most 1/254
    of the row's largest value (see ``kernels.kv_store``); data is then (layers, num_blocks, 2, bytes), a block's
    codes and behind them its scales.

    Strides within a layer do not depend on num_blocks. On a GPU ``addresses`` (layers, 2) int64 (codes: 4)
    holds where the keys and the values of each layer begin, and their scales: kernels that were captured in a CUDA
    graph read it when they run, so a graph serves a later cache of other size and place, given the same
    ``addresses``. steps: the captured steps that have been looked up for this cache, by key.
    """

    def __init__(self, config, num_blocks, block_size, *, device, dtype, addresses=None):
        self.block_size = block_size
        self.num_blocks = num_blocks
        layers, self.rows = config.num_hidden_layers, (block_size, config.num_key_value_heads)
        shape = *self.rows, config.head_dim
        self.codes = math.prod(shape) if dtype == torch.int8 else None  # bytes of a block, without its scales
        if self.codes is not None:
            shape = (self.codes + 4 * math.prod(self.rows),)
        # Apart from all other memory: it goes back whole, and nothing that outlives a rollout settles in its place.
        pool = torch.cuda.MemPool() if torch.device(device).type == "cuda" else None
        with contextlib.nullcontext() if pool is None else torch.cuda.use_mem_pool(pool, device):
            self.data = torch.empty((layers, num_blocks, 2, *shape), device=device, dtype=dtype)
        self.pool = pool  # after the data, which it outlives
        self.steps = {}
        self.addresses = addresses
        if addresses is not None:
            starts = [
                [x.data_ptr() for x in (*self.layer(i), *(self.scales(i) or ()))] for i in range(layers)
            ]
            addresses.copy_(torch.tensor(starts))

    @staticmethod
    def bytes_per_block(config, block_size, dtype):
        width = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
        return 2 * config.num_hidden_layers * block_size * config.num_key_value_heads * width

    def layer(self, index):
        """(k_cache, v_cache) of one layer, each (num_blocks, block_size, KV heads, head_dim)."""
        k, v = self.data[index].unbind(1)
        if self.codes is not None:
            k, v = (x[:, : self.codes].unflatten(1, (*self.rows, -1)) for x in (k, v))
        return k, v

    def scales(self, index):
        """Those of the codes that ``layer`` gives, each (num_blocks, block_size, KV heads); None without codes."""
        if self.codes is None:
            return None
        k, v = self.data[index, :, :, self.codes :].view(torch.float32).unflatten(2, self.rows).unbind(1)
        return k, v

    def copy_blocks(self, pairs):
        """Copy whole blocks, all layers at once; pairs: (source, destination) block ids, none both."""
        for start in range(0, len(pairs), COPIED_AT_ONCE):
            source, destination = on_device(pairs[start : start + COPIED_AT_ONCE], self.data.device).unbind(1)
            self.data[:, destination] = self.data[:, source]


def on_device(values, device):
    """Tensor of an array or of nested lists of integers; the host does not wait for work that a GPU has to do."""
    tensor = torch.from_numpy(np.asarray(values))
    if (
        device.type == "cuda"
    ):  # a copy from other memory would wait; torch keeps pinned memory until it is copied
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
