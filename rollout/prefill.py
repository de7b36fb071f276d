"""Prefill: the uncached tokens of some sequences in one forward, whose keys and values go to the cache."""

import numpy as np
import torch

from .attention import PagedAttention
from .kv_cache import on_device


class PrefillState:
    """The inputs of a prefill of T tokens of S sequences, on the device, and its result; both may be padded.

    ids, positions, slots (T,) int64; last (S,) int64: the last token of each sequence; table (S, width), lens (S,)
    and cu_seqlens (S + 1,) int32, as in ``PagedAttention``; hidden_states (S, D) of the last tokens. Padding tokens
    come last, belong to no sequence and are not stored; padding sequences have no tokens.
    """

    def __init__(self, tokens, sequences, width, device):
        self.sizes = tokens, sequences, width
        self.words = torch.zeros(3 * tokens + sequences, dtype=torch.int64, device=device)
        self.ids, self.positions, self.slots, self.last = self.words.split(
            [tokens, tokens, tokens, sequences]
        )
        self.slots.fill_(-1)
        self.index = torch.zeros(sequences * (width + 2) + 1, dtype=torch.int32, device=device)
        table, self.lens, self.cu_seqlens = self.index.split([sequences * width, sequences, sequences + 1])
        self.table = table.view(sequences, width)
        self.hidden_states = None

    def fill(self, parts, block_size):
        """Write ``parts``: (sequence, stop), the tokens from its ``num_cached`` to ``stop``."""
        tokens, sequences, width = self.sizes
        ids, positions, slots = np.zeros((3, tokens), dtype=np.int64)
        slots[:] = -1
        last = np.zeros(sequences, dtype=np.int64)
        table, lens = np.zeros((sequences, width), dtype=np.int32), np.zeros(sequences, dtype=np.int32)
        cu_seqlens, end = np.zeros(sequences + 1, dtype=np.int32), 0
        for row, (sequence, stop) in enumerate(parts):
            start, begin = sequence.num_cached, end
            end += stop - start
            ids[begin:end] = sequence.token_ids[start:stop]
            positions[begin:end] = position = np.arange(start, stop)
            table[row, : len(sequence.block_table)] = sequence.block_table
            slots[begin:end] = (
                table[row, position // block_size].astype(np.int64) * block_size + position % block_size
            )
            lens[row], last[row], cu_seqlens[row + 1] = stop, end - 1, end
        cu_seqlens[len(parts) + 1 :] = end
        device = self.words.device
        self.words.copy_(on_device(np.concatenate([ids, positions, slots, last]), device))
        self.index.copy_(on_device(np.concatenate([table.ravel(), lens, cu_seqlens]), device))


def prefill_step(model, cache, state):
    """Compute ``state``'s tokens, store their keys and values, and leave the last hidden states in it."""
    attend = PagedAttention(cache, state.slots, None, state.table, state.lens, state.cu_seqlens)
    state.hidden_states = model(state.ids, state.positions, attend)[state.last]
