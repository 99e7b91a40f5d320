"""MaskPro: strict N:M masks learnt from forward losses alone (arXiv 2506.12876).

`learner` states the algorithm and its options, `training` is one run of it, `watch` the guard that keeps a learnt mask
from being worse than the one it started from. How a step is computed is up to an `engine`: plain torch, or `streamed`
through fused kernels. `policy` holds the distribution of one group and its gradient.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.maskpro.learner import MaskPro as MaskPro


@nmbench.hookimpl
def nmbench_register_mask_learners(register: nmbench.Register) -> None:
    register("maskpro", MaskPro)
