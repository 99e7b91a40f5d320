"""Reconstruct: the kept weights of one block after the other are trained to give the dense block's outputs.

Read `repair`, the method and its options; `training` is one run on one part of a block.
"""

from __future__ import annotations

import nmbench
from nmbench_plugins.reconstruct.repair import Reconstruct as Reconstruct


@nmbench.hookimpl
def nmbench_register_repairs(register: nmbench.Register) -> None:
    register("reconstruct", Reconstruct)
