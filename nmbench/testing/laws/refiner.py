"""Laws of refiners, which improve the mask of another method on the dense weights."""

from __future__ import annotations

from nmbench.methods import Refiner
from nmbench.testing.laws.base import HOLDS, SKIPPED, Broken, Judgement, law, layers
from nmbench.testing.laws.layerwise import masked, output_error, pruned
from nmbench.testing.observation import Observation

unshifted = layers(
    pattern=("2:4", "1:4", "4:8"), inputs=("correlated", "plain"), rows=(16,), groups=(6,), shifted=(False,)
)


@law(Refiner, cases=unshifted)
def masks_do_not_get_worse(observed: Observation) -> Judgement:
    """Where the inputs are those of the dense model, the refined mask loses no more of the output than the first."""
    result = pruned(observed)
    if result is None:
        return SKIPPED
    before, after = (output_error(observed, masked(observed, mask)) for mask in (observed.case.mask(), result.mask))
    if after > before * 1.0001:
        return Broken(f"an output error of {after:.6g}", f"at most {before:.6g}, that of the mask to be refined")
    return HOLDS


@law(Refiner, cases=unshifted)
def weights_stay_dense(observed: Observation) -> Judgement:
    """A refiner returns a mask alone, because its result is measured on the dense weights."""
    result = pruned(observed)
    if result is None:
        return SKIPPED
    return HOLDS if result.weight is None else Broken("weights besides the mask", "Pruned(mask), the weight left out")
