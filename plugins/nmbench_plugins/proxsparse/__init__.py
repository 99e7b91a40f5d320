"""ProxSparse: masks from training under a penalty that vanishes on N:M (arXiv 2502.00258).

Read in this order:

1. `learner`: the method and its options.
2. `operator`: the proximal operator of one group, for any N:M.
3. `search`: lam, in units that fit every model, and the trials.
4. `masters`: weights in training and moments of all layers; `training`: one run.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.proxsparse.learner import ProxSparse as ProxSparse


@nmbench.hookimpl
def nmbench_register_mask_learners(register: nmbench.Register) -> None:
    register("proxsparse", ProxSparse)
