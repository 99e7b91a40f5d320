"""Kernels are launched by modules that need no Triton, so that the plugins work where there is none."""

from __future__ import annotations

import importlib.util

from reference.processes import WITHOUT_TRITON

PROGRAM = """
import nmbench, torch
from nmbench.runtime import triton_available
from nmbench_plugins.maskpro.kernels import launch as maskpro, reference
from nmbench_plugins.soft.kernels import launch as soft
from nmbench_plugins.sparsegpt import launch as sparsegpt

pattern, cpu = nmbench.Pattern(2, 4), torch.device("cpu")
print(triton_available("cpu"), triton_available("cuda"))
print(maskpro.usable(2, 4, "cpu"), soft.usable(pattern, cpu), sparsegpt.usable(pattern, 128, cpu))
"""


def test_launchers_need_no_triton(python, capsys):
    """Where Triton is missing, the launchers are importable and say that they are not available."""
    if importlib.util.find_spec("triton") is None:
        exec(PROGRAM, {})
        assert capsys.readouterr().out.split() == ["False"] * 5
    else:
        done = python.run("-c", WITHOUT_TRITON + PROGRAM)
        assert done.stdout.split() == ["False"] * 5, done.stderr
