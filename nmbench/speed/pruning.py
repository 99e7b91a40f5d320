"""Weights that are pruned for their speed alone, their products, and the proof that a product is right."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nmbench.errors import NotStrict, NumericalFailure
from nmbench.pattern import Pattern
from nmbench.runtime.sparse24.forms import FP8, FP8_CUSPARSELT, FP8_CUTLASS

HARDWARE_PATTERN = Pattern(2, 4)
MOST_ERROR = 0.05  # relative, of a sparse product; rounding to bfloat16 stays far below, a wrong product far above
HALF_ROUNDING, FP8_ROUNDING = 2**-8, 2**-4  # most that bfloat16 and e4m3 change a number, relative


def prune(weight: Tensor, pattern: Pattern, name: str) -> Tensor:
    """A contiguous copy of a weight `[out, in]` that keeps the largest magnitudes of every group.

    Raises `NotStrict` if the copy is not 2:4, which the hardware multiplies.
    """
    pruned = weight.masked_fill(~pattern.top(weight.abs()), 0.0).contiguous()
    check_fits(pruned, name)
    return pruned


def check_fits(weight: Tensor, name: str) -> None:
    """Raise `NotStrict` naming the first 4 weights of which more than 2 are non-zero: a conversion would drop some."""
    kept = HARDWARE_PATTERN.kept(weight != 0)
    broken = (kept > HARDWARE_PATTERN.keep).nonzero()
    if len(broken):
        row, group = broken[0].tolist()
        raise NotStrict(
            f"{name} is not 2:4: {len(broken)} of {kept.numel()} groups; first: row {row}, columns {4 * group}.."
            f"{4 * group + 3} keep {int(kept[row, group])} instead of at most 2; it was not converted."
        )


def most_error(form: str) -> float:
    """Return the largest relative difference from the dense product that the rounding of `form` allows.

    In half precision 4 roundings, 0.016: both products round their outputs, and each may round the parts of a sum that
    is split. FP8 rounds inputs and weights too, 2 more roundings of 2^-4, 0.14 in all; random numbers give 0.038. Terms
    that cancel each other in most outputs would give more than that. A product with exchanged rows gives 1.4.
    """
    rounded = 2 * FP8_ROUNDING if form in (FP8, FP8_CUTLASS, FP8_CUSPARSELT) else 0.0
    return rounded + 4 * HALF_ROUNDING


def checked(sparse: Tensor, dense: Tensor, name: str) -> float:
    """The relative difference of two products. Raises `NumericalFailure` above `MOST_ERROR`."""
    error = difference(sparse, dense)
    if not error <= MOST_ERROR:
        raise NumericalFailure(f"the sparse product of {name} differs from the dense one by {error:.3g}, relative.")
    return error


def difference(found: Tensor, reference: Tensor) -> float:
    """How far one tensor is from another, relative (Frobenius norm); 0 for equal ones, NaN where one holds NaN."""
    apart = (found.float() - reference.float()).norm()
    return float(apart / reference.float().norm()) if apart else 0.0


def product_call(inputs: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """A call that multiplies inputs `[tokens, in]` by a weight `[out, in]`, dense or sparse: `[tokens, out]`."""

    @torch.inference_mode()
    def call() -> Tensor:
        return F.linear(inputs, weight)

    return call


def random_inputs(tokens: int, weight: Tensor) -> Tensor:
    """Standard normal inputs `[tokens, in]` in the dtype and on the device of `weight`."""
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (tokens, weight.shape[1])
    return torch.randn(shape, generator=generator, device=weight.device, dtype=torch.float32).to(weight.dtype)
