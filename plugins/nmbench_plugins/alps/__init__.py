"""ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models (Meng et al., arXiv
2406.07831).

Read in this order:

1. `solver`: the method, its options and the order of its steps.
2. `problem`: the layer as a least-squares problem of unit diagonal.
3. `inverse`: the inverse of that matrix by products.
4. `admm`: the search for the mask, and `penalty`: its only parameter from step to step.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.alps.solver import ALPS as ALPS


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("alps", ALPS)
