"""SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Frantar and Alistarh, arXiv 2301.00774).

`solver` states the method and its options, `factor` splits the Hessian, `sweep` prunes column by column. On NVIDIA GPUs
the columns of a block are swept by one Triton program (`kernel` launches it, `program` is it); everywhere else, and for
patterns that it does not know, by a plain loop.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.sparsegpt.solver import SparseGPT as SparseGPT


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("sparsegpt", SparseGPT)
