"""tree_attention, forward and forward + backward, over packed sequences and shared prefixes.

Peers that know no tree get every sequence whole, with its prefix repeated, already laid out as they want it: the
copying is not timed. They are held against the same truth, the gradients of a prefix summed over its copies.
"""

import cases
import pytest
import torch
import torch.nn.functional as F
from comparison import Peer, distance
from nanogrpo.kernels import tree_attention, tree_plan
from nanogrpo.kernels.tree_attention import tree_attention_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Plainly wrong: relative norm of the error of the output, and of a gradient.
LIMITS = {"bfloat16": (2.0**-6, 2.0**-5), "float32": (1e-5, 1e-4)}


# Each adapter takes a ``Problem`` and returns (attend, node): attend(q, k, v) over the tree's tokens, node None; or
# over the tokens ``node`` of it, which repeat its prefix. Tensors are (tokens, heads, D).


def ours():
    def load(problem):
        plan = tree_plan(problem.q, problem.k, problem.key_end)  # once a forward pass, for all layers
        return lambda q, k, v: tree_attention(q, k, v, problem.key_end, plan=plan), None

    return load


def ours_unshared():
    def load(problem):
        key_end = problem.bounds[1:].repeat_interleave(problem.sequence)
        plan = tree_plan(problem.q[problem.node], problem.k[problem.node], key_end)
        return lambda q, k, v: tree_attention(q, k, v, key_end, plan=plan), problem.node

    return load


def flash():
    """The flash attention inside torch, of variable length: what torch.nn.attention.varlen calls."""

    def load(problem):
        cu, most = problem.bounds.int(), problem.sequence
        op = torch.ops.aten._flash_attention_forward
        return lambda q, k, v: op(q, k, v, cu, cu, most, most, 0.0, True, False)[0], problem.node

    return load


def sdpa_masked():
    """torch's attention with the tree as a mask (T, T), keys repeated as transformers does it."""

    def load(problem):
        token = torch.arange(len(problem.key_end), device=DEVICE)
        mask = (token <= token[:, None]) & (token[:, None] < problem.key_end)

        def attend(q, k, v):
            k, v = (x.repeat_interleave(problem.group, 1) for x in (k, v))
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

        return attend, None

    return load


def flex():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def load(problem):
        torch.compiler.reset()
        key_end, T = problem.key_end, len(problem.key_end)
        visible = lambda b, h, i, j: (j <= i) & (i < key_end[j])
        mask, compiled = (
            create_block_mask(visible, None, None, T, T, device=DEVICE),
            torch.compile(flex_attention),
        )

        def attend(q, k, v):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

        return attend, None

    return load


PEERS = [
    Peer("ours", None, ours),
    Peer("torch flash, variable length", "torch", flash, cuda_only=True),
    Peer("torch flex_attention", "torch", flex, cuda_only=True),
    Peer("torch SDPA with a mask", "torch", sdpa_masked),
    Peer("ours, prefix repeated", None, ours_unshared),
]


class Problem:
    """Tokens of a prefix, then those of each branch: a tree in preorder."""

    def __init__(self, case):
        shape, dtype = case.shape, getattr(torch, case.dtype)
        prefix, branches, length = (shape[name] for name in ("prefix", "branches", "length"))
        self.group, self.sequence = shape["H"] // shape["KVH"], prefix + length
        T = prefix + branches * length
        ends = prefix + length * torch.arange(1, branches + 1)
        self.key_end = torch.cat([torch.full((prefix,), T), ends.repeat_interleave(length)]).to(DEVICE)
        own = torch.arange(prefix, T).view(branches, length)
        self.node = torch.cat([torch.arange(prefix).expand(branches, -1), own], 1).flatten().to(DEVICE)
        self.bounds = torch.arange(branches + 1, device=DEVICE) * self.sequence
        self.pairs = int((self.key_end - torch.arange(T, device=DEVICE)).sum())
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda heads: torch.randn(T, heads, shape["D"], generator=generator, device=DEVICE).to(dtype)
        self.q, self.k, self.v, self.upstream = (draw(shape[name]) for name in ("H", "KVH", "KVH", "H"))

    def truth(self):
        """Output, dq (T, group, D) of the heads of the first key head, and its dk, dv (T, 1, D), in float64."""
        k, v = (x[:, :1].double().requires_grad_() for x in (self.k, self.v))
        found = []
        for head in range(self.group):  # one at a time: the scores of a head alone take gigabytes
            q, upstream = (x[:, head : head + 1].double() for x in (self.q, self.upstream))
            out = tree_attention_ref(q.requires_grad_(), k, v, self.key_end)
            found.append((out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)))
        out, dq, dk, dv = zip(*found, strict=True)
        return torch.cat(out, 1), torch.cat(dq, 1), sum(dk), sum(dv)

    def arguments(self, node):
        """q, k, v as leaves and the upstream gradient, which the first copy of a repeated token gets alone."""
        tensors = [x if node is None else x[node] for x in (self.q, self.k, self.v, self.upstream)]
        if node is not None:
            repeated = (node < self.sequence) & (torch.arange(len(node), device=DEVICE) >= self.sequence)
            tensors[3] = tensors[3].masked_fill(repeated[:, None, None], 0)
        return [x.detach().requires_grad_() for x in tensors[:3]], tensors[3]

    def folded(self, tensors, node):
        """A peer's tensors on the tree's tokens: the first copy's output, the sum of the copies' gradients."""
        if node is None:
            return tensors
        out, *grads = tensors
        first = out.new_zeros(len(self.key_end), *out.shape[1:]).index_copy(0, node.flip(0), out.flip(0))
        sums = [
            x.new_zeros(len(first), *x.shape[1:], dtype=torch.float64).index_add(0, node, x.double())
            for x in grads
        ]
        return first, *sums


@pytest.fixture(scope="module", params=cases.tree_attention(DEVICE), ids=str)
def case(request):
    return request.param


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
def test_tree_attention(compare, case, mode):
    problem, backward, limits = Problem(case), mode != "forward", LIMITS[case.dtype]
    truth = problem.truth()

    def call(load):
        attend, node = load(problem)
        leaves, upstream = problem.arguments(node)

        def step():
            with torch.set_grad_enabled(backward):
                out = attend(*leaves)
            return (out, *torch.autograd.grad(out, leaves, upstream)) if backward else (out,), node

        return [step]

    def verify(result):
        names, errors = ("error", "dq error", "dk error", "dv error"), {}
        for name, got, want in zip(names, problem.folded(*result), truth, strict=False):
            errors[name] = distance(got[:, : want.shape[1]], want, limits[name != "error"])
        return errors

    T, H, D, size = len(problem.key_end), case.shape["H"], case.shape["D"], problem.q.element_size()
    values = T * D * (H + case.shape["KVH"]) * 2  # q, k, v, out
    compare(
        case, mode, peers=PEERS, call=call, verify=verify,
        flops=(14 if backward else 4) * problem.pairs * H * D, nbytes=size * values * (3 if backward else 1),
    )  # fmt: skip
