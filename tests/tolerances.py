"""One table of tolerances for all tests, and the one measure they are stated in: ‖actual − expected‖ / ‖expected‖.

The norm runs over the whole tensor, so that an error counts against the size of the result and not of its smallest entry.
"""

import torch
from torch import Tensor

# By the dtype that the inputs have; expected values come from the same, already rounded, inputs.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
}
# A norm below this counts as zero: what has decayed that far is rounded to nothing in one precision and not in another.
NEGLIGIBLE = 1e-20


def relative_error(actual: Tensor, expected: Tensor, scale: float = NEGLIGIBLE) -> float:
    """‖actual − expected‖ / max(‖expected‖, scale), in float64; nan or inf where `actual` is not finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp(min=scale)).item()


def tolerance(dtype: torch.dtype, num_ops: int = 1) -> float:
    """For a result of `num_ops` ops, one after the other: roundings that don't know of each other add up like their squares."""
    return TOLERANCES[dtype] * num_ops**0.5


def assert_close(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    name: str = "result",
    scale: float = NEGLIGIBLE,
    num_ops: int = 1,
) -> None:
    """Holds `actual` to `expected` at the tolerance of `dtype`, the dtype of the inputs; the shapes must be equal.

    `scale` is for a sum whose terms may cancel: the size of the terms, below which its own norm is no measure of an error.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error, most = relative_error(actual, expected, scale), tolerance(dtype, num_ops)
    assert error <= most, f"{name}: relative error {error:.2e}, at most {most:.0e} for {dtype}"
