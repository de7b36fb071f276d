"""Time the tile configurations of fused_linear_logprob on this GPU: JSON, one line a configuration, best first.

    python benchmarks/sweep_linear_logprob.py [rows hidden_size vocab_size]

Each is checked against float64 on sampled rows before it is timed, forward alone and with the frozen head's backward.
"""

import json
import statistics
import sys
from unittest import mock

import torch
from nanogrpo.kernels import fused_linear_logprob, logit_passes
from nanogrpo.kernels.linear_logprob import fused_linear_logprob_ref

KEYS = ("BLOCK_M", "BLOCK_V", "BLOCK_D", "num_warps", "num_stages", "programs", "TMA")
CONFIGS = [
    (128, 256, 64, 8, 3, 1, True),
    (128, 256, 64, 8, 3, 1, False),
    (128, 256, 64, 8, 2, 1, True),
    (128, 256, 32, 8, 4, 1, True),
    (256, 128, 64, 8, 3, 1, True),
    (128, 128, 64, 4, 3, 2, True),
    (128, 128, 64, 8, 3, 2, True),
    (64, 256, 64, 4, 2, 2, True),
    (64, 256, 64, 4, 2, 2, False),
]


def milliseconds(call, repeats=10):
    """Median time of ``call`` by CUDA events, after two calls to warm up."""
    call(), call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def measure(config, hidden, weight, target_ids):
    table = dict.fromkeys(logit_passes.HALF_CONFIG, config)
    some = torch.arange(0, len(hidden), max(1, len(hidden) // 16), device=hidden.device)
    with mock.patch.object(logit_passes, "HALF_CONFIG", table):
        with torch.no_grad():
            forward = lambda: fused_linear_logprob(hidden, weight, target_ids).logprobs
            truth = fused_linear_logprob_ref(
                hidden[some].double(), weight.double(), target_ids[some]
            ).logprobs
            error = ((forward()[some] - truth).abs() / (1 + truth.abs())).max().item()
            assert error < 1e-5, error
            forward_ms = milliseconds(forward)
        leaf = hidden.clone().requires_grad_()
        both = lambda: fused_linear_logprob(leaf, weight, target_ids).logprobs.backward(hidden[:, 0].float())
        return {"forward_ms": forward_ms, "both_ms": milliseconds(both), "error": error}


def main(rows=8192, hidden_size=1536, vocab_size=151936):
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)
    hidden, weight = draw(rows, hidden_size), draw(vocab_size, hidden_size) / hidden_size**0.5
    target_ids = torch.randint(vocab_size, (rows,), device="cuda", generator=generator)
    part = hidden[:2048]
    matmul_ms = milliseconds(lambda: part @ weight.T) * rows / len(part)
    results = []
    for values in CONFIGS:
        config = dict(zip(KEYS, values, strict=True))
        try:
            results.append(config | measure(config, hidden, weight, target_ids))
        except Exception as error:  # out of shared memory, say: the other configurations still count
            results.append(
                config | {"failed": f"{type(error).__name__}: {error}"[:200], "both_ms": float("inf")}
            )
    for result in sorted(results, key=lambda result: result["both_ms"]):
        print(json.dumps({"shape": [rows, hidden_size, vocab_size], "matmul_ms": matmul_ms} | result))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
