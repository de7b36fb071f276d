"""Chooses the tables of ``matmul_4bit``: every candidate on every shape, checked, then timed; one JSON object a line.

    python benchmarks/sweep_matmul_4bit.py [seconds]      # a CUDA GPU; stops after ``seconds`` (default 240)

A candidate is checked against float64 before it is timed, in a CUDA graph over weights rotated past the L2 cache.
"""

import importlib
import itertools
import json
import sys
import time
from unittest import mock

import measurement
import torch
from nanogrpo.kernels import _runtime, dequantize_4bit, packed_matmul, quantize_4bit, tiled_matmul
from nanogrpo.kernels.hopper_matmul import HopperConfig
from nanogrpo.kernels.packed_matmul import Config
from nanogrpo.kernels.tiled_matmul import TileConfig

# The package exports its function under the module's name.
module = importlib.import_module("nanogrpo.kernels.matmul_4bit")
SHAPES = [(8960, 1536), (1536, 8960), (14336, 4096), (4096, 14336), (1536, 1536), (256, 1536)]  # N, K
ROWS = {
    "vector": (1, 2, 4, 8),
    "fused": (4, 8, 16, 64),
    "packed": (1, 2, 4, 8, 16, 32, 64),
    "tiled": (32, 64, 128, 256),
    "hopper": (16, 32, 64, 128, 256),
}
PACKED = "packed", "tiled", "hopper"  # routes of packed codes
# As in the tables: BLOCK_N, num_warps, num_stages, programs; packed: ``Config``, tiled: ``TileConfig``, whose
# programs decide how K is split; hopper: ``HopperConfig``.
CANDIDATES = {
    "vector": [(*tile, 1, programs) for tile in ((8, 4), (16, 4), (32, 4)) for programs in (256, 512, 1024)],
    "fused": [
        (*tile, stages, programs)
        for tile in ((16, 4), (32, 4), (64, 4), (64, 8))
        for stages in (2, 3)
        for programs in (128, 256, 512)
    ],
    "tiled": [
        TileConfig(*tile, stages, unroll, programs, True)
        for tile in ((32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 64, 4))
        for stages, unroll in ((2, 1), (3, 1), (2, 2))
        for programs in (264, 396, 528)
    ],
    "hopper": [
        HopperConfig(block_m, units, splits, True)
        for block_m, units in ((16, 1), (16, 3), (32, 1), (64, 1), (64, 3), (64, 4), (128, 2), (128, 3))
        for splits in (1, 2, 4, 7, 10)
    ],
    "packed": [
        Config(*tile, programs, True)
        for tile in (
            (False, 4, 1, 2),
            (False, 8, 1, 2),
            (False, 4, 2, 2),
            (True, 4, 2, 4),
            (True, 8, 2, 4),
            (True, 4, 1, 8),
        )
        for programs in (132, 264, 1024)
    ],
}


def forced(route, config, arch):
    """What makes every call (vector, fused: of up to 64 rows) take ``route`` with ``config``."""
    if route in PACKED:
        return mock.patch.object(module, "product_config", lambda *_: config)
    vector = {arch: ((64 if route == "vector" else 0), *config)}
    return mock.patch.multiple(module, VECTOR_CONFIGS=vector, CONFIGS={arch: (64, *config)})


def measure(calls, rounds=20):
    """Microseconds a call, the median over replays of one graph of all ``calls``."""
    samples = measurement.Race("cuda", {"it": calls}, graph=True).run(seconds=0.05, most=rounds)
    return 1e3 * samples["it"]["ms"]


def distinct(route, configs, N, K):
    """The configurations without those that split K as another one does."""
    plans = {}
    for config in configs:
        if route == "hopper":
            plans.setdefault((config[:2], -(-(K // packed_matmul.TILE) // config.splits)), config)
            continue
        if route in PACKED:
            plan = packed_matmul.plan if route == "packed" else tiled_matmul.tile_plan
            plans.setdefault((config[:4], plan(N, K // packed_matmul.TILE, config)), config)
            continue
        split = module._plan(-(-N // config[0]), -(-K // (8 * module.WORDS)), config[-1])
        plans.setdefault((config[:-1], split), config)
    return plans.values()


def trial(q, copies, M, route, config, arch):
    """Largest error against float64 and, where it is small, microseconds; or why the candidate failed."""
    N, K = q.shape
    generator = torch.Generator("cuda").manual_seed(M)
    x = torch.randn(M, K, generator=generator, device="cuda").bfloat16()
    truth = x.double() @ dequantize_4bit(q, torch.bfloat16).double().T
    _, scales, *layout = q.operands()

    def run(tensors):
        return module._matmul_triton(x, tensors[0], list(tensors[1:]), None, *layout)

    try:
        with forced(route, config, arch):
            error = (run(copies[0]) - truth).abs().max().item()
            if not error <= 2.0**-7 * (1 + truth.abs().max().item()):
                return {"failed": f"wrong by {error}"}
            return {"error": error, "us": measure([lambda t=t: run(t) for t in copies])}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".split("\n")[0][:120]}


def main(seconds):
    deadline, arch = time.monotonic() + seconds, _runtime.arch(torch.device("cuda"))
    for format, (N, K) in itertools.product(("nf4", "int4"), SHAPES):
        generator = torch.Generator("cuda").manual_seed(0)
        weight = torch.randn(N, K, generator=generator, device="cuda").bfloat16() / K**0.5
        q = quantize_4bit(weight, format)
        codes, scales, *_ = q.operands()
        forms = dict.fromkeys(PACKED, measurement.rotated((q.packed().codes, *scales), "cuda"))
        forms["vector"] = forms["fused"] = measurement.rotated((codes, *scales), "cuda")
        for route, configs in CANDIDATES.items():
            copies = forms[route]
            for M, config in itertools.product(ROWS[route], distinct(route, configs, N, K)):
                if time.monotonic() > deadline:
                    return
                record = {"N": N, "K": K, "format": format, "M": M, "route": route, "config": config}
                print(json.dumps(record | trial(q, copies, M, route, config, arch)), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 240.0)
