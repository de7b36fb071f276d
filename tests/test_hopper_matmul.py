"""The product for Hopper: what its plans promise, how it compiles, and on a GPU the bits of ``tiled_matmul``."""

import os
import re
from unittest import mock

import pytest
import torch
from cross_compile import assert_compiles, recorded_launches, resource_usage
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import tiled_matmul
from nanogrpo.kernels.hopper_matmul import (
    PROCESSORS,
    REGISTERS,
    HopperConfig,
    hopper_config,
    hopper_products,
    stages_of,
)
from nanogrpo.kernels.lora_decode import few_rows, rank_sums, ranks
from nanogrpo.kernels.matmul_4bit import HOPPER_ROWS, matmul_4bit, product_config
from nanogrpo.kernels.quantization import kernel_format
from nanogrpo.kernels.tiled_matmul import TileConfig, tiled_products
from test_packed_matmul import check, every_format, made, witness

COMPILES = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Gluon has no interpreter")
# block_m, units and splits of K of every kind that the plans make
PLANS = [(16, 1, 4), (16, 3, 1), (16, 4, 1), (32, 1, 3), (32, 3, 1), (32, 4, 1)]
PLANS += [(64, 1, 5), (64, 3, 1), (64, 4, 1), (128, 2, 3), (128, 3, 2)]


def run(x, q, bias, config):
    codes, scales, _, first_block = q.operands()
    return hopper_products(x, codes, scales, bias, first_block, kernel_format(scales), config)


@given(groups=st.integers(1, 5000), tiles=st.integers(1, 256), rows=st.sampled_from(HOPPER_ROWS))
def test_plans_cover_the_work(groups, tiles, rows):
    config = hopper_config(64 * groups, 128 * tiles, rows)
    if config is None:
        assert groups * tiles < 1024 or (rows != 64 and tiles < 16)
        return
    programs = -(-groups // config.units) * -(-rows // config.block_m)
    steps = -(-tiles // config.splits)
    assert steps * (-(-tiles // steps) - 1) < tiles  # no program without a tile
    assert config.splits == 1 or programs * config.splits <= PROCESSORS * REGISTERS[config.units][2]
    assert config.block_m == min(rows, 128)
    assert stages_of(config.block_m, config.units) >= 2
    assert any((config.block_m, config.units) == plan[:2] for plan in PLANS)


@COMPILES
@pytest.mark.parametrize(
    "M, N, K, hopper",
    [
        (1, 2048, 4096, True), (8, 2048, 4096, True), (8, 4096, 8064, False), (8, 4096, 8192, True),
        (9, 4096, 2048, True), (256, 4096, 2048, True), (257, 4096, 2048, False), (9, 1024, 1024, False),
    ],
)  # fmt: skip
def test_which_products_are_its_own(M, N, K, hopper):
    words = torch.empty(N, K // 8, dtype=torch.int32, device="meta")
    assert isinstance(product_config(90, M, words, "nf4"), HopperConfig) == hopper
    assert not isinstance(product_config(100, M, words, "nf4"), HopperConfig)
    assert isinstance(product_config(90, M, words, "int4"), HopperConfig) == (hopper and M > 8)


@COMPILES
@pytest.mark.parametrize(
    "format, double_quant, dtype, plan",
    [("nf4", False, torch.bfloat16, plan) for plan in PLANS]
    + [
        (*kind, plan)
        for kind in (
            ("nf4", True, torch.bfloat16),
            ("int4", False, torch.bfloat16),
            ("nf4", False, torch.float16),
        )
        for plan in ((64, 1, 5), (128, 3, 2))
    ],
)
def test_compiles(format, double_quant, dtype, plan, tmp_path):
    """Within shared memory and registers that let as many programs run at once as the plans count on."""
    q, (block_m, units, _) = made(200, 1152, format, double_quant).packed(), plan
    x, bias = torch.zeros(block_m, 1152).to(dtype), torch.zeros(200).to(dtype)
    config = HopperConfig(*plan, True)
    launches = assert_compiles(lambda: run(x, q, bias, config), 90, {"hopper_kernel"})
    used, resident = resource_usage(launches[0][1], tmp_path), REGISTERS[units][2]
    assert used["STACK"] == 0, "registers spilled"
    assert resident * (used["SHARED"] + launches[0][1].metadata.shared) <= 228 * 1024
    assert resident * used["REG"] * 32 * 4 * (units + 1) <= 65536


@COMPILES
def test_products_are_awaited_with_their_operands():
    """Operands from registers must stay as they are until the wait: that they are read by it is what holds them."""
    q = made(128, 1152, "nf4").packed()
    with recorded_launches(90) as launches:
        run(torch.zeros(64, 1152).bfloat16(), q, None, HopperConfig(64, 1, 1, True))
    ((_, kernel),) = launches
    waits = re.findall(r"ttng\.warp_group_dot_wait .*", kernel.asm["ttgir"])
    assert len(waits) == 3 and all(wait.count("#ttg.dot_op") for wait in waits), waits
    products = [line for line in kernel.asm["ptx"].split("\n") if "wgmma.mma_async" in line]
    assert products and all(re.search(r"\}, \{[^}]*\}, %rd\d+,", line) for line in products)


@COMPILES
def test_what_the_next_kernel_may_count_on():
    """Dependents start behind the fetching warp's wait, when the first codes are on their way; groups wait, too."""
    q = made(128, 1152, "nf4").packed()
    with recorded_launches(90) as launches:
        run(torch.zeros(64, 1152).bfloat16(), q, None, HopperConfig(64, 1, 1, True))
    ((_, kernel),) = launches
    order = re.findall(r"griddepcontrol\.\w+|cp\.async\.bulk\.tensor", kernel.asm["ptx"])
    wait, start = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
    assert order.count(wait) == 2 and order.count(start) == 1
    assert order[order.index(start) - 1] == wait
    assert order[: order.index(start)].count("cp.async.bulk.tensor") == stages_of(64, 1)


@COMPILES
def test_ranks_start_at_once_and_end_last():
    """Beside the product they wait for it behind their own work: who waits for them has waited for both."""
    with recorded_launches(90) as launches:
        x, a = torch.zeros(64, 1024).bfloat16(), torch.zeros(64, 1024)
        ranks(x, a, True, beside=rank_sums(x, a))
    ((_, kernel),) = launches
    text = kernel.asm["ptx"]
    assert text.count("griddepcontrol.wait") == text.count("griddepcontrol.launch_dependents") == 1
    start, wait = text.index("griddepcontrol.launch_dependents"), text.index("griddepcontrol.wait")
    assert start < text.index("mma") and text.rindex("st.global") < wait


@COMPILES
def test_adapters_take_three_launches():
    q = made(2048, 4096, "nf4").packed()
    codes, scales, *layout = q.operands()
    x, a, b = torch.zeros(40, 4096).bfloat16(), torch.zeros(16, 4096), torch.zeros(2048, 16)
    with recorded_launches(90) as launches:
        few_rows(x, [codes, *scales], a, b, [0, 2048], 0.5, None, *layout)
    assert [name for name, _ in launches] == ["hopper_kernel", "_tiled_down_kernel", "_up_kernel"]


def like_tiled(x, q, bias, splits):
    """``tiled_matmul`` with K split in the same way."""
    codes, scales, _, first_block = q.operands()
    tiles = x.shape[1] // 128
    steps = -(-tiles // splits)
    plan = lambda N, tiles, config: (-(-N // config.block_n), steps, -(-tiles // steps))
    config = TileConfig(64 if len(x) <= 64 else 128, 64, 4, 2, 1, 0, True)
    with mock.patch.object(tiled_matmul, "tile_plan", plan):
        return tiled_products(x, codes, scales, bias, first_block, kernel_format(scales), config)


@pytest.mark.gpu
@every_format
@pytest.mark.parametrize("block_m, units, splits", PLANS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("N, K", [(1, 128), (70, 1152), (1000, 896), (2048, 4096)])
def test_the_bits_of_the_tiled_product(format, double_quant, block_m, units, splits, dtype, N, K):
    """Which the interpreter checks: all rows and columns, with bias or partial sums, over memory full of NaN."""
    splits = min(splits, K // 128)
    q = made(N, K, format, double_quant, seed=N).to("cuda").packed()
    for M in (1, block_m - 3, block_m, 2 * block_m + 1):
        generator = torch.Generator().manual_seed(M)
        x = torch.randn(M, K, generator=generator).to("cuda", dtype)
        bias = torch.randn(N, generator=generator).to("cuda", dtype) if splits == 1 else None
        truth = like_tiled(x, q, bias, splits)
        for pdl in (True, False):
            poison = torch.full_like(truth, torch.nan)  # whose place the output takes
            del poison
            assert torch.equal(run(x, q, bias, HopperConfig(block_m, units, splits, pdl)), truth)


@pytest.mark.gpu
@every_format
@pytest.mark.parametrize("M", [1, 9, 16, 17, 32, 64, 65, 128, 256])
@pytest.mark.parametrize("N, K", [(17920, 1536), (1536, 8960), (6144, 4096), (4096, 14336)])
def test_integers_are_exact_on_cuda(format, double_quant, M, N, K):
    q, weight = witness(64, K, format, double_quant, torch.bfloat16, seed=M)
    q = q.index_rows(torch.arange(N) % 64).to("cuda")
    x = torch.randint(-8, 9, (M, K), generator=torch.Generator().manual_seed(M))
    truth = (x.double() @ weight.T).to(torch.bfloat16).cuda()
    assert torch.equal(matmul_4bit(x.to("cuda", torch.bfloat16), q), truth.repeat(1, N // 64))


@pytest.mark.gpu
@every_format
@pytest.mark.parametrize("M", [1, 9, 33, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_real_shapes_on_cuda(format, double_quant, M, dtype):
    generator = torch.Generator().manual_seed(M)
    x, bias = (
        torch.randn(M, 14336, generator=generator).to(dtype),
        torch.randn(4096, generator=generator).to(dtype),
    )
    check(x, made(4096, 14336, format, double_quant), bias, "cuda")


@pytest.mark.gpu
def test_a_row_does_not_depend_on_its_batch_on_cuda():
    q = made(4096, 4096, "nf4").to("cuda").packed()
    x = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0)).cuda().bfloat16()
    for least, most in ((9, 16), (17, 32), (33, 64), (65, 128), (129, 256)):
        few, many = (matmul_4bit(x[:M], q) for M in (least, most))
        assert torch.equal(many[:least], few)
    long = made(2048, 4096, "nf4").to("cuda").packed()
    assert torch.equal(matmul_4bit(x[:1], long), matmul_4bit(x[:16], long)[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("M", [20, 64, 200])
@pytest.mark.parametrize("gated, residual", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("first", [0, 1])
def test_adapters_in_a_graph_on_cuda(M, gated, residual, first, monkeypatch):
    """Three dependent launches in a row, replayed, without a race: the ranks run beside the product.

    From row 1 on scales are not aligned: the product reads copies, which are freed while it runs.
    """
    monkeypatch.setattr(
        torch.utils.deterministic, "fill_uninitialized_memory", False
    )  # by launches in between
    q = made(4096 + first, 4096, "nf4", True).to("cuda").packed().rows(first, 4096 + first)
    codes, scales, *layout = q.operands()
    columns, generator = [0, 2048, 2048, 4096], torch.Generator().manual_seed(M)
    draw = lambda *size: torch.randn(size, generator=generator).cuda()
    # No two steps alike: what one reads of another's, whose memory it may get, is wrong.
    steps = [(draw(M, 4096).bfloat16(), draw(64, 4096) / 64, draw(4096, 32) / 8) for _ in range(6)]
    more = draw(M, 4096).bfloat16() if residual else None

    def step(x, a, b):
        return few_rows(x, [codes, *scales], a, b, columns, 0.5, None, *layout, gated, more)

    expected = [step(*each) for each in steps]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [step(*each) for _ in range(4) for each in steps]
    for _ in range(5):
        graph.replay()
        assert all(torch.equal(y, expected[i % 6]) for i, y in enumerate(outputs))
    for y, (x, a, b) in zip(expected, steps, strict=True):
        h = (x.double() @ a.bfloat16().double().T).view(M, 2, 32)
        update = [h[:, p] @ b.bfloat16()[2048 * p : 2048 * (p + 1)].double().T for p in range(2)]
        truth = matmul_4bit(x, q).double() + 0.5 * torch.cat(update, 1)
        if gated:
            truth = torch.nn.functional.silu(truth[:, :2048]) * truth[:, 2048:]
        if residual:
            truth += more.double()
        # eight roundings to bfloat16 at most: of the product, here and above, h, the sum, gate, up, SwiGLU, the end
        assert (y.double() - truth).abs().max() <= 2**-6 * truth.abs().max()
