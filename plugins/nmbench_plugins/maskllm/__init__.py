"""MaskLLM: masks learnt by gradients through a relaxed choice among all patterns of a group (arXiv 2409.17481).

Read in this order:

1. `learner`: the method and its options.
2. `candidates`: the C(M, N) patterns of a group, and which N:M have too many.
3. `prior`: from a probability to the gates of the start; `schedule`: temperature, scale, reward and step size.
4. `relaxation`: the soft mask of a group, and its gradient, written out.
5. `gates`: gates and moments of all layers; `steps`: one update; `training`: one run.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.maskllm.learner import MaskLLM as MaskLLM


@nmbench.hookimpl
def nmbench_register_mask_learners(register: nmbench.Register) -> None:
    register("maskllm", MaskLLM)
