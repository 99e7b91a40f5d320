"""MaskPro: strict N:M masks learnt from forward losses alone (arXiv 2506.12876).

`policy` holds the distribution of one group and its gradient, `learner` the algorithm, `watch` the guard that keeps a
learnt mask from being worse than the one it started from.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.maskpro.learner import MaskPro as MaskPro


@nmbench.hookimpl
def nmbench_register_mask_learners(register: nmbench.Register) -> None:
    register("maskpro", MaskPro)
