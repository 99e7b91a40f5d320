"""Soft: masks learnt by gradients through a relaxed draw of N of M weights (RoI, arXiv 2608.23048).

Read in this order:

1. `learner`: the method and its options.
2. `prior`: from a probability to the logits of the start; `schedule`: temperature, noise scale and step size.
3. `relaxation`: the soft mask of a group, and its gradient, written out.
4. `nmbench.pruning.gumbel`: noise by counters, so that none is stored.
5. `logits`: logits and moments by layer; `relaxed`: one step's arithmetic on layers.
6. `steps`, `training`: one update and one run of the whole model; `block_training`: of one block after the other.
7. `kernels`: an update of one layer as two Triton programs, used on a GPU for groups of at most 8.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.soft.learner import Soft as Soft


@nmbench.hookimpl
def nmbench_register_mask_learners(register: nmbench.Register) -> None:
    register("soft", Soft)
