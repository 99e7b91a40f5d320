"""Rows of finished runs, opened again with their model, tokens and masks; used by the scripts beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nmbench import LearnTask, MethodSpec, Pattern
from nmbench.artifacts.reading import row_masks
from nmbench.errors import NMBenchError
from nmbench.experiment.plan import checked
from nmbench.experiment.setup import Experiment, prepared
from nmbench.plugins.loading import load_plugins
from nmbench.results.address import address_of, parts_of
from nmbench.results.directory import RunDirectory
from nmbench.results.files import MemoryCheckpoints, load_masks

WHO = "again"


def experiment_of(directory: Path, device: str, dtype: str | None = None) -> Experiment:
    """Return model and tokens of a run directory, with the pool of a learner for each of its seeds."""
    spec = RunDirectory(directory).spec()
    if spec is None:
        raise NMBenchError(f"{directory} is not a run directory: it has no spec.toml.")
    learner = MethodSpec(WHO, "maskpro", {})  # a learner's pool is larger than that of statistics
    changed = {"device": device, "methods": (*spec.methods, learner), **({"dtype": dtype} if dtype else {})}
    return prepared(checked(dataclasses.replace(spec, **changed), load_plugins(spec.plugins)))


def opened(address: str, device: str, dtype: str | None = None) -> tuple[Experiment, LearnTask]:
    """Return the experiment of a run directory, and the task of a learner that begins with one of its rows.

    `address`: `RUN_DIRECTORY:LABEL:N:M:SEED`. Raises `NMBenchError` if it names no row with masks.
    """
    found, path = address_of(address), row_masks(address)
    if found is None or path is None:
        raise NMBenchError(f"{address} names no row with masks; give RUN_DIRECTORY:LABEL:N:M:SEED.")
    row = parts_of(path.stem) or {}
    experiment = experiment_of(found.directory, device, dtype)
    return experiment, task_of(experiment, path, Pattern.parse(row["pattern"]), row["seed"])


def task_of(experiment: Experiment, masks: Path, pattern: Pattern, seed: int) -> LearnTask:
    """Return the task of a learner that begins with the masks of a file."""
    pool, patterns = experiment.pools[seed], experiment.patterns(pattern)
    about = (experiment.bundle, experiment.dense, patterns, load_masks(masks), pool.calibration, pool.selection)
    return LearnTask(*about, seed, MemoryCheckpoints(), WHO)
