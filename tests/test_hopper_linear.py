"""Two products in one for Hopper: how it compiles, and on a GPU its bits, errors and what it must not touch."""

import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cross_compile import assert_compiles, resource_usage
from nanogrpo.kernels import dequantize_4bit, hopper_linear, lora_products, quantize_4bit
from nanogrpo.kernels.hopper_linear import BLOCK_M, BLOCK_N, STAGES, fits
from numerics import EPS, assert_no_worse_than

COMPILES = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Gluon has no interpreter")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def on_hopper(test):
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason="needs Hopper")(test))


# M, K, N, r, starts: one tile, many turns of a program, rests in every direction, parts, ranks in two steps
SHAPES = [
    (128, 64, 256, 64, [0]), (1, 8, 8, 8, [0]), (4100, 1544, 1800, 40, [0, 384]), (8192, 1536, 1536, 16, [0]),
    (3001, 1536, 2048, 64, [0, 1536, 1792]), (520, 200, 17920, 128, [0, 8960]), (130, 4096, 264, 96, [0, 256]),
]  # fmt: skip


def drawn(M, K, N, r, starts, dtype, device="cuda", integers=False):
    generator = torch.Generator(device).manual_seed(M + K)

    def draw(*size, scale=1.0):
        if integers:  # sums of up to 2^10 products of them are exact in float32, and a float16 holds them
            return torch.randint(-1, 2, size, generator=generator, device=device).to(dtype)
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype)

    h, b = draw(M, len(starts) * r), draw(N, r, scale=r**-0.5)
    return draw(M, K), draw(N, K, scale=K**-0.5), h, b, draw(N), draw(r, N, scale=r**-0.5)


def plain(x, w, h, b, bias, starts):
    y, r = x @ w.T + bias, b.shape[1]
    for part, (start, stop) in enumerate(zip(starts, [*starts[1:], len(w)], strict=True)):
        y[:, start:stop] += h[:, part * r : part * r + r] @ b[start:stop].T
    return y


def poisoned(M, N, dtype):
    """A matrix of NaN between others."""
    return torch.full((M + 2, N + 16), float("nan"), dtype=dtype, device="cuda")


@COMPILES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by_rows", [False, True])
def test_compiles_for_hopper_without_spilling(dtype, bias, by_rows, tmp_path):
    tensor = lambda *size: torch.zeros(size, dtype=dtype)
    w, b = (tensor(512, 192), tensor(512, 64)) if by_rows else (tensor(192, 512), tensor(64, 512))
    operands = tensor(256, 192), w, tensor(256, 64), b, tensor(256, 512), tensor(512) if bias else None
    launch = lambda: hopper_linear.hopper_linear(*operands, by_rows=by_rows)
    ((_, compiled),) = assert_compiles(launch, 90, ["hopper_linear_kernel"])
    used = resource_usage(compiled, tmp_path)
    assert used["LOCAL"] == used["STACK"] == 0
    assert "setmaxnreg" in compiled.asm["ptx"], "the fetching warp gives its registers away"


def matrix(rows, cols, dtype=torch.bfloat16, pointer=512, strides=None):
    """As much of a CUDA tensor as ``fits`` looks at."""
    strides = strides or (cols, 1)
    return SimpleNamespace(
        shape=(rows, cols), dtype=dtype, device=torch.device("cuda", 0), is_cuda=True,
        data_ptr=lambda: pointer, stride=lambda dim: strides[dim],
    )  # fmt: skip


def asked(M=768, K=1536, N=2048, r=64, starts=(0,), arch=90, out=None, b=None, **of_x):
    out, b = out or matrix(M, N), b or matrix(N, r)
    with (
        mock.patch.object(hopper_linear._runtime, "arch", lambda device: arch),
        mock.patch.object(hopper_linear._runtime, "INTERPRET", False),
    ):
        return fits(matrix(M, K, **of_x), out, r, b, starts=starts)


@pytest.mark.parametrize("taken", [
    {}, {"M": 10**6}, {"K": 4096}, {"r": 8}, {"starts": (0, 1536, 1792)}, {"starts": (0, 128, 128)},
    {"dtype": torch.float16}, {"strides": (1544, 1)},
])  # fmt: skip
def test_what_fits(taken):
    assert asked(**taken)


@pytest.mark.parametrize("refused", [
    {"M": 767}, {"K": 4104}, {"K": 1532}, {"N": 2044}, {"r": 4}, {"starts": (0, 64)}, {"starts": (0, 128, 256, 384)},
    {"arch": 80}, {"arch": 100}, {"dtype": torch.float32}, {"pointer": 520}, {"strides": (1540, 1)},
    {"strides": (1, 768)}, {"strides": (0, 1)}, {"out": matrix(768, 2048, pointer=520)},
    {"b": matrix(2048, 64, pointer=520)},
])  # fmt: skip
def test_what_does_not_fit(refused):
    assert not asked(**refused)


def test_a_cpu_has_no_such_product():
    x = torch.zeros(8192, 1536, dtype=torch.bfloat16)
    assert not fits(x, torch.empty(8192, 8960, dtype=torch.bfloat16), 64)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M, K, N, r, starts", SHAPES)
def test_values(M, K, N, r, starts, dtype):
    x, w, h, b, bias, a = drawn(M, K, N, r, starts, dtype)
    wide = [t.double() for t in (x, w, h, b, bias)]
    whole = poisoned(M, N, dtype)
    y = hopper_linear.hopper_linear(x, w, h, b, whole[1:-1, 8:-8], bias, starts)
    assert_no_worse_than(y, plain(x, w, h, b, bias, starts), plain(*wide, starts), floor=EPS[dtype], name="y")
    assert whole[[0, -1]].isnan().all() and whole[:, :8].isnan().all() and whole[:, -8:].isnan().all()
    assert torch.equal(y, hopper_linear.hopper_linear(x, w, h, b, torch.empty_like(y), bias, starts))

    h = h[:, :r].contiguous()
    dx = hopper_linear.hopper_linear(
        x, w.T.contiguous(), h, a, poisoned(M, N, dtype)[1:-1, 8:-8], by_rows=False
    )
    truth = wide[0] @ wide[1].T + h.double() @ a.double()
    assert_no_worse_than(dx, x @ w.T + h @ a, truth, floor=EPS[dtype], name="dx")


@on_hopper
@pytest.mark.parametrize("by_rows", [False, True])
def test_integers_come_out_exactly(by_rows):
    """Every place of many tiles, over more steps than the ring has slots: what is given away too soon would show."""
    M, N, K, r = 20 * BLOCK_M, 40 * BLOCK_N, 64 * (2 * STAGES + 1), 64
    x, w, h, b, bias, a = drawn(M, K, N, r, [0], torch.float16, integers=True)
    truth = x.double() @ w.double().T + h.double() @ (b.double().T if by_rows else a.double())
    if not by_rows:
        w, b, bias = w.T.contiguous(), a, None
    for _ in range(10):
        y = hopper_linear.hopper_linear(
            x, w, h, b, torch.full_like(truth, torch.nan, dtype=x.dtype), bias, by_rows=by_rows
        )
        assert torch.equal(y.double(), truth + bias.double() if by_rows else truth)


@on_hopper
def test_rows_beyond_two_to_the_31():
    M, K, N, r = 2**21 + 130, 64, 1032, 8
    x, w, h, b, bias, _ = drawn(M, K, N, r, [0], torch.bfloat16)
    y = hopper_linear.hopper_linear(x, w, h, b, x.new_full((M, N), torch.nan), bias)
    last = slice(M - 300, M)
    want = plain(x[last].double(), w.double(), h[last].double(), b.double(), bias.double(), [0])
    # below 16 a rounding errs by at most 1/32; rows of another place would differ by about 1
    assert (y[last] - want).abs().max() < 0.1 and not y.isnan().any()


@on_hopper
def test_who_takes_it(monkeypatch):
    """Real projections of many rows go there, forward and backward; odd ranks and long sums to a library."""
    calls, launch = [], lora_products.hopper_linear
    monkeypatch.setattr(
        lora_products, "hopper_linear", lambda *args, **kw: calls.append(args[4].shape) or launch(*args, **kw)
    )
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator, device="cuda").bfloat16()

    def run(M, K, N, r, columns, quantize=True):
        weight, layout = [draw(N, K)], (0, 0)
        if quantize:
            codes, scales, *layout = quantize_4bit(weight[0], "nf4").packed().operands()
            weight = [codes, *scales]
        x, a, b, dy = draw(M, K), draw(len(columns) // 2 * r, K), draw(N, r), draw(M, N)
        calls.clear()
        lora_products.many_rows(x, weight, a, b, columns, 1.0, draw(N), *layout)
        forward = calls[:]
        calls.clear()
        how = columns, 1.0, *layout, True, True, torch.float32, torch.float32
        lora_products.gradients(dy, x, weight, a, b, *how)
        return forward, calls[:]

    assert run(8192, 1536, 8960, 64, [0, 8960]) == ([(8192, 8960)], [])
    assert run(8192, 8960, 1536, 64, [0, 1536]) == ([], [(8192, 8960)])
    assert run(768, 1536, 17920, 64, [0, 8960, 8960, 17920], False) == ([(768, 17920)], [])
    assert run(2624, 1536, 2048, 64, [0, 1536, 1536, 1792, 1792, 2048]) == ([(2624, 2048)], [(2624, 1536)])
    assert run(4096, 4096, 28672, 32, [0, 14336, 14336, 28672]) == ([(4096, 14336)] * 2, [])  # in pieces
    assert run(8192, 1536, 8960, 5, [0, 8960]) == run(767, 1536, 8960, 64, [0, 8960]) == ([], [])


@on_hopper
def test_a_row_knows_no_other():
    M, K, N, r, starts = 3001, 1536, 2048, 64, [0, 1536, 1792]
    x, w, h, b, bias, _ = drawn(M, K, N, r, starts, torch.bfloat16)
    whole = hopper_linear.hopper_linear(x, w, h, b, x.new_empty(M, N), bias, starts)
    for rows in (slice(0, 1), slice(700, 1469), slice(1000, M)):
        part = hopper_linear.hopper_linear(
            x[rows], w, h[rows], b, x.new_empty(rows.stop - rows.start, N), bias, starts
        )
        assert torch.equal(part, whole[rows])


@on_hopper
def test_pieces_and_parts_that_meet_elsewhere(monkeypatch):
    """A weight that is dense by halves, whose parts do not end where the halves do."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size, scale=1.0: (scale * torch.randn(size, generator=generator, device="cuda")).bfloat16()
    M, K, N, r, columns = 4096, 4096, 28672, 16, [0, 4096, 4096, 28672]
    q = quantize_4bit(draw(N, K, scale=K**-0.5), "nf4").packed()
    x, a, b, bias = draw(M, K), draw(2 * r, K, scale=K**-0.5), draw(N, r, scale=r**-0.5), draw(N)
    codes, scales, *layout = q.operands()
    calls, launch = [], lora_products.hopper_linear
    monkeypatch.setattr(
        lora_products, "hopper_linear", lambda *args: calls.append(args[4].shape) or launch(*args)
    )
    y = lora_products.many_rows(x, [codes, *scales], a, b, columns, 0.5, bias, *layout)
    assert calls == [(M, N // 2)] * 2
    rows = slice(1000, 1100)
    weight, h = dequantize_4bit(q).double(), x[rows].double() @ a.double().T
    truth = plain(x[rows].double(), weight, 0.5 * h, b.double(), bias.double(), [0, 4096])
    ordinary = plain(x[rows], dequantize_4bit(q), 0.5 * h.bfloat16(), b, bias, [0, 4096])
    assert_no_worse_than(y[rows], ordinary, truth, floor=EPS[torch.bfloat16], name="y")
