"""The benchmark harness: what it measures, what it refuses to time, and that BENCHMARKS.md renders its records."""

import contextlib
import importlib.util
import json
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import bench_linear_logprob as bench
import cases
import comparison
import measurement
import pytest
import render
import torch
from comparison import Error, Peer
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import fused_linear_logprob
from nanogrpo.rollout.checkpoint import open_checkpoint, resolve_checkpoint
from nanogrpo.rollout.layer_steps import TOKENS, LayerSteps
from tiny import KeptSteps

MIB = 2**20
TINY = cases.Case("tiny head", "float32", {"N": 13, "D": 16, "V": 301})
MASKED = cases.Case("tiny head, masked", "float32", {"N": 13, "D": 16, "V": 301, "kept": 5})
ENVIRONMENT = {
    "date": "2026-01-02", "commit": "abc1234", "python": "3.12.3", "torch": "2.13.0", "triton": "3.7.1",
    "device": "CPU Some Name", "threads": 1,
    "roofs": {"matmul": 1e11, "matmul_dtype": "float32", "copy": 2e10, "read": 1e10},
}  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(comparison, "SECONDS", 0)
    monkeypatch.setattr(comparison.gc, "collect", lambda: 0)  # a tenth of a second for each contender


def constant(value):
    """A peer whose operation returns ``value``, or raises it."""

    def operation():
        if isinstance(value, Exception):
            raise value
        return value

    return lambda: operation


def compare(*peers, device="cpu", **arguments):
    """A comparison of constants; the truth is 1, and 1.5 and more is plainly wrong."""
    return comparison.compare(
        TINY, "forward", device, peers=list(peers), call=lambda operation: [operation],
        verify=lambda result: {"error": Error(abs(result - 1), 0.5)}, flops=2e9, nbytes=1e6, **arguments,
    )  # fmt: skip


def test_the_document_is_the_rendering_of_the_committed_records():
    assert render.render() == render.DOCUMENT.read_text(encoding="utf-8"), "run `python benchmarks/render.py`"


def test_every_contender_runs_once_a_round_and_copies_are_averaged():
    ran = []
    calls = {"once": [lambda: ran.append("once")], "twice": [lambda: time.sleep(0.01)] * 2}
    times = measurement.Race("cpu", calls).run(seconds=0, warmup=2, fewest=3)
    assert len(ran) == 5
    assert times["once"]["rounds"] == times["twice"]["rounds"] == 3
    assert 10 <= times["twice"]["ms"] < 20  # two sleeps of 10 ms: the mean, not the sum


def test_rounds_fill_the_time_and_can_be_driven_by_another_tool():
    counts = []
    race = measurement.Race("cpu", {"sleep": [lambda: time.sleep(0.002)]})
    times = race.run(seconds=60, most=7, drive=lambda round, count: (counts.append(count), round()))
    assert counts == [7]
    assert times["sleep"]["rounds"] == 1


def test_spread_is_the_median_between_two_percentiles():
    assert measurement.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"ms": 3.0, "p20": 1.8, "p80": 4.2, "rounds": 5}
    assert measurement.spread([2.0]) == {"ms": 2.0, "p20": 2.0, "p80": 2.0, "rounds": 1}


@given(st.lists(st.integers(1, 100)), st.randoms())
def test_highest_is_the_peak_of_what_is_alive(sizes, random):
    alive, changes, top = [], [], 0
    for size in sizes:
        alive.append(size)
        changes.append(size)
        top = max(top, sum(alive))
        if random.random() < 0.5:
            changes.append(-alive.pop(random.randrange(len(alive))))
    assert measurement.highest(changes) == top


def test_peak_memory_counts_temporaries_and_the_result(device):
    x = torch.randn(MIB, device=device)  # 4 MiB, the input: not counted

    def call():
        y = x + 1
        z = y * 2
        del y
        return z[:1].clone()

    assert 8 * MIB <= measurement.peak_bytes(call, device.type) < 8 * MIB + 4096
    assert 4 * MIB <= measurement.peak_bytes(lambda: x + 1, device.type) < 4 * MIB + 4096


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_events_time_the_device_and_not_the_launch(graph):
    x = torch.randn(4096, 4096, device="cuda")
    calls = {
        "one": [lambda: x @ x],
        "four": [lambda: [x @ x for _ in range(4)]],
        "copies": [lambda: x @ x] * 4,
    }
    times = measurement.Race("cuda", calls, graph=graph).run(seconds=0.2)
    assert 3 < times["four"]["ms"] / times["one"]["ms"] < 5
    assert 0.7 < times["copies"]["ms"] / times["one"]["ms"] < 1.4


@pytest.mark.gpu
def test_poison_shows_in_memory_that_nobody_writes(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    measurement.poison("cuda")
    for elements in (1000, 10**7):
        assert torch.empty(elements, device="cuda").isnan().any()


@pytest.mark.gpu
def test_rotated_copies_exceed_the_cache():
    copies = measurement.rotated((torch.randn(1000, 1000, device="cuda"),), "cuda")
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    assert sum(tensor.nbytes for (tensor,) in copies) >= 3 * cache
    assert len({tensor.data_ptr() for (tensor,) in copies}) == len(copies)


def test_who_does_not_run_is_recorded_with_the_reason():
    record = compare(
        Peer("ours", None, constant(1.0)),
        Peer("inexact", "torch", constant(1.4)),
        Peer("wrong", "torch", constant(1.6)),
        Peer("nan", "torch", constant(float("nan"))),
        Peer("broken", "torch", constant(RuntimeError("no kernel image\nmore"))),
        Peer("missing", "no-such-distribution", constant(1.0)),
        Peer("elsewhere", "torch", constant(1.0), cuda_only=True),
    )
    contenders = record["contenders"]
    assert [name for name, result in contenders.items() if "ms" in result] == ["ours", "inexact"]
    assert contenders["inexact"]["errors"]["error"] == pytest.approx(0.4)
    assert contenders["inexact"]["version"] == torch.__version__
    assert {name: result["failed"] for name, result in contenders.items() if "failed" in result} == {
        "wrong": "wrong: error 6.0e-01",
        "nan": "wrong: error nan",
        "broken": "RuntimeError: no kernel image",
        "missing": "no-such-distribution is not installed",
        "elsewhere": "needs CUDA",
    }


def test_a_slow_peer_is_called_once_and_then_timed():
    calls = []
    peers = [
        Peer(name, None, lambda name=name: lambda: calls.append(name) or 1.0, rounds=rounds)
        for name, rounds in (("ours", None), ("slow", 2), ("slower", 1))
    ]
    record = compare(*peers, rounds={"warmup": 2, "fewest": 5})
    assert (calls.count("slow"), calls.count("slower")) == (3, 1)
    assert [result["rounds"] for result in record["contenders"].values()] == [5, 2, 1]


def test_what_a_graph_reads_outlives_it(monkeypatch):
    monkeypatch.setattr(measurement, "captured", lambda *call: lambda: None)  # a graph holds addresses alone
    x = torch.zeros(1)
    lap, alive = measurement.lap_of([lambda x=x: x + 1], graph=True), weakref.ref(x)
    del x
    assert alive() is not None and lap.copies == 1
    del lap
    assert alive() is None


@pytest.fixture
def captures(monkeypatch):
    """Stands in for CUDA's graphs: a replay computes the last captured call again, into the tensors it returned."""

    class Graph:
        def replay(self):
            for result, operation in captured:
                result.copy_(operation())

    captured, nothing = [], lambda *arguments, **options: contextlib.nullcontext()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": nothing, "graph": nothing,
        "CUDAGraph": Graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return captured


def test_what_a_graph_has_missed_is_wrong(captures):
    def replayed(missed):
        """A peer whose graph computes its result, or nothing."""

        def operation():
            result = torch.ones(2)
            captures[:] = [] if missed else [(result, lambda: torch.ones(2))]
            return result

        return lambda: operation

    arguments = {"graph": True, "flops": 1, "nbytes": 1, "call": lambda operation: [operation]}
    arguments["verify"] = lambda result: {"error": comparison.distance(result, torch.ones(2).double(), 0.5)}
    peers = [Peer("ours", None, replayed(False)), Peer("missed", None, replayed(True))]
    found = comparison.compare(TINY, "forward", "cpu", peers=peers, **arguments)["contenders"]
    assert "ms" in found["ours"] and found["missed"]["failed"] == "ValueError: replayed: wrong: error nan"
    with pytest.raises(ValueError, match="replayed: wrong"):
        comparison.compare(TINY, "forward", "cpu", peers=peers[::-1], **arguments)


def test_the_memory_of_graphs_is_in_use(monkeypatch):
    segments = [((0, 0), 100, 40), ((0, 3), 50, 20), ((1, 0), 7, 0)]
    names = "segment_pool_id", "total_size", "allocated_size"
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 60)
    monkeypatch.setattr(
        torch.cuda,
        "memory_snapshot",
        lambda: [dict(zip(names, segment, strict=True)) for segment in segments],
    )
    assert measurement.allocated("cuda") == 60 + 30 + 7 and measurement.allocated("cpu") == 0


def test_a_layer_as_trained_runs_from_captured_steps(monkeypatch):
    """The path of a GPU: padded rows, a graph for each direction, and the truth's values."""
    module = importlib.import_module("bench_decoder_layer")
    policy, found = module.Problem(LAYER).policy, []
    steps = LayerSteps(policy, graphs=False)
    steps.graphs = KeptSteps()
    monkeypatch.setattr(policy, "steps", steps)

    def compare(case, mode, *, call, verify, **others):
        [step] = call(module.ours())
        for _ in range(2):
            y, dx, *gradients = step()
            assert len(y) == len(dx) == TOKENS > LAYER.shape["sequences"] * LAYER.shape["length"]
            found.append(verify((y, dx, *gradients)))

    module.test_decoder_layer(compare, LAYER)
    assert found[0] == found[1] and comparison.wrong(found[0]) is None
    assert {key[:2] for key in steps.graphs.captured} == {("forward", TOKENS), ("backward", TOKENS)}


def test_a_process_is_ended_in_time_and_what_it_printed_counts(tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(
        "import sys, time\nprint('{\"step\": 1}', flush=True)\ntime.sleep(float(sys.argv[1]))\n"
    )
    assert comparison.in_process(script, 60, seconds=0.5) == comparison.in_process(script, 0) == [{"step": 1}]
    script.write_text("raise ValueError('why it failed')")
    for ranks in (None, 2):
        with pytest.raises(RuntimeError, match="ValueError: why it failed"):
            comparison.in_process(script, ranks=ranks)


@pytest.mark.parametrize("value, error", [(2.0, AssertionError), (RuntimeError("broken"), RuntimeError)])
def test_our_own_failure_is_an_error(value, error):
    with pytest.raises(error):
        compare(Peer("ours", None, constant(value)), Peer("torch", "torch", constant(1.0)))


def test_import_alone_skips_what_the_parents_import(tmp_path, monkeypatch):
    inner = tmp_path / "heavy_package" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (inner / "__init__.py").write_text("raise RuntimeError('imported')")
    (inner / "kernel.py").write_text("def late():\n    from . import other\n    return other.ANSWER")
    (inner / "other.py").write_text("ANSWER = 42")
    monkeypatch.syspath_prepend(tmp_path)
    assert comparison.import_alone("heavy_package.inner.kernel").late() == 42
    for name in [name for name in sys.modules if name.startswith("heavy_package")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_record_replaces_that_of_its_case_and_mode_alone(tmp_path):
    record = compare(Peer("ours", None, constant(1.0)))
    for mode, flops in (("forward", 1.0), ("forward + backward", 2.0), ("forward", 1 / 3)):
        comparison.store("some_op", ENVIRONMENT, record | {"mode": mode, "flops": flops}, tmp_path)
    records = json.loads((tmp_path / "cpu-some-name" / "some_op.json").read_text())
    assert [(r["mode"], r["flops"]) for r in records] == [("forward", 0.33333), ("forward + backward", 2.0)]
    assert records[0]["environment"] == ENVIRONMENT


@pytest.mark.parametrize("ours, ratio", [(2.0, "0.50 (faster)"), (8.0, "2.00 (slower)")])
def test_losses_show_as_plainly_as_wins(tmp_path, ours, ratio):
    record = compare(
        Peer("ours", None, constant(1.0)),
        Peer("peer", "torch", constant(1.0)),
        Peer("absent", "no-such-distribution", constant(1.0)),
        floor=("one matmul", lambda: None),
    )
    for name, ms in (("ours", ours), ("peer", 4.0), ("one matmul", 1.0)):
        record["contenders"][name] |= {"ms": ms, "p20": ms, "p80": ms}
    comparison.store("some_op", ENVIRONMENT, record | {"flops": 1e8, "bytes": 1e4}, tmp_path)
    text = render.render(tmp_path)
    assert ratio in text
    assert f"| {100 / ours:.0f}% |" in text  # 1e8 FLOP at 1e11 FLOP/s are 1 ms
    assert f"**ours** | {ours:.2f}" in text
    assert "Did not run: absent (no-such-distribution is not installed)." in text
    assert "commit abc1234: torch 2.13.0, Triton 3.7.1, Python 3.12.3, 1 thread." in text
    assert render.render(tmp_path) == text
    assert (
        render.verdict(record)
        == f"tiny head, forward: {ours:.2f} ms, {ours / 4:.2f} of the best peer's time (peer)"
    )


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (1234, "1,234"),
        (0.01234, "0.0123"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (123.4, "123"),
        (12345.6, "12,346"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert render.number(value) == text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_names_of_their_own(device):
    heads = cases.linear_logprob(device)
    assert len({case.name for case in heads}) == len(heads)
    assert all(0 < case.shape.get("kept", 1) <= case.shape["N"] for case in heads)


@pytest.mark.parametrize("case", [TINY, MASKED], ids=str)
def test_the_truth_is_that_of_autograd_in_float64(case, monkeypatch):
    monkeypatch.setattr(bench, "CHUNK", 100)
    problem = bench.Problem(case, "cpu")
    problem.weight = problem.weight.double()
    problem.hidden = problem.hidden.detach().double().requires_grad_()
    logprobs, grad = problem.step(bench.on_kept_rows(lambda h, w, t: -torch.nn.functional.cross_entropy(
        h @ w.T, t, reduction="none")), True)  # fmt: skip
    rows = torch.tensor([12, 0, 5])
    expected, expected_grad = problem.truth(rows)
    torch.testing.assert_close(logprobs[rows], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad[rows], expected_grad, rtol=1e-6, atol=1e-6)  # upstream is float32
    assert problem.mask is None or problem.mask.sum() == case.shape["kept"]


@pytest.mark.parametrize("case", [TINY, MASKED], ids=str)
@pytest.mark.parametrize("peer", [p for p in bench.PEERS if "compile" not in p.name], ids=lambda p: p.name)
def test_each_adapter_speaks_to_its_peer(peer, case):
    """Log-probs and gradient of every row, where the peer runs; those that compile take too long here."""
    if reason := comparison.absent(peer, "cpu"):
        pytest.skip(reason)
    problem = bench.Problem(case, "cpu")
    expected, expected_grad = problem.truth(torch.arange(case.shape["N"]))
    logprobs, grad = problem.step(peer.load(), True)
    assert (logprobs - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()
    assert torch.equal(problem.step(peer.load(), False)[0], logprobs)


def test_ours_is_the_public_operation():
    problem = bench.Problem(TINY, "cpu")
    got, _ = problem.step(bench.PEERS[0].load(), False)
    assert torch.equal(got, fused_linear_logprob(problem.hidden, problem.weight, problem.target_ids).logprobs)


def case(**shape):
    return cases.Case("tiny", "float32", shape)


LAYER, MODELS_OF_A_GROUP = cases.decoder_layer("cpu")[0], cases.training("cpu")
TREE = case(prefix=5, branches=3, length=7, H=4, KVH=2, D=16)
SMALL = {
    "linear_logprob": [{"case": TINY, "mode": mode} for mode in ("forward", "forward + backward")],
    "policy_loss": [{"case": case(B=3, T=5)}],
    "matmul_4bit": [{"case": case(M=3, K=64, N=128), "format": format} for format in ("nf4", "int4")],
    "dequantize": [{"case": case(N=8, K=64), "format": format} for format in ("nf4", "int4")],
    "small_kernels": [
        {"case": case(T=5, D=16, F=32, V=50, H=2, KVH=1, head_dim=8), "name": name, "mode": mode}
        for name, mode in (
            ("rms_norm with a residual", "forward"), ("rotary", "forward + backward"), ("swiglu", "forward"),
            ("sample_tokens", "forward"),
        )
    ],
    "lora_linear": [{"case": case(M=20, K=64, N=128, r=4), "mode": "forward + backward"}],
    "decode_linears": [
        {"case": cases.decode_linears("cpu")[0], "name": name} for name in ("qkv_proj", "gate_up_proj", "down_proj")
    ],
    "decoder_layer": [{"case": LAYER}],
    "training": [{"training": training} for training in MODELS_OF_A_GROUP],
    "tree_attention": [{"case": TREE, "mode": "forward + backward"}],
    "paged_attention": [{"case": case(S=3, C=37, shared=16, H=4, KVH=2, D=16)}],
    "generate": [{"rollout": rollout} for rollout in cases.generate("cpu")],
    "step": [{"step": cases.step("cpu")[0]}],
    "ranks": [{"scaling": cases.ranks("cpu")[0]}],
    "cold_start": [{"model": "tiny-qwen2"}],
}  # fmt: skip
PEERS_HERE = {
    "matmul_4bit": ["BLAS"],
    "lora_linear": ["PEFT + bitsandbytes", "torch over a dense base"],
    "decode_linears": ["PEFT + bitsandbytes", "dense linear"],
    "decoder_layer": ["transformers + PEFT + bitsandbytes", "ours, eager", "ours, eager, plan included"],
    "tree_attention": ["torch SDPA with a mask", "ours, prefix repeated"],
    "paged_attention": [
        "torch SDPA, contiguous keys",
        "ours, storing the last token",
        "ours, prefix stored for each",
    ],
    "generate": ["transformers generate"],
    "ranks": ["ours, on one", "ours, half of it on one"],
    "small_kernels": ["torch", "torch.compile"],
    "policy_loss": ["torch, loss alone", "ours, with every metric"],
    "cold_start": ["transformers + bitsandbytes"],
}


def test_a_file_that_has_taken_its_time_is_left(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_conftest", render.RESULTS.parent / "conftest.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    config = SimpleNamespace(stash={}, getoption=lambda name: ["bench_slow=10", "bench_other=1"])
    hooks.pytest_configure(config)
    item, times = SimpleNamespace(path=Path("bench_slow.py"), config=config), iter((100.0, 109.0, 111.0))
    monkeypatch.setattr(hooks, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(hooks.gc, "freeze", lambda: None)
    hooks.pytest_runtest_setup(item)
    hooks.pytest_runtest_setup(item)
    with pytest.raises(pytest.skip.Exception, match="bench_slow has taken its 10 seconds"):
        hooks.pytest_runtest_setup(item)


def test_every_benchmark_has_a_tiny_run():
    files = {path.stem.removeprefix("bench_") for path in render.RESULTS.parent.glob("bench_*.py")}
    assert files == set(SMALL)


@pytest.mark.parametrize("operation", SMALL)
def test_every_benchmark_runs(operation, monkeypatch, capsys, tmp_path):
    """Each at a tiny size: every contender that can run here is checked against the truth, timed and rendered."""
    module, records = importlib.import_module(f"bench_{operation}"), []
    monkeypatch.setattr(
        comparison, "with_peak", lambda call, device: (call(), 0)
    )  # the profiler takes a second
    monkeypatch.setattr(comparison, "peak_bytes", lambda call, device: 0)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    in_process = comparison.in_process

    def in_this_process(file, *arguments, seconds=None, ranks=None):
        if ranks == 2:
            return in_process(file, *arguments, ranks=ranks)
        capsys.readouterr()
        module.main(*arguments)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    if hasattr(module, "in_process"):
        monkeypatch.setattr(module, "in_process", in_this_process)
    compare = lambda case, mode, **arguments: records.append(
        comparison.compare(case, mode, "cpu", **arguments)
    )
    available = {"compare": compare, "record": records.append, "tmp_path": tmp_path}
    tests = [getattr(module, name) for name in vars(module) if name.startswith("test_")]
    for run, arguments in [(tests[0], each) for each in SMALL[operation]] + [(run, {}) for run in tests[1:]]:
        names = run.__code__.co_varnames[: run.__code__.co_argcount]
        run(**arguments, **{name: value for name, value in available.items() if name in names})
    for record in records[-len(SMALL[operation]) :] if len(tests) == 1 else records[-1:]:
        ran = {name for name, result in record["contenders"].items() if "ms" in result}
        assert {"ours", *PEERS_HERE.get(operation, ())} <= ran, record["contenders"]
    assert len(records) == len(SMALL[operation]) + len(tests) - 1
    for record in records:
        comparison.store(operation, ENVIRONMENT, record, tmp_path / "results")
    text = render.render(tmp_path / "results")
    assert all(f"#### {record['case']}, {record['mode']}" in text for record in records)


def test_a_step_of_a_tree_is_counted_by_its_visible_pairs():
    problem = importlib.import_module("bench_tree_attention").Problem(TREE)
    mask = torch.zeros(26, 26, dtype=torch.bool)
    for branch in range(3):
        own = torch.arange(5 + 7 * branch, 12 + 7 * branch)
        path = torch.cat([torch.arange(5), own])
        mask[path[:, None], path] = torch.ones(12, 12).tril().bool()
    assert problem.pairs == mask.sum()
    token = torch.arange(26)
    assert torch.equal((token <= token[:, None]) & (token[:, None] < problem.key_end), mask)
    assert problem.node.tolist()[12:19] == [0, 1, 2, 3, 4, 12, 13]


def test_the_peers_model_is_our_policy():
    """transformers' model of a policy, with its biases and adapters: equal log-probs; without adapters others."""
    module = importlib.import_module("bench_generate")
    policy = module.policy_of("tiny-qwen2", None, 4)
    ids = torch.arange(3, 40)
    with torch.no_grad():
        peer = importlib.import_module("peer_models").causal_lm(policy).eval()
        log_p = peer(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        ours = policy.score(ids, torch.arange(37) > 0)[1:]
        with policy.disable_adapters():
            base = policy.score(ids, torch.arange(37) > 0)[1:]
    assert (log_p - ours).abs().max() < 1e-4 < 1e-2 < (base - ours).abs().max()


def test_rates_and_facts_stand_in_the_document(tmp_path):
    record = compare(
        Peer("ours", None, constant(1.0)), Peer("ours, other", None, constant(1.0)),
        work=("tokens", 300), facts=lambda contenders: {"MiB of keys": 12.0, "µs": {"a": 1.0, "b": 3.0}},
    )  # fmt: skip
    record["contenders"]["ours"] |= {"ms": 2.0, "p20": 2.0, "p80": 2.0}
    record["contenders"]["ours, other"] |= {"ms": 1.0, "p20": 1.0, "p80": 1.0}
    comparison.store("some_op", ENVIRONMENT, record, tmp_path)
    text = render.render(tmp_path)
    assert "tokens/s" in text and "150,000" in text
    assert "| case | MiB of keys |" in text and f"| {record['case']} | 12.0 |" in text
    assert text.index("| b | 3.00 | 75% |") < text.index("| a | 1.00 | 25% |")
    assert "best peer's" not in text  # a variant of ours is no peer


def test_a_contender_of_other_work_has_its_own_rate(tmp_path):
    record = compare(
        Peer("ours", None, constant(1.0)), Peer("ours, half of it", None, constant(1.0)), work=("tokens", 300)
    )  # fmt: skip
    for result in record["contenders"].values():
        result |= {"ms": 2.0, "p20": 2.0, "p80": 2.0}
    record["contenders"]["ours, half of it"]["work"] = 120
    comparison.store("some_op", ENVIRONMENT, record, tmp_path)
    text = render.render(tmp_path)
    assert "| **ours** | 2.00 (2.00 to 2.00) | 150,000 |" in text
    assert "| ours, half of it | 2.00 (2.00 to 2.00) | 60,000 |" in text


def test_ranks_are_told_apart_by_one_bit():
    digest = importlib.import_module("bench_ranks").digest
    adapters = {"a": torch.zeros(3, 2).T, "b": torch.ones(4, dtype=torch.bfloat16)}
    before = digest(adapters)
    assert before == digest({name: tensor.clone() for name, tensor in adapters.items()})
    adapters["a"][0, 1] = -0.0
    assert before != digest(adapters)


def test_prompts_of_ranks_differ_and_are_of_one_length():
    prompts = importlib.import_module("bench_ranks").LongPrompts(60)
    tokenizer = open_checkpoint(resolve_checkpoint()).tokenizer
    drawn = [tokenizer.apply_chat_template(list(e.messages)) for e in prompts.draw(None, 16, "")]
    assert len({tuple(ids) for ids in drawn}) == 16 and len({len(ids) for ids in drawn}) == 1
    assert 60 <= len(drawn[0]) <= 62


def test_facts_of_a_step_sum_to_the_whole():
    module = importlib.import_module("bench_step")
    step = {f"seconds_{phase}": 0.1 for phase in module.PHASES}
    step |= {"step": 4, "seconds": 0.7, "completion_tokens": 40}
    step |= {
        f"memory_{name}": n * 2**20 for n, name in enumerate(("allocated", "reserved", "planned", "card"), 1)
    }
    found = module.facts([step] * 3, 2 * 2**20)
    assert sum(found["ms of a step"].values()) == pytest.approx(700)
    assert found["sampled tokens/s"] == pytest.approx(400)
    assert found["steps before"] == 3
    assert [found[f"MiB {name}"] for name in ("allocated", "reserved", "planned", "card")] == [1, 2, 3, 2]
