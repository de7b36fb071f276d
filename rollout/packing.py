"""Many sequences as one packed tree of tokens, so that what they share is computed once.

G completions of a prompt repeat the prompt G times, and all prompts of a task repeat its instructions. Laid out as
a tree in preorder, every distinct prefix is one token: its position is its depth, and attention follows the rule
of ``TreeAttention``. Values and gradients equal those of separate sequences up to the order of float additions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class PackedTree:
    """T distinct tokens for N tokens of S sequences; every tensor is int64.

    input_ids, positions, key_end, parent (T,): token, depth, end of the subtree, parent's index (-1: a root).
    node (N,): the index of every token of the flat, concatenated sequences.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    key_end: torch.Tensor
    parent: torch.Tensor
    node: torch.Tensor

    def to(self, device):
        return PackedTree(**{name: value.to(device) for name, value in vars(self).items()})

    def padded(self, tokens):
        """The same tree in ``tokens`` tokens: those added are roots that only they themselves see."""
        T = len(self.input_ids)
        pad = lambda values, value: F.pad(values, (0, tokens - T), value=value)
        key_end = pad(self.key_end, 0)
        key_end[T:] = torch.arange(T, tokens) + 1
        return PackedTree(
            pad(self.input_ids, 0), pad(self.positions, 0), key_end, pad(self.parent, -1), self.node
        )


class _Tree:
    """A tree of tokens that grows a sequence at a time."""

    def __init__(self, share_prefix):
        self.share_prefix = share_prefix
        self.tokens, self.parents, self.children = [], [], [{}]

    def add(self, sequence):
        """Insert ``sequence`` and return the creation index of each of its tokens."""
        path, node = [], -1
        for token in sequence:
            key = token if self.share_prefix or node >= 0 else ("root", len(self.tokens))
            child = self.children[node + 1].get(key)
            if child is None:
                child = len(self.tokens)
                self.children[node + 1][key] = child
                self.tokens.append(token)
                self.parents.append(node)
                self.children.append({})
            path.append(child)
            node = child
        return path

    def preorder(self):
        """Creation indices in preorder, and for each creation index the end of its subtree in that order."""
        order, ends, stack = [], [0] * len(self.tokens), [-1]
        while stack:
            node = stack.pop()
            if node < -1:
                ends[-node - 2] = len(order)
                continue
            if node >= 0:
                order.append(node)
                stack.append(-node - 2)
            stack.extend(reversed(self.children[node + 1].values()))
        return order, ends


def pack_tree(sequences, *, share_prefix=True):
    """Pack ``sequences`` (lists of token ids) into a ``PackedTree``; without sharing each stays a chain."""
    tree = _Tree(share_prefix)
    paths = [tree.add(sequence) for sequence in sequences]
    order, ends = tree.preorder()
    rank = [0] * len(order)
    for position, node in enumerate(order):
        rank[node] = position
    depth = []
    for parent in tree.parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    ints = lambda values: torch.tensor(values, dtype=torch.int64)
    return PackedTree(
        input_ids=ints([tree.tokens[node] for node in order]),
        positions=ints([depth[node] for node in order]),
        key_end=ints([ends[node] for node in order]),
        parent=ints([rank[p] if (p := tree.parents[node]) >= 0 else -1 for node in order]),
        node=ints([rank[node] for path in paths for node in path]),
    )


def split_by_budget(sequences, token_budget, *, share_prefix=True, unit=1):
    """Cut ``sequences`` in order into runs of at most ``token_budget`` packed tokens: a list of index lists.

    ``unit`` sequences in a row stay together (2: pairs). A unit that is longer than the budget is a run of its own.
    """
    runs, tree = [[]], _Tree(share_prefix)
    for first in range(0, len(sequences), unit):
        indices = range(first, min(first + unit, len(sequences)))
        for attempt in (tree, _Tree(share_prefix)):
            for index in indices:
                attempt.add(sequences[index])
            if len(attempt.tokens) <= token_budget:
                break
        if attempt is not tree:
            runs.append([])
            tree = attempt
        runs[-1].extend(indices)
    return [run for run in runs if run]
