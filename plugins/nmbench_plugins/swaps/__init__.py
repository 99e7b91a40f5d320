"""Swaps: refinement of a mask inside its groups, on frozen weights, from statistics of the layer's inputs.

`refiner` states what is minimised and the options, `problem` holds it for one layer in numbers, `descent` sweeps the
groups and `choosers` choose the pattern of one.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.swaps.refiner import Swaps as Swaps


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("swaps", Swaps)
