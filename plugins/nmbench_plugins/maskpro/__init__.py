"""MaskPro: strict N:M masks learnt from forward losses alone (arXiv 2506.12876).

Read in this order:

1. `learner`: the algorithm and its options.
2. `training`: one run of the algorithm: steps, measurements on held-out windows, checkpoints.
3. `policy`: the distribution of the mask of one group, and the gradient of its log probability.
4. `tracker`: from the losses of a step to the size of its update.
5. `watch`: the guard that keeps a learnt mask from being worse than the initial mask.
6. `engines`: the computation of a step, in plain torch or through fused kernels; `masks`: masks stored as bits.
7. `kernels`: the step of one layer as Triton programs.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.maskpro.learner import MaskPro as MaskPro


@nmbench.hookimpl
def nmbench_register_mask_learners(register: nmbench.Register) -> None:
    register("maskpro", MaskPro)
