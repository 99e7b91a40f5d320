"""nmbench compares strict N:M pruning methods on language models, fairly and reproducibly.

The names below are imported when first used, so that `import nmbench` is quick and needs no torch. To run a comparison:
`from nmbench.run import run`. A package's `__init__` lists its public names in `__all__`; every module inside is
private, and so is every name that begins with an underscore (docs/plugins/compatibility.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nmbench.artifacts import Kept as Kept
    from nmbench.artifacts import files_digest as files_digest
    from nmbench.artifacts import open_masks as open_masks
    from nmbench.artifacts import row_record as row_record
    from nmbench.errors import NMBenchError as NMBenchError
    from nmbench.errors import NotStrict as NotStrict
    from nmbench.errors import NumericalFailure as NumericalFailure
    from nmbench.evaluation import DenseSubject as DenseSubject
    from nmbench.evaluation import Subject as Subject
    from nmbench.methods import SCOPES as SCOPES
    from nmbench.methods import BlockRepair as BlockRepair
    from nmbench.methods import DenseModel as DenseModel
    from nmbench.methods import LayerRepair as LayerRepair
    from nmbench.methods import LayerStats as LayerStats
    from nmbench.methods import MaskLearner as MaskLearner
    from nmbench.methods import MaskSource as MaskSource
    from nmbench.methods import Pruned as Pruned
    from nmbench.methods import PrunedModel as PrunedModel
    from nmbench.methods import Refiner as Refiner
    from nmbench.methods import Scorer as Scorer
    from nmbench.methods import Solver as Solver
    from nmbench.methods import Stat as Stat
    from nmbench.methods import WeightLearner as WeightLearner
    from nmbench.models import Anatomy as Anatomy
    from nmbench.models import Bundle as Bundle
    from nmbench.models import StoredNames as StoredNames
    from nmbench.models import Weight as Weight
    from nmbench.models import anatomy_of as anatomy_of
    from nmbench.models import auto_class as auto_class
    from nmbench.options import check_least as check_least
    from nmbench.options import option as option
    from nmbench.pattern import Pattern as Pattern
    from nmbench.plugins import Progress as Progress
    from nmbench.plugins import Register as Register
    from nmbench.plugins import hookimpl as hookimpl
    from nmbench.plugins import load_plugins as load_plugins
    from nmbench.pruning import Batch as Batch
    from nmbench.pruning import BlockTask as BlockTask
    from nmbench.pruning import LearnTask as LearnTask
    from nmbench.pruning import Part as Part
    from nmbench.pruning import Selection as Selection
    from nmbench.pruning import WeightTask as WeightTask
    from nmbench.results import Results as Results
    from nmbench.results import load_masks as load_masks
    from nmbench.results import load_results as load_results
    from nmbench.results import render as render
    from nmbench.sources import Dataset as Dataset
    from nmbench.sources import Metric as Metric
    from nmbench.sources import ModelSource as ModelSource
    from nmbench.sources import Reporter as Reporter
    from nmbench.sources import Sampling as Sampling
    from nmbench.sources import Value as Value
    from nmbench.sources import WindowMetric as WindowMetric
    from nmbench.spec import Defaults as Defaults
    from nmbench.spec import MethodSpec as MethodSpec
    from nmbench.spec import RunSpec as RunSpec

HOMES = {
    "artifacts": (
        "Kept",
        "files_digest",
        "open_masks",
        "row_record",
    ),
    "errors": (
        "NMBenchError",
        "NotStrict",
        "NumericalFailure",
    ),
    "evaluation": (
        "DenseSubject",
        "Subject",
    ),
    "methods": (
        "SCOPES",
        "BlockRepair",
        "DenseModel",
        "LayerRepair",
        "LayerStats",
        "MaskLearner",
        "MaskSource",
        "Pruned",
        "PrunedModel",
        "Refiner",
        "Scorer",
        "Solver",
        "Stat",
        "WeightLearner",
    ),
    "models": (
        "Anatomy",
        "Bundle",
        "StoredNames",
        "Weight",
        "anatomy_of",
        "auto_class",
    ),
    "options": ("check_least", "option"),
    "pattern": ("Pattern",),
    "plugins": (
        "Progress",
        "Register",
        "hookimpl",
        "load_plugins",
    ),
    "pruning": (
        "Batch",
        "BlockTask",
        "LearnTask",
        "Part",
        "Selection",
        "WeightTask",
    ),
    "results": (
        "Results",
        "load_masks",
        "load_results",
        "render",
    ),
    "sources": (
        "Dataset",
        "Metric",
        "ModelSource",
        "Reporter",
        "Sampling",
        "Value",
        "WindowMetric",
    ),
    "spec": (
        "Defaults",
        "MethodSpec",
        "RunSpec",
    ),
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
