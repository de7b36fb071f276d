"""What a forward pass begins with, in one launch: the tokens' embeddings and the angles of their positions.

    hidden_states[t] = weight[ids[t]]          weight (V, D), ids (T,)
    cos[t], sin[t] = cos, sin(positions[t] * inv_freq)          inv_freq (D2,), in float32

The launch is no programmatic dependent (``dependent_launch``): when it starts, all before it is complete, which
attention may be told (``settled``). Nothing here has a gradient. Bytes a call, for b-byte values: 2 T D b + 8 T D2 +
16 T. No memory beside the outputs.
Precision: the product of position and frequency is rounded to float32 before cosine and sine, as torch does it, and
these are the CUDA library's own. A row's result does not depend on the other rows.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import _runtime
from .dependent_launch import dependent_launch
from .dispatch import check_floating, route

BLOCK = 1024  # values of a row that a program copies


def embed_ref(ids, positions, weight, inv_freq):
    """Specification of :func:`embed`."""
    angles = positions[:, None].float() * inv_freq
    return F.embedding(ids, weight), angles.cos(), angles.sin()


@triton.jit
def _embed_kernel(
    ids, positions, weight, inv_freq, hidden_states, cos, sin, V, D, D2,
    BLOCK: tl.constexpr, BLOCK_D2: tl.constexpr, PDL: tl.constexpr, LIBRARY: tl.constexpr,
):  # fmt: skip
    """A block of row t of ``hidden_states``; the first block's program makes the angles, too."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, column = tl.load(ids + token), block * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    known = (row >= 0) & (row < V)
    values = tl.load(weight + row * D + column, mask=inside & known, other=float("nan"))
    tl.store(hidden_states + token * D + column, values, mask=inside)
    if block == 0:
        pair = tl.arange(0, BLOCK_D2)
        mask = pair < D2
        angle = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + pair, mask=mask, other=0.0)
        target = token * D2 + pair
        tl.store(cos + target, libdevice.cos(angle) if LIBRARY else tl.cos(angle), mask=mask)
        tl.store(sin + target, libdevice.sin(angle) if LIBRARY else tl.sin(angle), mask=mask)


def _embed_triton(
    ids: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor, inv_freq: torch.Tensor
) -> list[torch.Tensor]:
    hidden_states, cos, sin = outputs = _fake(ids, positions, weight, inv_freq)
    (T, D), D2 = hidden_states.shape, len(inv_freq)
    if T:
        with _runtime.launch_on(weight):
            _embed_kernel[(T, triton.cdiv(D, BLOCK))](
                ids.contiguous(), positions.contiguous(), weight.contiguous(), inv_freq.contiguous(), hidden_states,
                cos, sin, len(weight), D, D2, BLOCK=BLOCK, BLOCK_D2=triton.next_power_of_2(D2),
                LIBRARY=not _runtime.INTERPRET, num_warps=4, PDL=dependent_launch(weight)["PDL"],
            )  # fmt: skip
    return outputs


def _embed_torch(ids, positions, weight, inv_freq):
    return list(embed_ref(ids, positions, weight, inv_freq))


def _fake(ids, positions, weight, inv_freq):
    T, D2 = len(ids), len(inv_freq)
    angles = (inv_freq.new_empty(T, D2) for _ in range(2))
    return [weight.new_empty(T, weight.shape[1]), *angles]


_op = _runtime.register("embed", triton_impl=_embed_triton, torch_impl=_embed_torch, fake=_fake)


def embed(ids, positions, weight, inv_freq):
    """Embeddings of tokens, and cosines and sines of their positions' angles.

    Args:
        ids: (T,) int64, each in [0, V). One outside gives a row of NaN on CUDA, where looking would wait for the
            device, and an IndexError on the CPU.
        positions: (T,) int64.
        weight: (V, D), frozen.
        inv_freq: (D2,) float32, radians a position.

    Returns:
        hidden_states (T, D) in the weight's dtype; cos and sin, each (T, D2) float32.

    Raises:
        ValueError: a shape, dtype or device is not as above, or the weight requires a gradient.
    """
    check_floating("weight", weight)
    if weight.ndim != 2 or weight.requires_grad:
        raise ValueError(
            f"the weight has shape {tuple(weight.shape)} and requires_grad {weight.requires_grad}, "
            "expected (V, D) and a frozen one"
        )
    T, device = len(ids), weight.device
    expected = {
        "ids": (ids, (T,), torch.int64),
        "positions": (positions, (T,), torch.int64),
        "inv_freq": (inv_freq, (inv_freq.numel(),), torch.float32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"expected {dtype} {shape} on {device}"
            )
    return route(_op, _embed_triton, _embed_torch, device)(ids, positions, weight, inv_freq)
