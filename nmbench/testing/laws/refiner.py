"""Laws of refiners, which improve a given mask on the dense weights."""

from __future__ import annotations

from nmbench.methods import Refiner
from nmbench.testing.laws.base import KEPT, PASSED_OVER, Broken, Judgement, law, layers
from nmbench.testing.laws.layerwise import masked, output_error, pruned
from nmbench.testing.watch import Seen

unshifted = layers(
    pattern=("2:4", "1:4", "4:8"), inputs=("correlated", "plain"), rows=(16,), groups=(6,), shifted=(False,)
)


@law(Refiner, cases=unshifted)
def masks_do_not_get_worse(seen: Seen) -> Judgement:
    """Where the inputs are those of the dense model, the refined mask loses no more of the output than the first."""
    result = pruned(seen)
    if result is None:
        return PASSED_OVER
    before, after = output_error(seen, masked(seen, seen.case.mask())), output_error(seen, masked(seen, result.mask))
    if after > before * 1.0001:
        return Broken(f"an output error of {after:.6g}", f"at most {before:.6g}, that of the mask to be refined")
    return KEPT


@law(Refiner, cases=unshifted)
def weights_stay_dense(seen: Seen) -> Judgement:
    """A refiner returns a mask alone, because its result is measured on the dense weights."""
    result = pruned(seen)
    if result is None:
        return PASSED_OVER
    return KEPT if result.weight is None else Broken("weights besides the mask", "Pruned(mask), the weight left out")
