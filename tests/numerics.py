"""One tolerance rule for every kernel: no worse than plain torch in the same dtype, against float64 truth."""

import torch


def assert_no_worse_than(ours, plain, truth, *, factor=2.0, floor, name=""):
    """Assert max|ours - truth| <= factor * max|plain - truth| + floor * (1 + max|truth|).

    ``plain`` is what plain torch computes in the dtype of ``ours``; ``truth`` is float64. ``floor`` is the stated
    rounding floor, a multiple of the unit roundoff that the operation cannot avoid.
    """
    assert ours.shape == truth.shape, f"{name}: got shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{name}: non-finite values"
    ours, plain, truth = ours.double().cpu(), plain.double().cpu(), truth.double().cpu()
    error, reference = (ours - truth).abs().max().item(), (plain - truth).abs().max().item()
    limit = factor * reference + floor * (1 + truth.abs().max().item())
    assert error <= limit, f"{name}: error {error:.3e} exceeds {limit:.3e} (plain torch: {reference:.3e})"


EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-52}
