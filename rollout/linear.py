"""Projections that share an input, as one frozen weight with adapters that stand side by side in one buffer.

q, k and v are one linear layer, gate and up another. Adapters keep a name, a lora_a and a lora_b each, as PEFT has
them: parameters that are views of the layer's two buffers, which the kernels read. So an optimiser that updates the
parameters in place updates what is read, and the buffers never move.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import QuantizedWeight, lora_linear_stacked, matmul_4bit, quantize_4bit, swiglu
from ..kernels.quantization import pieces

STACKS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
LINEARS = tuple(part for parts in STACKS.values() for part in parts)


def quantized(tensor, format, name):
    """``tensor`` (N, K) as a ``QuantizedWeight`` in the order of codes that its device's kernels take."""
    return in_kernel_order(quantize_4bit(tensor, format, 32 if format == "int4" else 64, name=name))


def dense_at_once(N, K):
    """Values of a 4-bit weight (N, K) that are dense at the same time while adapters are trained on many rows."""
    return K * max(rows.stop - rows.start for rows in pieces(N, K, quant_block=64))


def in_kernel_order(weight):
    """The 4-bit ``weight`` with packed codes where it lies on a GPU and can be packed."""
    return weight.packed() if weight.device.type == "cuda" and weight.can_be_packed else weight


def concatenate(weights):
    """The rows of ``weights``, all dense or all 4-bit, one after the other: a new weight, unless there is but one.

    Doubly quantised weights have an offset of their scales each, so a stack of them keeps its scales in float32:
    equal values, 4.5 bits a weight instead of 4.127.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    kinds = [
        (w.format, w.quant_block, w.dtype, w.codes.dtype) if isinstance(w, QuantizedWeight) else w.dtype
        for w in weights
    ]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"weights that share an input are of different kinds: {kinds}")
    if not isinstance(first, QuantizedWeight):
        return torch.cat(weights)
    if first.format == "nf4" and not all(torch.equal(w.code_book, first.code_book) for w in weights):
        raise ValueError("nf4 weights that share an input have different code books")
    stacked = {"codes": torch.cat([w.codes for w in weights])}
    if first.format == "int4":
        stacked |= {name: torch.cat([getattr(w, name) for w in weights]) for name in ("scale", "minimum")}
    else:
        stacked |= {"scale": torch.cat([w.absmax() for w in weights])}
        stacked |= {"nested_scale": None, "nested_code": None, "nested_offset": None, "first_block": 0}
    return replace(first, shape=(len(stacked["codes"]), first.shape[1]), **stacked)


def stack_weights(named):
    """From (Hugging Face name, tensor) pairs the same, with the parts of a stack as one under the stack's name.

    No part outlives its stack here, so that a model is loaded with one stack's weights twice in memory, no more.
    Raises ValueError where a part is missing.
    """
    owners = {part: whole for whole, parts in STACKS.items() if len(parts) > 1 for part in parts}
    waiting = {}
    for name, tensor in named:
        prefix, _, rest = name.rpartition("proj.")  # "...self_attn.q_", "proj.", "weight"
        block, _, short = (prefix + "proj").rpartition(".")
        whole = owners.get(short) if rest else None
        if whole is None:
            yield name, tensor
            continue
        parts = waiting.setdefault(f"{block}.{whole}.{rest}", {})
        parts[short] = tensor
        if len(parts) == len(STACKS[whole]):
            del waiting[f"{block}.{whole}.{rest}"]
            stacked = concatenate([parts.pop(part) for part in STACKS[whole]])
            del tensor
            yield f"{block}.{whole}.{rest}", stacked
    if waiting:
        name, parts = next(iter(waiting.items()))
        raise ValueError(f"{name} has only {', '.join(parts)}")


def share_stacks(weights):
    """The dict ``weights`` with the parts of stacks as one; in ``weights`` itself they become views of their stacks.

    So no second copy of a weight stays alive, whoever holds ``weights``.
    """
    result = {}
    for name, tensor in stack_weights(weights.items()):
        result[name] = tensor
        block, whole, kind = (name.rsplit(".", 2) + [""] * 2)[:3]
        start = 0
        for part in STACKS.get(whole, ()):
            own = f"{block}.{part}.{kind}"
            if own in weights and own != name:
                stop = start + weights[own].shape[0]
                weights[own] = rows(tensor, start, stop)
                start = stop
    return result


def rows(weight, start, stop):
    """Rows ``start`` to ``stop`` of a weight, dense or 4-bit, as a view."""
    return weight.rows(start, stop) if isinstance(weight, QuantizedWeight) else weight[start:stop]


class StackedLinear(nn.Module):
    """y = x W^T + bias (+ the adapters of its parts) for the projections ``parts``, of ``sizes`` outputs each."""

    def __init__(self, parts, sizes, weight, bias=None):
        super().__init__()
        self.parts, self.sizes = parts, sizes
        self.weight, self.bias = weight, bias
        self.adapter_on = True
        self.gradients = (
            None  # where backward writes the adapters' gradients, as ``lora_linear_stacked`` has it
        )
        self.remove_adapters()

    def remove_adapters(self):
        for name in list(self._parameters):
            delattr(self, name)
        self.adapted, self.lora_a, self.lora_b, self.starts, self.scaling = (), (), (), (), 0.0

    def add_adapters(self, targets, r, alpha, generator, dtype=torch.float32):
        """Attach adapters to the parts in ``targets``, in place of any others.

        lora_a (r, K), uniform in +-1/sqrt(K) (Kaiming with a = sqrt 5, as PEFT), and lora_b (N, r) = 0, in ``dtype``.
        """
        self.remove_adapters()
        chosen = [index for index, part in enumerate(self.parts) if part in targets]
        if not chosen:
            return
        K, device = self.weight.shape[1], self.weight.device
        bound = 1 / math.sqrt(K)
        lora_a = (
            torch.empty(len(chosen) * r, K).uniform_(-bound, bound, generator=generator).to(device, dtype)
        )
        sizes = [self.sizes[index] for index in chosen]
        lora_b = torch.zeros(sum(sizes), r, device=device, dtype=dtype)
        self.adapted = tuple(self.parts[index] for index in chosen)
        self.lora_a = tuple(map(nn.Parameter, lora_a.split(r)))
        self.lora_b = tuple(map(nn.Parameter, lora_b.split(sizes)))
        self.starts = tuple(sum(self.sizes[:index]) for index in chosen)
        self.scaling = alpha / r
        for part, a, b in zip(self.adapted, self.lora_a, self.lora_b, strict=True):
            self.register_parameter(f"{part}_lora_a", a)
            self.register_parameter(f"{part}_lora_b", b)

    def projections(self):
        return [Projection(self, index) for index in range(len(self.parts))]

    def forward(self, x, *, gated=False, residual=None):
        """y; with ``gated`` swiglu(y), for a gate and an up projection; with ``residual`` residual + y."""
        if self.lora_a and self.adapter_on:
            adapters = self.lora_a, self.lora_b, self.scaling, self.bias, self.starts
            options = {"gated": gated, "residual": residual, "gradients": self.gradients}
            return lora_linear_stacked(x, self.weight, *adapters, **options)
        if isinstance(self.weight, QuantizedWeight):
            y = matmul_4bit(x, self.weight, self.bias)
        else:
            y = F.linear(x, self.weight, self.bias)
        return swiglu(y) if gated else y if residual is None else residual + y


@dataclass(frozen=True)
class Projection:
    """One part of a ``StackedLinear``: its rows of the weight and its adapter, shared, not copied."""

    linear: StackedLinear
    index: int

    @property
    def name(self):
        return self.linear.parts[self.index]

    @property
    def shape(self):
        """(N, K) of its weight."""
        return self.linear.sizes[self.index], self.linear.weight.shape[1]

    @property
    def weight(self):
        start = sum(self.linear.sizes[: self.index])
        return rows(self.linear.weight, start, start + self.linear.sizes[self.index])

    @property
    def lora_a(self):
        """(r, K) parameter, None without an adapter."""
        return self._adapter(self.linear.lora_a)

    @property
    def lora_b(self):
        """(N, r) parameter, None without an adapter."""
        return self._adapter(self.linear.lora_b)

    def _adapter(self, parts):
        adapted = self.linear.adapted
        return parts[adapted.index(self.name)] if self.name in adapted else None
