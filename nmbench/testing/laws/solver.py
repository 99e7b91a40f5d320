"""Laws of solvers, which may repair the weights that they keep."""

from __future__ import annotations

from nmbench.methods import Solver
from nmbench.testing.laws.base import HOLDS, PATTERNS, SKIPPED, Broken, Judgement, law, layers
from nmbench.testing.laws.layerwise import masked, output_error, pruned
from nmbench.testing.observation import Observation
from nmbench.testing.values import KINDS

finite_cases = layers(pattern=PATTERNS, kind=tuple(kind for kind in KINDS if kind != "huge"))


@law(Solver, cases=finite_cases)
def weights_are_zero_off_the_mask(observed: Observation) -> Judgement:
    """Repaired weights are zero, without a sign, wherever the mask is False."""
    result, weight = pruned(observed), observed.repaired
    if result is None:
        return SKIPPED
    if weight is None:
        return HOLDS if result.weight is None else SKIPPED
    off = weight.masked_select(~result.mask.bool())
    if off.count_nonzero():
        return Broken(f"{int(off.count_nonzero())} non-zero weights off the mask", "0 wherever the mask is False")
    if off.signbit().any():
        return Broken(f"{int(off.signbit().sum())} negative zeros", "+0.0, as `masked_fill(~mask, 0.0)` leaves it")
    return HOLDS


@law(Solver, cases=finite_cases)
def weights_are_finite(observed: Observation) -> Judgement:
    """Repaired weights are finite, also with dead inputs, ties and outliers."""
    if pruned(observed) is None or (observed.output.weight is not None and observed.repaired is None):
        return SKIPPED
    if observed.repaired is not None and not observed.repaired.isfinite().all():
        return Broken("NaN or infinite weights", "finite weights, or nmbench.NumericalFailure")
    return HOLDS


@law(Solver, cases=layers(pattern=("2:4", "1:4", "4:8"), inputs=("correlated", "plain"), rows=(32,), groups=(8,)))
def repair_does_not_hurt(observed: Observation) -> Judgement:
    """On the calibration inputs, repaired weights lose no more of the output than the same mask without repair."""
    result, weight = pruned(observed), observed.repaired
    if result is None or (weight is None and result.weight is not None):
        return SKIPPED
    if weight is None:
        return HOLDS
    kept_only = weight.masked_fill(~result.mask.bool(), 0.0)
    if not kept_only.isfinite().all():
        return SKIPPED
    with_repair, without = output_error(observed, kept_only), output_error(observed, masked(observed, result.mask))
    if with_repair > without * 1.001:
        return Broken(
            f"an output error of {with_repair:.6g}", f"at most {without:.6g}, that of the mask on the dense weights"
        )
    return HOLDS
