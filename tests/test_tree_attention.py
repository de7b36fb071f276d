"""Tree attention: values and gradients against its definition, tiles that are skipped, memory, what it refuses."""

import importlib
import math
import os
from unittest import mock

import pytest
import torch
from cross_compile import assert_compiles, every_card
from hypothesis import example, given
from hypothesis import strategies as st
from nanogrpo.kernels import tree_attention, tree_plan
from numerics import EPS, assert_no_worse_than

module = importlib.import_module("nanogrpo.kernels.tree_attention")  # the package exports its function
planner = importlib.import_module("nanogrpo.kernels.tree_plan")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])
# Half precision rounds probabilities, ds and results once each; float32 sums a few hundred terms in another order.
FLOOR = {dtype: EPS[dtype] * (4 if dtype == torch.float32 else 1) for dtype in DTYPES}
FLOOR[torch.bfloat16] = EPS[torch.bfloat16]
NAMES = ("out", "dq", "dk", "dv")


def chains(lengths):
    """key_end of packed sequences."""
    lengths = torch.tensor(lengths, dtype=torch.int64)
    return lengths.cumsum(0).repeat_interleave(lengths)


def family(prefix, lengths):
    """key_end of a prefix that all branches share."""
    return torch.cat([torch.full((prefix,), prefix + sum(lengths)), prefix + chains(lengths)])


@st.composite
def key_ends(draw):
    """Several families, some of them nested, some tokens without any visible query."""
    lengths = st.lists(st.sampled_from([1, 3, 31, 63, 64, 70, 127]), min_size=1, max_size=3)
    parts, start = [], 0
    for _ in range(draw(st.integers(1, 3))):
        part = family(draw(st.sampled_from([0, 1, 20, 66])), draw(lengths))
        parts.append(start + part)
        start += len(part)
    key_end = torch.cat(parts)
    if draw(st.booleans()):
        hidden = torch.randperm(start, generator=torch.Generator().manual_seed(start))[: start // 5]
        key_end[hidden] = draw(st.sampled_from([0, 1, start]))
    return key_end.to(draw(st.sampled_from([torch.int32, torch.int64])))


def problem(key_end, heads, kv_heads, dim, dtype, *, device="cpu", seed=0):
    """q, k, v, key_end and dout."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda h: torch.randn(len(key_end), h, dim, generator=generator).to(device, dtype)
    q, k, v, dout = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
    return q, k, v, key_end.to(device), dout


def gradients(function, q, k, v, key_end, dout, **options):
    """The output and the gradients to q, k and v."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves, key_end, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_correct(q, k, v, key_end, dout, **options):
    ours = gradients(tree_attention, q, k, v, key_end, dout, **options)
    plain = gradients(module.tree_attention_ref, q, k, v, key_end, dout, **options)
    double = *(t.double() for t in (q, k, v)), key_end, dout.double()
    truth = gradients(module.tree_attention_ref, *double, **options)
    for name, *values in zip(NAMES, ours, plain, truth, strict=True):
        assert values[0].dtype == q.dtype
        assert_no_worse_than(*values, floor=FLOOR[q.dtype], name=name)
    return ours


@given(
    key_ends(),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
    st.sampled_from([1, 16, 24, 64, 96, 128, 200]),
    st.sampled_from(DTYPES),
    st.sampled_from([None, 0.3]),
    st.integers(0, 2**31),
)
def test_values_and_gradients_match_reference(key_end, heads, dim, dtype, scale, seed):
    assert_correct(*problem(key_end, *heads, dim, dtype, seed=seed), scale=scale)


@given(key_ends(), st.sampled_from([1, 7, 64]))
@pytest.mark.skipif(INTERPRET, reason="the CPU's own chunks")
def test_chunks_of_queries_change_nothing(key_end, queries):
    tensors = problem(key_end, 4, 2, 8, torch.float32)
    whole = gradients(tree_attention, *tensors)
    with mock.patch.object(module, "CPU_QUERIES", queries):
        parts = gradients(tree_attention, *tensors)
    for ours, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2 * EPS[torch.float32])


@pytest.mark.skipif(INTERPRET, reason="the kernels sum in float32")
def test_gradcheck_in_float64():
    q, k, v, key_end, _ = problem(family(3, [4, 2]), 4, 2, 5, torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: tree_attention(q, k, v, key_end, 0.7), leaves)


def test_a_tree_equals_its_sequences_apart(device):
    """Every branch behind its own copy of the prefix: the same values, and gradients that add up on the prefix."""
    prefix, lengths, dtype = 40, [30, 50], torch.float32
    q, k, v, key_end, dout = problem(family(prefix, lengths), 4, 2, 32, dtype, device=device)
    out, *grads = gradients(tree_attention, q, k, v, key_end, dout)
    bounds = torch.tensor([prefix, *lengths]).cumsum(0).tolist()
    rows = [[*range(prefix), *range(start, stop)] for start, stop in zip(bounds, bounds[1:], strict=False)]
    flat = torch.tensor(sum(rows, []), device=device)
    upstream = dout[flat].clone()
    upstream[prefix + lengths[0] : 2 * prefix + lengths[0]] = (
        0  # the second copy's queries are not counted twice
    )
    ends = chains([len(row) for row in rows]).to(device)
    apart_out, *apart = gradients(tree_attention, q[flat], k[flat], v[flat], ends, upstream)
    torch.testing.assert_close(apart_out, out[flat], rtol=0, atol=16 * EPS[dtype])
    for ours, theirs in zip(grads, apart, strict=True):
        summed = torch.zeros_like(ours).index_add_(0, flat, theirs)
        torch.testing.assert_close(ours, summed, rtol=0, atol=64 * EPS[dtype])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(dtype, dim, device):
    """Keys come in runs that only their own queries attend to, evenly: weights are 1 / count, or exactly zero.

    With counts that are powers of two and small integers elsewhere every partial result is representable, so a
    compiler that mixes up the rows of an operand, or reads it too early, cannot pass.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([70, 20] if INTERPRET else [400, 33, 60])
    T, kv_heads, group, length = int(lengths.sum()), 2, 2, 1024 // dim
    key_end, index = chains(lengths.tolist()), torch.arange(T)
    run = index // length
    # Scores are 1024 inside a run and 0 elsewhere; the second half of a key meets zeros in every query.
    k = torch.zeros(T, kv_heads, dim)
    for head in range(kv_heads):
        k[index, head, torch.randperm(dim // 2, generator=generator)[run]] = 32
    q = k.repeat_interleave(group, 1)
    k[..., dim // 2 :] = torch.randint(-1, 2, (T, kv_heads, dim // 2), generator=generator)
    v = torch.randint(-1, 2, k.shape, generator=generator).float()
    count = index - torch.maximum(run * length, key_end - lengths.repeat_interleave(lengths)) + 1
    exact = (count & (count - 1)) == 0
    dout = torch.zeros(q.shape)
    one = torch.randint(0, dim, (T, kv_heads * group, 1), generator=generator)
    dout.scatter_(2, one, torch.where(exact, 1.0, 0.0)[:, None, None].expand(one.shape))
    tensors = [t.to(device, dtype) for t in (q, k, v)]
    ours = gradients(tree_attention, *tensors, key_end.to(device), dout.to(device, dtype), scale=math.log(2))
    double = q.double(), k.double(), v.double(), key_end, dout.double()
    truth = gradients(module.tree_attention_ref, *double, scale=math.log(2))
    rounded = {"dq": EPS[dtype], "dk": EPS[dtype]}  # by the factor log 2
    for name, got, expected in zip(NAMES, ours, truth, strict=True):
        rows = exact if name == "out" else slice(None)
        limits = {
            "rtol": rounded.get(name, 0),
            "atol": 1e-6,
            "msg": lambda text, name=name: f"{name}: {text}",
        }
        torch.testing.assert_close(got.double().cpu()[rows], expected[rows], **limits)
        assert got.any()


def test_what_no_query_sees_is_zero(device):
    q, k, v, _, dout = problem(chains([40, 30]), 2, 1, 16, torch.float32, device=device)
    nothing = torch.zeros(70, dtype=torch.int64, device=device)
    for tensor in gradients(tree_attention, q, k, v, nothing, dout):
        assert (tensor == 0).all()


def test_hidden_tokens_never_reach_a_result(device):
    """NaN in one branch stays there: skipped and masked keys and values must not be multiplied."""
    q, k, v, key_end, dout = problem(family(30, [70, 90]), 2, 1, 16, torch.float32, device=device)
    expected = tree_attention(q, k, v, key_end)
    k[100:] = torch.inf
    v[100:] = 1e30
    assert torch.equal(tree_attention(q, k, v, key_end)[:100], expected[:100])


def test_long_walks_are_cut_and_merged(device):
    """A prefix that all see is one long walk; the sums of its chunks equal one walk's up to rounding."""
    tensors = problem(family(64, [100, 90]), 4, 1, 32, torch.float32, device=device)
    chunked = assert_correct(*tensors)
    with mock.patch.object(planner, "PROGRAMS", 1):
        whole = assert_correct(*tensors)
    for ours, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=64 * EPS[torch.float32])


@given(
    key_ends(),
    st.sampled_from([(64, 32), (32, 32)]),
    st.sampled_from([(16, 32), (32, 16)]),
    st.integers(1, 600),
    st.integers(0, 32),
)
@example(chains([63, 65]), (32, 32), (16, 32), 4, 1)  # the last query of a block sees none of a key block
@pytest.mark.skipif(not INTERPRET, reason="the plan is Triton's")
def test_plan_lists_each_tile_once(key_end, plan, dkv, programs, slots):
    T, group, kv_heads = len(key_end), 3, 2
    key_end = key_end.int()
    with mock.patch.multiple(planner, PROGRAMS=programs, SLOTS=slots):
        (rows, width), size = planner.plan_sizes(T, plan, dkv, kv_heads)
        blocks, items = key_end.new_empty(rows, width), key_end.new_empty(size)
        planner.launch_plan(key_end, blocks, items, group, kv_heads, plan, dkv)
    index = torch.arange(T)
    seen = (index[None, :] <= index[:, None]) & (index[:, None] < key_end[None, :])
    for row, (whole, others, *listed) in enumerate(blocks.tolist()):
        tiles = seen[row * plan[0] : (row + 1) * plan[0]].split(plan[1], dim=1)
        full = [i for i, tile in enumerate(tiles) if tile.shape[1] == plan[1] and tile.all()]
        some = [i for i, tile in enumerate(tiles) if tile.any() and i not in full]
        assert listed[:whole] == full
        assert sorted(listed[len(listed) - others :]) == some
    key_blocks = -(-T // dkv[1])
    most, count, *rest = items.tolist()
    slots = max(key_blocks, slots // kv_heads)
    per_block = [tuple(rest[2 * (key_blocks + slots + i) :][:2]) for i in range(key_blocks)]
    walks = [
        group * -(-max(0, min(T, max(ends)) - i * dkv[1]) // dkv[0])
        for i, ends in enumerate(x.tolist() for x in key_end.split(dkv[1]))
    ]
    assert [chunks for _, chunks in per_block] == [max(1, -(-walk // most)) for walk in walks]
    expected = [(i, chunk) for i, (_, chunks) in enumerate(per_block) for chunk in range(chunks)]
    assert [tuple(rest[2 * i :][:2]) for i in range(count)] == expected and count <= key_blocks + slots
    used = [slot + chunk for slot, chunks in per_block if chunks > 1 for chunk in range(chunks)]
    assert used == list(range(len(used))) and len(used) <= slots


def test_a_plan_is_used_again(device):
    q, k, v, key_end, dout = problem(family(20, [70, 30]), 4, 2, 16, torch.float32, device=device)
    plan = tree_plan(q, k, key_end)
    key_end_of_plan = plan[0].clone()
    once, again = (gradients(tree_attention, q, k, v, key_end, dout, plan=plan) for _ in range(2))
    fresh = gradients(tree_attention, q, k, v, key_end, dout)
    for a, b, c in zip(once, again, fresh, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(plan[0], key_end_of_plan) and plan[0].data_ptr() != key_end.data_ptr()


def test_strided_views(device):
    """q, k, v as slices of one stacked projection, and a gradient with strides."""
    heads, kv_heads, dim = 4, 2, 16
    key_end = chains([33, 40]).to(device)
    stacked = torch.randn(73, heads + 2 * kv_heads, dim).to(device)
    views = stacked.split([heads, kv_heads, kv_heads], dim=1)
    dout = torch.randn(heads, 73, dim).to(device).transpose(0, 1)
    ours = gradients(tree_attention, *views, key_end, dout)
    apart = gradients(tree_attention, *(x.contiguous() for x in views), key_end, dout.contiguous())
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in views]
    columns = gradients(tree_attention, *turned, key_end, dout)
    for a, b, c in zip(ours, apart, columns, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_each_gradient_alone(wanted, device):
    q, k, v, key_end, dout = problem(chains([20]), 2, 1, 16, torch.float32, device=device)
    _, *every = gradients(tree_attention, q, k, v, key_end, dout)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate((q, k, v))]
    some = torch.autograd.grad(tree_attention(*leaves, key_end), [leaves[i] for i in wanted], dout)
    assert all(torch.equal(grad, every[i]) for grad, i in zip(some, wanted, strict=True))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens, device):
    tensors = problem(chains([tokens]), 2, 1, 16, torch.float32, device=device)
    out, *grads = gradients(tree_attention, *tensors)
    assert out.shape == (tokens, 2, 16) and [len(grad) for grad in grads] == [tokens] * 3
    torch.testing.assert_close(out, tensors[2].expand(-1, 2, -1))


def test_what_is_saved_for_backward(device):
    q, k, v, key_end, _ = problem(chains([50, 60]), 4, 2, 16, torch.float16, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = tree_attention(*(t.requires_grad_() for t in (q, k, v)), key_end)
    given_in = {t.data_ptr() for t in (q, k, v, out)}
    others = sorted(t.nbytes for t in kept if t.data_ptr() not in given_in)
    wide = 8 if device.type == "cpu" and not INTERPRET else 4
    assert others[-1] == wide * 110 * 4, "more than the logsumexp"


GOOD = {
    "q": torch.zeros(3, 4, 8),
    "k": torch.zeros(3, 2, 8),
    "v": torch.zeros(3, 2, 8),
    "key_end": chains([3]),
}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": torch.zeros(3, 8)}, r"q has shape \(3, 8\)"),
        ({name: torch.zeros(3, 2, 257) for name in "qkv"}, "D from 1 to 256"),
        ({"k": torch.zeros(3, 2, 4)}, r"expected \(3, KVH, 8\)"),
        ({"k": torch.zeros(2, 2, 8), "v": torch.zeros(2, 2, 8)}, r"expected \(3, KVH, 8\)"),
        ({"k": torch.zeros(3, 3, 8), "v": torch.zeros(3, 3, 8)}, "KVH dividing 4"),
        ({"k": torch.zeros(3, 2, 8).half()}, "q, k, v are torch.float32, torch.float16"),
        ({name: torch.zeros(3, 2, 8).long() for name in "qkv"}, "expected one of"),
        ({"v": torch.zeros(3, 2, 8, device="meta")}, "expected one device"),
        ({"key_end": torch.zeros(3)}, "expected \\(3,\\) int32 or int64"),
        ({"key_end": chains([4])}, "expected \\(3,\\) int32 or int64"),
        ({"key_end": torch.tensor([3, 4, 3])}, r"within 3..4, expected 0..3"),
        ({"key_end": torch.tensor([3, -1, 3])}, r"within -1..3, expected 0..3"),
        ({"scale": 0.0}, "the scale is 0.0"),
        ({"scale": math.nan}, "the scale is nan"),
        ({"plan": [chains([4])] * 3}, "the plan is for 4 tokens, expected one for 3"),
    ],
)
def test_wrong_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        tree_attention(**(GOOD | changes))


def test_operators_pass_opcheck(device):
    q, k, v, key_end, dout = problem(family(5, [20, 9]), 4, 2, 16, torch.float32, device=device)
    plan = tree_plan(q, k, key_end)
    out, lse = torch.ops.nanogrpo.tree_attention(q, k, v, *plan[:2], 0.3)
    torch.library.opcheck(torch.ops.nanogrpo.tree_plan, (key_end, 4, 2, 16, torch.float32))
    torch.library.opcheck(torch.ops.nanogrpo.tree_attention, (q, k, v, *plan[:2], 0.3))
    torch.library.opcheck(torch.ops.nanogrpo.tree_attention_bwd, (dout, q, k, v, *plan, out, lse, 0.3))


@pytest.mark.skipif(INTERPRET, reason="torch.compile does not trace the interpreter")
def test_compiles_to_one_graph(device):
    tensors = problem(family(5, [20, 9]), 4, 2, 16, torch.float32, device=device)
    compiled = torch.compile(tree_attention, fullgraph=True, backend="aot_eager")
    ours, expected = (gradients(function, *tensors) for function in (compiled, tree_attention))
    assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))


KERNELS = [
    "_plan_queries_kernel",
    "_plan_keys_kernel",
    "_forward_kernel",
    "_dq_kernel",
    "_dkv_kernel",
    "_merge_kernel",
]


def assert_all_compile(cc, dim, dtype):
    q, k, v, key_end, dout = problem(chains([40]), 4, 2, dim, dtype)

    def launch():
        plan = module._tree_plan_triton(key_end, 4, 2, dim, dtype)
        out, lse = module._forward_triton(q, k, v, *plan[:2], 0.3)
        module._backward_triton(dout, q, k, v, *plan, out, lse, 0.3)

    assert_compiles(launch, cc, KERNELS)


@every_card
@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
def test_kernels_compile_for_every_card(cc):
    assert_all_compile(cc, 96, torch.bfloat16)


@pytest.mark.skipif(INTERPRET, reason="compiles, so needs the compiler")
@pytest.mark.parametrize("dim, dtype", [(64, torch.bfloat16), (256, torch.bfloat16), (256, torch.float32)])
def test_other_kernels_fit_the_smallest_card(dim, dtype):
    assert_all_compile(86, dim, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "key_end", [chains([328, 1, 700, 500]), family(300, [200, 1, 900, 64])], ids=["chains", "tree"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, kv_heads, dim", [(12, 2, 128), (9, 3, 64), (4, 4, 96), (2, 1, 256), (3, 1, 40)]
)
def test_gpu_shapes(key_end, heads, kv_heads, dim, dtype):
    assert_correct(*problem(key_end, heads, kv_heads, dim, dtype, device="cuda"))


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit():
    tensors = problem(family(1024, [512] * 4), 12, 2, 128, torch.bfloat16, device="cuda")
    first, second = (gradients(tree_attention, *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_gpu_memory_is_as_stated():
    T, heads, kv_heads, dim = 8192, 12, 2, 128
    q, k, v, key_end, dout = problem(chains([1024] * 8), heads, kv_heads, dim, torch.bfloat16, device="cuda")
    (plan_m, plan_n), _, _, (_, block_n, *_) = module._config(dim, q.dtype)[1]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    slack = 2**16
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = tree_attention(*leaves, key_end)
    blocks, key_blocks = -(-T // plan_m) * (2 + -(-T // plan_n)), -(-T // block_n)
    slots = max(key_blocks, 256 // kv_heads)
    kept = out.nbytes + 4 * T * heads + 4 * blocks + 4 * (2 + 4 * key_blocks + 2 * slots) + 4 * T
    assert torch.cuda.max_memory_allocated() - before <= kept + slack
    grads = torch.autograd.grad(out, leaves, dout)
    during = sum(grad.nbytes for grad in grads) + 4 * T * heads + 8 * slots * block_n * kv_heads * dim
    assert torch.cuda.max_memory_allocated() - before <= kept + during + slack
