"""The built-in methods keep the laws that every method must keep."""

from __future__ import annotations

import importlib.metadata

from nmbench.plugins.loading import load_plugins
from nmbench.testing import conformance_tests
from nmbench_plugins.alps import ALPS
from nmbench_plugins.distil import Distil
from nmbench_plugins.importing import Import
from nmbench_plugins.leastsquares import LeastSquares
from nmbench_plugins.magnitude import Magnitude
from nmbench_plugins.maskllm import MaskLLM
from nmbench_plugins.maskpro import MaskPro
from nmbench_plugins.proxsparse import ProxSparse
from nmbench_plugins.reconstruct import Reconstruct
from nmbench_plugins.ria import RIA
from nmbench_plugins.soft import Soft
from nmbench_plugins.sparsegpt import SparseGPT, SparseGPTRepair
from nmbench_plugins.swaps import Flips, Swaps, SwapsJudged
from nmbench_plugins.wanda import Wanda

# Few steps, and as large ones as the planted model allows: every law calls a learner up to ten times.
QUICK = {"minibatch": 8, "learning_rate": 1.0, "prior": 0.3, "tracker": 0.9, "check_every": 5, "checkpoint_every": 3}
FEW_TOKENS = {"evidence_tokens": 192, "screen_tokens": 192, "confirm_tokens": 192}
REWARDS = {"flips": 0.1, "cheap": 1.0, "shortlist": 0.2, **FEW_TOKENS}
METHODS = (
    Magnitude(),
    Wanda(),
    RIA(),
    SparseGPT(),
    ALPS(iterations=20, repair_steps=4),
    ALPS(dense_weight=0.5, iterations=20, repair_steps=4, sequential=True),
    Swaps(),
    Swaps(dense_weight=0.0, residual_weight=0.0, sequential=False),
    MaskPro(steps=12, **QUICK),
    Soft(passes=3.0, minibatch=16, learning_rate=6e-2, check_every=4, checkpoint_every=3),
    Soft(scope="block", passes=3.0, minibatch=16, learning_rate=6e-2),
    MaskLLM(passes=3.0, minibatch=16, learning_rate=2e-2, check_every=4, checkpoint_every=3),
    ProxSparse(passes=3.0, minibatch=16, learning_rate=6e-2, trials=2, check_every=4, checkpoint_every=3),
    Import(),
    SwapsJudged(rounds=2, margin=0.0, statistics_tokens=192, judge_tokens=192),
    Flips(steps=4, local_step=1.0, margin=0.0, decay=0.3, units=2, check_every=2, checkpoint_every=1, **FEW_TOKENS),
    Flips(steps=8, evidence="rewards", reward_tokens=3840, margin=0.0, check_every=4, checkpoint_every=1, **REWARDS),
    SparseGPTRepair(),
    LeastSquares(),
    LeastSquares(solver="exact", sequential=False),
    Reconstruct(steps=10),
    Distil(passes=2.0, check_every=3, checkpoint_every=2),
    Distil(passes=2.0, refresh_every=3, check_every=3, checkpoint_every=2),
)

test_built_in_methods = conformance_tests(*METHODS)


def test_every_built_in_method_is_here():
    """No built-in method is left out."""
    own = [point for point in importlib.metadata.entry_points(group="nmbench") if point.dist.name == "nmbench"]
    registered = {entry.obj for entry in load_plugins(entry_points=own).registries.methods}
    assert registered == {type(method) for method in METHODS}
