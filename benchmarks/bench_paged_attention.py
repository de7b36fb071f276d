"""paged_attention in decode beside torch's attention over contiguous keys, and the share of the read bandwidth."""

import cases
import measurement
import pytest
import torch
import torch.nn.functional as F
from comparison import Peer, distance
from nanogrpo.kernels import append_attention, paged_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {"bfloat16": 2.0**-6, "float32": 1e-5}  # relative norm of the error: plainly wrong beyond
PAGE = 16
SAMPLE = 8  # sequences held against float64


# Each adapter takes a ``Problem`` and returns (tensors, call): call(*tensors) -> (S, H, D), on copies of them.


def ours():
    def load(problem):
        table, lens = problem.table, problem.lens
        return problem.paged, lambda q, *caches: paged_attention(q, *caches, table, lens)

    return load


def ours_appending():
    """The decode step's own form: it stores the last token's key and value on the way."""

    def load(problem):
        table, lens = problem.table, problem.lens
        last = [x[:, -1] for x in problem.contiguous]
        return problem.paged, lambda q, *caches: append_attention(q, *last, *caches, table, lens)

    return load


def ours_unshared():
    """The same keys and values, with the prefix stored for each sequence."""

    def load(problem):
        q, pages = problem.paged[0], problem.table.shape[1]
        whole = [F.pad(x, (0, 0, 0, 0, 0, pages * PAGE - x.shape[1])) for x in problem.contiguous]
        caches = [x.reshape(-1, PAGE, *x.shape[2:]) for x in whole]
        table, lens = torch.arange(len(caches[0]), device=DEVICE).int().view(len(q), pages), problem.lens
        return (q, *caches), lambda q, *caches: paged_attention(q, *caches, table, lens)

    return load


def sdpa():
    def load(problem):
        q, (k, v) = problem.paged[0], problem.contiguous
        tensors = q[:, :, None], *(x.transpose(1, 2).contiguous() for x in (k, v))
        return tensors, lambda *t: F.scaled_dot_product_attention(*t, enable_gqa=True)[:, :, 0]

    return load


def flash():
    """The flash attention inside torch, one query a sequence: it splits no context."""

    def load(problem):
        S, C = problem.contiguous[0].shape[:2]
        one, many = (torch.arange(S + 1, device=DEVICE, dtype=torch.int32) * n for n in (1, C))
        tensors = problem.paged[0], *(x.flatten(0, 1) for x in problem.contiguous)
        op = torch.ops.aten._flash_attention_forward
        return tensors, lambda q, k, v: op(q, k, v, one, many, 1, C, 0.0, False, False)[0]

    return load


PEERS = [
    Peer("ours", None, ours),
    Peer("torch SDPA, contiguous keys", "torch", sdpa),
    Peer("torch flash, contiguous keys", "torch", flash, cuda_only=True),
    Peer("ours, storing the last token", None, ours_appending),
]


SHARED_PEERS = [*PEERS, Peer("ours, prefix stored for each", None, ours_unshared)]


class Problem:
    """Random keys and values; pages in random order, those of a shared prefix stored once."""

    def __init__(self, case):
        S, C, shared, H, KVH, D = (case.shape[name] for name in ("S", "C", "shared", "H", "KVH", "D"))
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator, device=DEVICE).to(
            getattr(torch, case.dtype)
        )
        common, pages = shared // PAGE, -(-C // PAGE)
        own = pages - common
        order = torch.randperm(common + S * own, generator=generator, device=DEVICE).int()
        self.table = torch.cat([order[:common].expand(S, -1), order[common:].view(S, own)], 1)
        self.lens = torch.full((S,), C, dtype=torch.int32, device=DEVICE)
        caches = [draw(len(order), PAGE, KVH, D) for _ in range(2)]
        self.paged = draw(S, H, D), *caches
        self.contiguous = [cache[self.table.long()].flatten(1, 2)[:, :C] for cache in caches]

    def truth(self, rows):
        q, (k, v) = self.paged[0][rows].double(), (x[rows].double() for x in self.contiguous)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[2], 2) for x in (k, v))
        weights = (torch.einsum("shd,sthd->sht", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("sht,sthd->shd", weights, v)


@pytest.fixture(scope="module", params=cases.paged_attention(DEVICE), ids=str)
def case(request):
    return request.param


def test_paged_attention(compare, case):
    problem = Problem(case)
    S, C, shared, H, KVH, D = (case.shape[name] for name in ("S", "C", "shared", "H", "KVH", "D"))
    rows = torch.linspace(0, S - 1, min(S, SAMPLE), device=DEVICE).long()
    truth, size = problem.truth(rows), problem.paged[0].element_size()

    def call(load):
        tensors, attend = load(problem)
        copies = measurement.rotated(tensors, DEVICE)
        return [lambda tensors=tensors: attend(*tensors) for tensors in copies]

    def verify(got):
        error = distance(got[rows], truth, LIMITS[case.dtype])
        return {"error": error._replace(value=error.value + 0 * got.float().sum().item())}

    peers = SHARED_PEERS if shared else PEERS
    compare(
        case, "decode", peers=peers, call=call, verify=verify, graph=DEVICE == "cuda", flops=4 * S * C * H * D,
        nbytes=size * D * (2 * KVH * (shared + S * (C - shared)) + 2 * S * H),
    )  # fmt: skip
