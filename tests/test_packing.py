"""Packed trees against their definition: distinct prefixes in preorder."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.rollout import pack_tree, split_by_budget

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=8)


def prefixes(sequences):
    return {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}


def path(tree, node):
    """Nodes from the root down to ``node`` along the parents."""
    nodes = [node]
    while (node := tree.parent[node].item()) >= 0:
        nodes.append(node)
    return nodes[::-1]


@given(SEQUENCES, st.booleans())
def test_tree_holds_every_sequence(sequences, share_prefix):
    tree = pack_tree(sequences, share_prefix=share_prefix)
    T = tree.input_ids.numel()
    assert T == (len(prefixes(sequences)) if share_prefix else sum(map(len, sequences)))
    assert all(value.dtype == torch.int64 for value in vars(tree).values())
    flat = iter(tree.node.tolist())
    for sequence in sequences:
        nodes = [next(flat) for _ in sequence]
        assert tree.input_ids[nodes].tolist() == sequence
        assert tree.positions[nodes].tolist() == list(range(len(sequence)))
        assert tree.parent[nodes].tolist() == [-1, *nodes[:-1]][: len(nodes)]
    assert next(flat, None) is None
    assert set(tree.node.tolist()) == set(range(T)), "a node belongs to no sequence"


@given(SEQUENCES, st.booleans())
def test_attention_rule_selects_the_ancestors(sequences, share_prefix):
    tree = pack_tree(sequences, share_prefix=share_prefix)
    for i in range(tree.input_ids.numel()):
        assert tree.parent[i] < i < tree.key_end[i]
        seen = [j for j in range(i + 1) if i < tree.key_end[j]]
        assert seen == path(tree, i)


def test_equal_sequences_stay_apart_without_sharing():
    tree = pack_tree([[7, 8], [7, 8]], share_prefix=False)
    assert tree.input_ids.tolist() == [7, 8, 7, 8]
    assert tree.parent.tolist() == [-1, 0, -1, 2]
    assert tree.key_end.tolist() == [2, 2, 4, 4]
    assert tree.node.tolist() == [0, 1, 2, 3]
    assert pack_tree([[7, 8], [7, 8]]).node.tolist() == [0, 1, 0, 1]


def test_to_moves_every_tensor():
    tree = pack_tree([[1, 2]]).to("meta")
    assert {value.device.type for value in vars(tree).values()} == {"meta"}


def packed_size(sequences, share_prefix):
    return pack_tree(sequences, share_prefix=share_prefix).input_ids.numel()


@given(SEQUENCES, st.integers(1, 20), st.booleans())
def test_split_by_budget(sequences, budget, share_prefix):
    runs = split_by_budget(sequences, budget, share_prefix=share_prefix)
    assert [index for run in runs for index in run] == list(range(len(sequences)))
    assert all(run for run in runs)
    for run in runs:
        assert len(run) == 1 or packed_size([sequences[i] for i in run], share_prefix) <= budget
    for run, after in zip(runs, runs[1:], strict=False):  # no run could have taken one more
        assert packed_size([sequences[i] for i in [*run, after[0]]], share_prefix) > budget


def test_a_sequence_over_the_budget_stands_alone():
    assert split_by_budget([[1], [1, 2, 3], [1, 2, 3], [2]], 2) == [[0], [1], [2], [3]]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=8), st.integers(3, 30))
def test_pairs_stay_together(sequences, budget):
    sequences = sequences[: len(sequences) // 2 * 2]
    runs = split_by_budget(sequences, budget, unit=2)
    assert [i for run in runs for i in run] == list(range(len(sequences)))
    assert all(run[0] % 2 == 0 and len(run) % 2 == 0 for run in runs)
    for run in runs:
        assert len(run) == 2 or packed_size([sequences[i] for i in run], True) <= budget
