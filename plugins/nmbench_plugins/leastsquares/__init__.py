"""Least squares: the optimal kept weights of a layer under a given mask, from sums over the layer's inputs.

Read `repair`, the method, its target and its options; `solver` holds the solution of one layer.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.leastsquares.repair import LeastSquares as LeastSquares


@nmbench.hookimpl
def nmbench_register_repairs(register: nmbench.Register) -> None:
    register("least-squares", LeastSquares)
