"""A frozen linear layer with low-rank adapters, forward and backward in few passes over the activations.

    y = x W^T + bias + scaling * (x A^T) B^T         x (M, K), W (N, K), A (r, K), B (N, r), y (M, N)

W is dense or 4-bit, and has no gradient. With dy the gradient of y:

    h = x A^T                       g = dy B
    dx = dy W + scaling * g A       dA = scaling * g^T x        dB = scaling * dy^T h        dbias = sum_m dy

Projections that share x run as one (``lora_linear_stacked``): W holds the rows of all P parts, A (P r, K) their
adapters, so that one product with W, one with A, and in backward one of each for dx and dA, serve all parts. Parts
may be without an adapter.

Up to ``MAX_ROWS`` rows of 16-bit x all is two to four launches (``lora_decode``), which read the adapters live.
More rows are products of ``lora_products``, most of them a library's, of which x, the parameters and what they are
rounded to are kept: nothing of (M, N) and no dense W.

Precision: A and B are rounded to x's dtype, sums are float32. dA and dB come in the dtype of A and B, from float32
sums. No atomics: results repeat bit for bit.

Papers: LoRA, Hu et al. 2021, arXiv 2106.09685; QLoRA, Dettmers et al. 2023, arXiv 2305.14314.
"""

import torch
import torch.nn.functional as F

from . import _runtime
from .dispatch import route
from .lora_decode import MAX_ROWS, few_rows
from .lora_products import gradients, many_rows, spans_of
from .matmul_4bit import _matmul_torch
from .quantization import DTYPES, QuantizedWeight, dequantize_4bit_ref
from .swiglu import swiglu

MAX_RANK = 128


def lora_linear_ref(x, weight, lora_a, lora_b, scaling, bias=None):
    """Specification of :func:`lora_linear`, in x's dtype, with autograd's own gradients."""
    if isinstance(weight, QuantizedWeight):
        weight = dequantize_4bit_ref(weight, x.dtype)
    h = F.linear(x, lora_a.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * F.linear(h, lora_b.to(x.dtype))


def lora_linear_stacked_ref(x, weight, lora_a, lora_b, scaling, bias=None, starts=None):
    """Specification of :func:`lora_linear_stacked`: the parts one by one."""
    if isinstance(weight, QuantizedWeight):
        weight = dequantize_4bit_ref(weight, x.dtype)
    y, stop = F.linear(x, weight, bias), 0
    for index, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        start = stop if starts is None else starts[index]
        stop = start + len(b)
        delta = scaling * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        y = y + F.pad(delta, (start, y.shape[-1] - stop))
    return y


def _few(x, N):
    """Whether ``few_rows`` takes x: the library's float32 products are exact, the kernels' are not on CUDA."""
    return 0 < len(x) <= MAX_ROWS and N > 0 and not (x.is_cuda and x.dtype == torch.float32)


def _lora_linear_triton(
    x: torch.Tensor, weight: list[torch.Tensor], lora_a: torch.Tensor, lora_b: torch.Tensor, columns: list[int],
    scaling: float, bias: torch.Tensor | None, quant_block: int, first_block: int,
) -> torch.Tensor:  # fmt: skip
    M, N = x.shape[0], weight[0].shape[0]
    if not M * N:
        return x.new_empty(M, N)
    if _few(x, N):
        adapters = lora_a.contiguous(), lora_b.contiguous(), columns, scaling
        return few_rows(x, weight, *adapters, bias, quant_block, first_block)
    return many_rows(x, weight, lora_a, lora_b, columns, scaling, bias, quant_block, first_block)


def _lora_linear_torch(x, weight, lora_a, lora_b, columns, scaling, bias, quant_block, first_block):
    if quant_block:
        y, r = _matmul_torch(x, weight[0], weight[1:], bias, quant_block, first_block), lora_b.shape[1]
    else:
        y, r = F.linear(x, weight[0], bias), lora_b.shape[1]
    h, b = x @ lora_a.to(x.dtype).t(), lora_b.to(x.dtype)
    for part, (start, stop, first) in enumerate(spans_of(columns)):
        rows = b[first : first + stop - start]
        y[:, start:stop].addmm_(h[:, part * r : part * r + r], rows.t(), alpha=scaling)
    return y


def _lora_linear_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: list[torch.Tensor], lora_a: torch.Tensor, lora_b: torch.Tensor,
    columns: list[int], scaling: float, quant_block: int, first_block: int, needs_x: bool, needs_lora: bool,
    a_dtype: torch.dtype, b_dtype: torch.dtype,
) -> list[torch.Tensor]:  # fmt: skip
    if not dy.numel():
        empty = _bwd_fake(
            dy, x, weight, lora_a, lora_b, columns, scaling, quant_block, first_block, needs_x, needs_lora, a_dtype,
            b_dtype,
        )  # fmt: skip
        return [t.zero_() for t in empty]
    options = columns, scaling, quant_block, first_block, needs_x, needs_lora, a_dtype, b_dtype
    return gradients(dy, x, weight, lora_a, lora_b, *options)


def _fake(x, weight, *others):
    return x.new_empty(len(x), len(weight[0]))


def _bwd_fake(
    dy, x, weight, lora_a, lora_b, columns, scaling, quant_block, first_block, needs_x, needs_lora, a_dtype, b_dtype
):  # fmt: skip
    rows = [stop - start for start, stop, _ in spans_of(columns)]
    grads = [lora_a.new_empty(lora_a.shape if needs_lora else 0, dtype=a_dtype)]
    grads += [lora_b.new_empty((n, lora_b.shape[1]) if needs_lora else 0, dtype=b_dtype) for n in rows]
    return [x.new_empty(x.shape if needs_x else 0), *grads]


_op = _runtime.register(
    "lora_linear", triton_impl=_lora_linear_triton, torch_impl=_lora_linear_torch, fake=_fake
)
_bwd_op = _runtime.register(
    "lora_linear_bwd", triton_impl=_lora_linear_bwd, torch_impl=_lora_linear_bwd, fake=_bwd_fake
)


def _stack(parts):
    """``parts`` one after the other along the first dimension: without a copy where they lie so in one buffer."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if torch.compiler.is_compiling():
        return torch.cat(parts)
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            return torch.cat(parts)
        if part.untyped_storage().data_ptr() != storage:  # neighbours by chance
            return torch.cat(parts)
        end += part.nbytes
    columns = first.shape[1]
    rows = (end - first.data_ptr()) // (columns * first.element_size())
    return first.detach().as_strided((rows, columns), (columns, 1))


def _stacked(x, parts):
    """lora_a and lora_b of all ``parts`` in one tensor each, rounded at once where x has many rows of 16 bits."""
    P = len(parts) // 2
    stacks = _stack(parts[:P]), _stack(parts[P:])
    many = x.is_cuda and len(x) > MAX_ROWS and not torch.compiler.is_compiling()
    return [stack.to(x.dtype) for stack in stacks] if many else stacks


def _forward(x, bias, weight, columns, scaling, quant_block, first_block, *adapters):
    forward = route(_op, _lora_linear_triton, _lora_linear_torch, x.device)
    return forward(x, weight, *_stacked(x, adapters), columns, scaling, bias, quant_block, first_block)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, bias, weight, columns, scaling, quant_block, first_block, value, gradients, *adapters
    ):
        ctx.columns, ctx.scaling, ctx.layout = columns, scaling, (quant_block, first_block)
        ctx.gradients = gradients
        stacks = _stacked(x, adapters)
        # Rounded copies serve backward, too; views of the parameters would escape its check that none has changed.
        rounded = [] if stacks[0].dtype == adapters[0].dtype else stacks
        ctx.save_for_backward(x, *adapters, *rounded, *weight)
        ctx.rounded = len(rounded)
        if not value:
            return x.new_zeros(1, 1).expand(len(x), len(weight[0]))
        forward = route(_op, _lora_linear_triton, _lora_linear_torch, x.device)
        return forward(x, weight, *stacks, columns, scaling, bias, quant_block, first_block)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        P = len(ctx.columns) // 2
        x, *tensors = ctx.saved_tensors
        adapters, weight = tensors[: 2 * P], tensors[2 * P + ctx.rounded :]
        stacks = tensors[2 * P : 2 * P + 2] if ctx.rounded else _stacked(x, adapters)
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        needed, targets = ctx.needs_input_grad[9:], ctx.gradients or ()
        needs_lora = any(needed) or bool(targets)
        dtypes = (torch.float32,) * 2 if targets else (adapters[0].dtype, adapters[P].dtype)
        dx = dbias = None
        grads = [None] * (2 * P)
        if needs_x or needs_lora:
            backward = route(_bwd_op, _lora_linear_bwd, _lora_linear_bwd, x.device)
            options = ctx.columns, ctx.scaling, *ctx.layout, needs_x, needs_lora
            with torch.autocast(x.device.type, enabled=False):
                dx, da, *db = backward(dy, x, weight, *stacks, *options, *dtypes)
            if needs_lora:
                grads = [*(da.split(adapters[0].shape[0]) if P > 1 else [da]), *db]
        for target, grad in zip(targets, grads, strict=False):
            if target is not None:
                target.copy_(grad)
        if needs_bias:
            dbias = dy.sum(0)
        grads = [grad if need and not targets else None for grad, need in zip(grads, needed, strict=True)]
        return dx if needs_x else None, dbias, None, None, None, None, None, None, None, *grads


def _check_operand(name, tensor, shape, dtypes, device):
    # Messages are made on failure only: a decode step comes here once a layer and projection.
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
            f"expected {shape} of {' or '.join(map(str, dtypes))} on {device}"
        )


def lora_linear(x, weight, lora_a, lora_b, scaling, bias=None):
    """``x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T``, with gradients to x, the adapter and the bias.

    Args:
        x: (..., K) float32, float16 or bfloat16 (float64 on the CPU, with a dense weight).
        weight: frozen; dense (N, K) of x's dtype, or a QuantizedWeight of that shape.
        lora_a: (r, K) float32 or x's dtype; r from 1 to 128.
        lora_b: (N, r) float32 or x's dtype.
        scaling: factor of the adapter, alpha / r.
        bias: (N,) of x's dtype, or None.

    Returns:
        (..., N) in x's dtype, in which all is computed under autocast, too.

    Raises:
        ValueError: a shape, dtype, device or rank is not as above, or the weight requires a gradient.
    """
    (N, K), r, dtypes, device = weight.shape, lora_a.shape[0], (x.dtype, torch.float32), x.device
    _check_base(x, weight, bias, r)
    _check_operand("lora_a", lora_a, (r, K), dtypes, device)
    _check_operand("lora_b", lora_b, (N, r), dtypes, device)
    return _apply(x, weight, bias, [0, N], scaling, (lora_a, lora_b))


def lora_linear_stacked(
    x, weight, lora_a, lora_b, scaling, bias=None, starts=None, *, gated=False, residual=None, value=True,
    gradients=None,
):  # fmt: skip
    """:func:`lora_linear` of P projections of one x, whose rows of ``weight`` stand one after the other.

    Part p owns the outputs from ``starts[p]`` on: y[..., starts[p] : starts[p] + N_p] gets scaling * (x @
    lora_a[p].T) @ lora_b[p].T. Parts that are neighbours in one buffer, in order, are read where they lie.

    Args:
        x, weight, scaling, bias: as for ``lora_linear``.
        lora_a: P tensors (r, K), all of one dtype, float32 or x's.
        lora_b: P tensors (N_p, r), all of one dtype, float32 or x's.
        starts: P first outputs, rising, so that the parts do not overlap; None: end to end from 0, all N outputs.
        gated: give ``swiglu(y)``, (..., N / 2). residual (..., N) of x's dtype: give residual + y. One or neither;
            for few rows and without a graph to build no launch of its own.
        value: False where only gradients are wanted, of a result that is known: y is zeros, uncomputed.
        gradients: float32 tensors shaped as lora_a, then as lora_b, None for some: backward writes the adapters'
            gradients there and gives none to autograd, which would round them to the adapters' dtype.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError: as ``lora_linear``, or parts that are none, of unequal rank or dtype, or not within the outputs.
    """
    (N, K), device = weight.shape, x.device
    if not lora_a or len(lora_a) != len(lora_b) or (starts is not None and len(starts) != len(lora_a)):
        counts = len(lora_a), len(lora_b), None if starts is None else len(starts)
        raise ValueError(
            f"lora_a, lora_b and starts have {counts} parts, expected as many of each, at least one"
        )
    r, kinds = lora_a[0].shape[0], ((lora_a[0].dtype,), (lora_b[0].dtype,))
    _check_base(x, weight, bias, r)
    columns, stop = [], 0
    for part, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        start, own = stop if starts is None else starts[part], b.shape[0]
        _check_operand(f"lora_a[{part}]", a, (r, K), kinds[0], device)
        _check_operand(f"lora_b[{part}]", b, (own, r), kinds[1], device)
        if not stop <= start <= N - own:
            raise ValueError(
                f"part {part} owns outputs {start} to {start + own}, expected within {stop} to {N}"
            )
        stop = start + own
        columns += start, stop
    if starts is None and stop != N:
        raise ValueError(f"the parts have {stop} outputs, the weight {N}, expected as many or starts")
    for name, (dtype,) in zip(("lora_a", "lora_b"), kinds, strict=True):
        if dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} is {dtype}, expected {x.dtype} or torch.float32")
    if residual is not None:
        _check_operand("residual", residual, (*x.shape[:-1], N), (x.dtype,), device)
    if gated and (residual is not None or N % 2):
        raise ValueError(f"gated with {N} outputs and residual {residual is not None}, expected 2F and none")
    if gradients is not None:
        for index, (target, parameter) in enumerate(zip(gradients, (*lora_a, *lora_b), strict=True)):
            if target is not None:
                _check_operand(f"gradients[{index}]", target, parameter.shape, (torch.float32,), device)
    return _apply(x, weight, bias, columns, scaling, (*lora_a, *lora_b), gated, residual, value, gradients)


def _check_base(x, weight, bias, r):
    quantized = isinstance(weight, QuantizedWeight)
    (N, K), dtype, device = weight.shape, x.dtype, x.device
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {K})")
    double = dtype == torch.float64 and device.type == "cpu" and not quantized
    if dtype not in DTYPES and not double:
        raise ValueError(f"x is {dtype} on {device}, expected one of {DTYPES}, or float64 on the CPU")
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"the rank is {r}, expected 1 to {MAX_RANK}")
    if bias is not None:
        _check_operand("bias", bias, (N,), (dtype,), device)
    if weight.device != device or not (quantized or weight.dtype == dtype):
        raise ValueError(f"the weight is {weight.dtype} on {weight.device}, expected x's {dtype} on {device}")
    if not quantized and weight.requires_grad:
        raise ValueError("the weight requires a gradient, expected a frozen one")


def _apply(
    x, weight, bias, columns, scaling, adapters, gated=False, residual=None, value=True, gradients=None
):
    if torch.is_autocast_enabled(x.device.type):
        options = gated, residual, value, gradients
        with torch.autocast(x.device.type, enabled=False):
            return _apply(x, weight, bias, columns, scaling, adapters, *options)
    (N, K), tensors, quant_block, first_block = weight.shape, [weight], 0, 0
    if isinstance(weight, QuantizedWeight):
        codes, scales, quant_block, first_block = weight.operands()
        tensors = [codes, *scales]
    rows, bias = x.reshape(-1, K).contiguous(), None if bias is None else bias.contiguous()
    operands = rows, bias, tensors, columns, float(scaling), quant_block, first_block
    if torch.is_grad_enabled():
        y = _LoraLinear.apply(*operands, value, gradients, *adapters)
    else:  # without a graph to build, the cost of an autograd function is saved
        forward = route(_op, _lora_linear_triton, _lora_linear_torch, x.device)
        if (gated or residual is not None) and forward is _lora_linear_triton and _few(rows, N):
            P = len(columns) // 2
            stacks = _stack(adapters[:P]).contiguous(), _stack(adapters[P:]).contiguous()
            residual = None if residual is None else residual.reshape(-1, N).contiguous()
            options = bias, quant_block, first_block, gated, residual
            y = few_rows(rows, tensors, *stacks, columns, float(scaling), *options)
            return y.view(*x.shape[:-1], y.shape[1])
        y = _forward(*operands, *adapters)
    y = y.view(*x.shape[:-1], N)
    return swiglu(y) if gated else y if residual is None else residual + y
