"""Distil: the kept weights of the whole model are trained, with the dense model as teacher.

Read in this order: `learner`, the method and its options; `training`, one run; `masters`, the weights in training and
their masks.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.distil.learner import Distil as Distil


@nmbench.hookimpl
def nmbench_register_repairs(register: nmbench.Register) -> None:
    register("distil", Distil)
