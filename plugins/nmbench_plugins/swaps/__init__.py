"""Swaps: refinement of a mask inside its groups, on frozen weights, from statistics of the layer's inputs.

`refiner` states what is minimised and the options, `problem` holds it for one layer in numbers, `descent` sweeps the
groups and `choosers` choose the pattern of one. An `aim` is what a layer is to come close to.

`judged` is a learner that lets the model's loss choose among such refinements: `course` is one run of it, `judge`
measures a proposal.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.swaps.judged import SwapsJudged as SwapsJudged
from nmbench_plugins.swaps.refiner import Swaps as Swaps


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("swaps", Swaps)


@nmbench.hookimpl
def nmbench_register_mask_learners(register: nmbench.Register) -> None:
    register("swaps-judged", SwapsJudged)
