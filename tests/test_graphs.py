"""When captured steps are kept and when they are dropped, on a stand-in for CUDA's graphs."""

import contextlib
import gc
import itertools
import weakref

import pytest
import torch
from checkpoints import small_config
from nanogrpo.rollout import LoraConfig
from nanogrpo.rollout import graphs as graphs_module
from nanogrpo.rollout.graphs import MAX_GRAPHS, GraphPool, StepGraphs
from tiny import perturb_adapters, tiny_policy


class Graph:
    def replay(self):
        pass


class Pool:
    def __init__(self):
        self.id = next(Pool.ids)
        Pool.alive.add(self)


@pytest.fixture
def captures(monkeypatch):
    """The pool of every capture, which is there while it is captured, on the one stream whose memory it has."""
    pools = []
    Pool.ids, Pool.alive = itertools.count(1), weakref.WeakSet()

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        assert pool in {found.id for found in Pool.alive} and stream == "stream of 0"
        pools.append(pool)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(graphs_module, "capture_stream", "stream of {}".format)
    monkeypatch.setattr(GraphPool, "working", lambda pool: contextlib.nullcontext(pool.open()))
    return pools


def get(graphs, *key):
    runs = []
    state, run = graphs.get(key, lambda: (object(), lambda: runs.append(1)))
    assert len(runs) in (0, 2), "run once to compile, once to capture"
    run()
    return state


def test_graphs_live_through_optimiser_steps(captures):
    policy = tiny_policy(lora=LoraConfig(r=4))
    graphs = StepGraphs(policy)
    first, second = get(graphs, "decode", 8), get(graphs, "decode", 16)
    optimizer = torch.optim.AdamW(policy.adapters().values(), lr=0.1)
    for parameter in policy.adapters().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    perturb_adapters(policy)
    assert get(graphs, "decode", 8) is first and get(graphs, "decode", 16) is second and first is not second
    with policy.disable_adapters():
        assert get(graphs, "decode", 8) is not first
    assert get(graphs, "decode", 8) is first and len(captures) == 3 and len(set(captures)) == 1


def test_graphs_of_one_policy_share_a_pool(captures):
    policy = tiny_policy()
    first, second = StepGraphs(policy), StepGraphs(policy)
    get(first, "decode", 8), get(second, "layers", 8)
    first.clear()
    get(first, "decode", 8)
    assert len(captures) == 3 and len(set(captures)) == 1
    first.clear()
    assert len(Pool.alive) == 1, "a pool outlives the graphs of one"
    second.clear()
    assert not Pool.alive, "no memory without graphs"
    get(first, "decode", 8)
    assert len(set(captures)) == 2
    get(StepGraphs(tiny_policy()), "decode", 8)
    assert len(set(captures)) == 3


def test_a_pool_takes_one_piece_until_it_is_given_back(captures, monkeypatch):
    policy, sizes = tiny_policy(), []
    pool, graphs = policy.graph_pool, StepGraphs(policy)
    monkeypatch.setattr(torch, "empty", lambda size, **options: sizes.append(size))
    pool.reserve(100), pool.reserve(100), pool.reserve(60)
    get(graphs, "decode", 8)
    pool.reserve(100)
    assert sizes == [100] and set(captures) == {pool.pool.id}
    pool.reserve(140)
    assert sizes == [100, 140] and len(Pool.alive) == 1
    pool.give_back()
    assert pool.room == 140 and len(Pool.alive) == 1, "a graph still has it"
    graphs.clear()
    assert pool.room == 0 and not Pool.alive
    pool.reserve(60)
    assert sizes == [100, 140, 60]


def test_a_step_of_many_parts_is_captured_part_by_part(captures):
    graphs, runs = StepGraphs(tiny_policy()), []
    parts = [lambda i=i: runs.append(i) for i in range(4)]
    state, replays = graphs.get(("layers", 8), lambda: ("state", parts))
    assert state == "state" and len(replays) == len(captures) == 4
    assert runs == [3, 0, 1, 2, 3], "the last runs to compile, then all are captured"


def change_scaling(policy, tmp_path):
    other = tiny_policy(lora=LoraConfig(r=4, alpha=99))
    other.save_adapter(tmp_path)
    places = [parameter.data_ptr() for parameter in policy.adapters().values()]
    policy.load_adapter(tmp_path)
    assert [parameter.data_ptr() for parameter in policy.adapters().values()] == places


def replace_adapters(policy, tmp_path):
    policy.add_adapters(LoraConfig(r=4))


def remove_adapters(policy, tmp_path):
    for _, linear in policy.model.linears():
        linear.remove_adapters()


def shrink_in_place(policy, tmp_path):
    """Adapters of a lower rank at the same addresses."""
    linear = dict(policy.model.linears())["model.layers.1.self_attn.o_proj"]
    linear.lora_a, linear.lora_b = (linear.lora_a[0][:2],), linear.lora_b


def move_head(policy, tmp_path):
    policy.model.head = policy.model.head.clone()


def move_weight(policy, tmp_path):
    linear = dict(policy.model.linears())["model.layers.1.mlp.down_proj"]
    linear.weight = linear.weight.clone()


@pytest.mark.parametrize(
    "change",
    [change_scaling, replace_adapters, remove_adapters, shrink_in_place, move_head, move_weight],
    ids=lambda f: f.__name__,
)
def test_what_a_graph_holds_drops_it(captures, tmp_path, change):
    policy = tiny_policy(small_config(), lora=LoraConfig(r=4))
    graphs = StepGraphs(policy)
    first = get(graphs, "decode", 8)
    change(policy, tmp_path)
    second = get(graphs, "decode", 8)
    assert second is not first and get(graphs, "decode", 8) is second
    assert len(graphs.captured) == 1 and len(set(captures)) == 2, (
        "the pool of the dropped graphs is used again"
    )


def test_no_more_graphs_than_stated(captures):
    graphs = StepGraphs(tiny_policy())
    states = [get(graphs, "decode", index) for index in range(MAX_GRAPHS)]
    assert [get(graphs, "decode", index) for index in range(MAX_GRAPHS)] == states, "a hit dropped the graphs"
    get(graphs, "decode", MAX_GRAPHS)
    assert len(graphs.captured) == 1
    assert get(graphs, "decode", 0) is not states[0]


def test_a_capture_that_failed_leaves_nothing_behind(captures):
    graphs = StepGraphs(tiny_policy())
    calls = []

    def step():
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("while it was captured")

    with pytest.raises(torch.OutOfMemoryError):
        graphs.get(("decode", 8), lambda: (object(), step))
    assert get(graphs, "decode", 8) and len(set(captures)) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_collected_while_a_graph_is_captured(captures, fails):
    collecting = []

    def step():
        collecting.append(gc.isenabled())
        if fails and len(collecting) == 2:
            raise RuntimeError("no capture")

    graphs = StepGraphs(tiny_policy())
    with pytest.raises(RuntimeError, match="no capture") if fails else contextlib.nullcontext():
        graphs.get(("decode", 8), lambda: (None, step))
    assert collecting == [True, False] and gc.isenabled()
