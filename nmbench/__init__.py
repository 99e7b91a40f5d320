"""nmbench compares strict N:M pruning methods on language models, fairly and reproducibly.

The names below are imported when first used, so that `import nmbench` is quick and needs no torch. To run a comparison:
`from nmbench.run import run`. Public is what a module lists in its `__all__`, here and below; a module without one is
private, and so is every name that begins with an underscore (docs/compatibility.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nmbench.anatomy import Anatomy as Anatomy
    from nmbench.anatomy import Weight as Weight
    from nmbench.anatomy import anatomy_of as anatomy_of
    from nmbench.artifacts.kept import Kept as Kept
    from nmbench.artifacts.kept import files_digest as files_digest
    from nmbench.artifacts.kept import open_masks as open_masks
    from nmbench.errors import NMBenchError as NMBenchError
    from nmbench.errors import NotStrict as NotStrict
    from nmbench.errors import NumericalFailure as NumericalFailure
    from nmbench.evaluate import DenseSubject as DenseSubject
    from nmbench.evaluate import Subject as Subject
    from nmbench.events import Progress as Progress
    from nmbench.hookspecs import hookimpl as hookimpl
    from nmbench.learn import Batch as Batch
    from nmbench.learn import LearnTask as LearnTask
    from nmbench.methods import DenseModel as DenseModel
    from nmbench.methods import LayerStats as LayerStats
    from nmbench.methods import MaskLearner as MaskLearner
    from nmbench.methods import MaskSource as MaskSource
    from nmbench.methods import Pruned as Pruned
    from nmbench.methods import PrunedModel as PrunedModel
    from nmbench.methods import Refiner as Refiner
    from nmbench.methods import Scorer as Scorer
    from nmbench.methods import Solver as Solver
    from nmbench.methods import Stat as Stat
    from nmbench.models import Bundle as Bundle
    from nmbench.options import option as option
    from nmbench.pattern import Pattern as Pattern
    from nmbench.plugins import load_plugins as load_plugins
    from nmbench.registry import Register as Register
    from nmbench.results import Results as Results
    from nmbench.results import load_results as load_results
    from nmbench.selection import Selection as Selection
    from nmbench.sources import Dataset as Dataset
    from nmbench.sources import Metric as Metric
    from nmbench.sources import ModelSource as ModelSource
    from nmbench.sources import Reporter as Reporter
    from nmbench.sources import WindowMetric as WindowMetric
    from nmbench.spec import Defaults as Defaults
    from nmbench.spec import MethodSpec as MethodSpec
    from nmbench.spec import RunSpec as RunSpec
    from nmbench.table import render as render

HOMES = {
    "anatomy": ("Anatomy", "Weight", "anatomy_of"),
    "artifacts.kept": ("Kept", "files_digest", "open_masks"),
    "errors": ("NMBenchError", "NotStrict", "NumericalFailure"),
    "evaluate": ("DenseSubject", "Subject"),
    "events": ("Progress",),
    "hookspecs": ("hookimpl",),
    "learn": ("Batch", "LearnTask"),
    "methods": (
        *("DenseModel", "LayerStats", "MaskLearner", "MaskSource", "Pruned", "PrunedModel"),
        *("Refiner", "Scorer", "Solver", "Stat"),
    ),
    "models": ("Bundle",),
    "options": ("option",),
    "pattern": ("Pattern",),
    "plugins": ("load_plugins",),
    "registry": ("Register",),
    "results": ("Results", "load_results"),
    "selection": ("Selection",),
    "sources": ("Dataset", "Metric", "ModelSource", "Reporter", "WindowMetric"),
    "spec": ("Defaults", "MethodSpec", "RunSpec"),
    "table": ("render",),
}
WHERE = {name: module for module, names in HOMES.items() for name in names}
__all__ = sorted(WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module 'nmbench' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"nmbench.{WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
