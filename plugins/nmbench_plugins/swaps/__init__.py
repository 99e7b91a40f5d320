"""Swaps: refinement of a mask inside its groups, on frozen weights, from statistics of the layer's inputs.

Read in this order:

1. `refiner`: the method `swaps`, its objective and its options.
2. `aim`: the target of a layer's outputs, and `problem`: the objective of one layer in numbers.
3. `descent`: sweeps over the groups of a layer, and `choosers`: the choice of the pattern of one group.
4. `learner`: the learner `swaps-judged`, in which the model's loss chooses among such refinements.
5. `judged_run`: one run of that learner, and `judge`: the losses of a proposal.
6. `flips`: the learner `flips`, whose small steps follow the errors of activations, and `flips_run`: one run of it.
7. `evidence`: errors times inputs, and `mixtures`: the losses of sequences that each have flips of their own.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.swaps.flips import Flips as Flips
from nmbench_plugins.swaps.learner import SwapsJudged as SwapsJudged
from nmbench_plugins.swaps.refiner import Swaps as Swaps


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("swaps", Swaps)


@nmbench.hookimpl
def nmbench_register_mask_learners(register: nmbench.Register) -> None:
    register("swaps-judged", SwapsJudged)
    register("flips", Flips)
