"""SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Frantar and Alistarh, arXiv 2301.00774).

Read in this order:

1. `solver`: the method, its options and the order of its steps; `repair`: its repair alone, of another method's mask.
2. `layer`: one sweep of one layer, and its options; `factor`: the triangular root of the damped Hessian.
3. `sweep`: from block to block of columns.
4. `launch`, `program`, `reference`: the columns of one block. On NVIDIA GPUs `launch` runs the Triton program in
   `program`; on other devices, and for other patterns, the plain loop in `reference` does the same.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.sparsegpt.repair import SparseGPTRepair as SparseGPTRepair
from nmbench_plugins.sparsegpt.solver import SparseGPT as SparseGPT


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("sparsegpt", SparseGPT)


@nmbench.hookimpl
def nmbench_register_repairs(register: nmbench.Register) -> None:
    register("sparsegpt-repair", SparseGPTRepair)
