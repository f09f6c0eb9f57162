"""Error judged in float64, and allowed what plain torch errs at the same dtype."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def value_and_grads(
    fn: Callable[..., Tensor], inputs: Sequence[Any], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """`fn` and its gradients for one fixed cotangent.

    Args:
        fn: Function of `inputs` to a tensor.
        inputs: Floating-point tensors are copied, cast to `dtype` and differentiated; everything
            else (integer and bool tensors, None, numbers) passes as it is.
        dtype: torch.float64 for exact results; None keeps each dtype.

    Returns:
        The value, then one gradient for each floating-point tensor.
    """
    arguments = [
        x.detach().to(dtype or x.dtype, copy=True).requires_grad_() if _is_leaf(x) else x
        for x in inputs
    ]
    out = fn(*arguments)
    leaves = [x for x in arguments if _is_leaf(x)]
    grads = torch.autograd.grad(out, leaves, cotangent_like(out))
    return out.detach(), *grads


def cotangent_like(out: Tensor) -> Tensor:
    """-1, -7/8, ..., 1 and again from -1: the same numbers in every dtype, bfloat16 too."""
    steps = torch.arange(out.numel(), device=out.device) % 17
    return ((steps - 8) / 8).to(out.dtype).view_as(out)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest error of `actual`, as a fraction of the largest magnitude of `exact`."""
    if not exact.numel():
        return 0.0
    error = (actual.double() - exact).abs().max()
    return float(error / exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def assert_as_accurate(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    slack: float = 1.1,
    noise: float = 2 * torch.finfo(torch.float32).eps,
) -> None:
    """`actual` may err from `exact` by `slack` times what `eager` does, plus `noise`.

    All relative to the largest magnitude. On few elements `eager` may by chance be exact, so at
    least half a unit in the last place is allowed, what rounding the result costs.

    Args:
        actual: What the kernel gave.
        eager: The reference at the kernel's dtype, of the shape and dtype of `actual`.
        exact: The reference in float64 on the same (already rounded) inputs.
        slack: Allowance for a different order of summation.
        noise: By default two units of float32, for another form of the gradient.
    """
    assert actual.dtype == eager.dtype and actual.shape == eager.shape == exact.shape
    assert actual.isfinite().all(), "the kernel left NaN or Inf"
    error = relative_error(actual, exact)
    rounding = torch.finfo(actual.dtype).eps / 2
    allowed = max(slack * relative_error(eager, exact), rounding) + noise
    assert error <= allowed, f"relative error {error:.3e} exceeds {allowed:.3e}"


def assert_matches_reference(
    fused: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Any]
) -> None:
    """Value and gradients of `fused` are as accurate as those of `reference` at one dtype."""
    exact = value_and_grads(reference, inputs, torch.float64)
    eager = value_and_grads(reference, inputs)
    for result in zip(value_and_grads(fused, inputs), eager, exact, strict=True):
        assert_as_accurate(*result)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
