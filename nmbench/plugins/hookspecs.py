"""The hooks of nmbench: announcing hooks register the classes of a plugin, observing hooks follow a run.

Announcing hooks are called once per plugin, when the plugin is loaded and before any model exists; their argument is a
function `register(name, obj)`. Observing hooks are called during a run. Their return values are ignored; an exception
of such a hook is reported once and never stops the run. The work itself is a plain method call and no hook, so that no
plugin can change the result of another plugin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from nmbench.experiment.forecast import Forecast
    from nmbench.experiment.memory import Estimate
    from nmbench.plugins.events import Progress
    from nmbench.plugins.registry import Register
    from nmbench.spec import RunSpec

PROJECT = "nmbench"
HOOKS_VERSION = "1.3"  # docs/plugins/compatibility.md defines when the number changes
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(historic=True)
def nmbench_register_baselines(register: Register) -> None:
    """When the plugin loads: `register("magnitude", Magnitude)` for every `Scorer`, `Solver`, `Refiner` or `MaskSource`
    class.
    """


@hookspec(historic=True)
def nmbench_register_mask_learners(register: Register) -> None:
    """When the plugin loads: `register("maskpro", MaskPro)` for every `MaskLearner` class of the plugin."""


@hookspec(historic=True)
def nmbench_register_repairs(register: Register) -> None:
    """When the plugin loads: `register("reconstruct", Reconstruct)` for every `LayerRepair`, `BlockRepair` or
    `WeightLearner` class of the plugin.
    """


@hookspec(historic=True)
def nmbench_register_models(register: Register) -> None:
    """When the plugin loads: `register("hf", HubModel)` for every `ModelSource` class; the name is the scheme before
    the colon in `--model hf:ORG/NAME`.
    """


@hookspec(historic=True)
def nmbench_register_datasets(register: Register) -> None:
    """When the plugin loads: `register("wikitext2", WikiText2)` for every `Dataset` class of the plugin."""


@hookspec(historic=True)
def nmbench_register_metrics(register: Register) -> None:
    """When the plugin loads: `register("ppl", Perplexity)` for every `Metric` class; the name is the word before the
    first colon in `--metric ppl:wikitext2@2048`.
    """


@hookspec(historic=True)
def nmbench_register_reporters(register: Register) -> None:
    """When the plugin loads: `register("csv", CsvReporter)` for every `Reporter` class of the plugin."""


@hookspec
def nmbench_run_started(
    spec: RunSpec, memory: Estimate, doubts: Sequence[str], directory: Path, rows: Sequence[Forecast]
) -> None:
    """Once, when a run begins, after the model is loaded and before the first job. `spec` is fully resolved;
    `memory` is the estimate of the device memory that its methods need; `doubts` are the reasons to distrust its
    inputs, a sentence each; `directory` is the run directory; `rows` are the dense row and all jobs in their order,
    each with `label`, `title` (the `job` of its progress), `done`, and the `seconds` that it took or will take, as far
    as they are known.
    """


@hookspec
def nmbench_progress(event: Progress) -> None:
    """Often, while a job works: at every block of a walk, every report of a mask learner, every evaluated batch."""


@hookspec
def nmbench_method_finished(record: Mapping[str, Any]) -> None:
    """After a job's record (one row of `records.jsonl`) is safely on disk, also when the job failed."""


@hookspec
def nmbench_run_finished(records: Sequence[Mapping[str, Any]]) -> None:
    """Once, when every job of the run has a record; `records` holds them in the order of the table."""
