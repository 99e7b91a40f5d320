"""The dispatch of one job by the kind of its method: a one-shot method, a mask learner, or a source of masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.experiment.jobs import Job
from nmbench.experiment.setup import Experiment
from nmbench.methods import Baseline, DenseModel, MaskLearner, MaskSource, Pruned, PrunedModel
from nmbench.models.applying import moved
from nmbench.models.stored_names import StoredNames
from nmbench.pruning.learning import LearnTask
from nmbench.pruning.one_shot import Made, prune_one_shot
from nmbench.results.directory import RunDirectory
from nmbench.results.files import FileCheckpoints, load_masks
from nmbench.results.format import Record
from nmbench.results.records import identity
from nmbench.runtime.cost import Cost
from nmbench.verification.strict import check_masks, masks_digest


def made(job: Job, experiment: Experiment, directory: RunDirectory) -> Made:
    """Return the masks, weights and cost of `job`.

    Raises `NMBenchError` for masks that are not strict. Exceptions of the method pass through.
    """
    method = job.contender.method
    if isinstance(method, Baseline):
        return one_shot(job, method, experiment)
    if isinstance(method, MaskSource):
        pruned = imported(job, method, experiment)
        return Made(pruned, *cost_of_row(pruned.origin))
    assert isinstance(method, MaskLearner)
    return learnt(job, method, experiment, directory)


def one_shot(job: Job, method: Baseline, experiment: Experiment) -> Made:
    """Return the result of a one-shot method, calibrated on the first `--windows` windows of the pool."""
    windows = experiment.pools[job.seed].calibration[: experiment.spec.windows]
    init = job.contender.init.method if job.contender.init else None
    assert init is None or isinstance(init, Baseline)
    return prune_one_shot(
        experiment.bundle,
        experiment.dense,
        method,
        experiment.patterns(job.pattern),
        windows,
        job.label,
        experiment.reporter(job.title, "prune"),
        init,
    )


def imported(job: Job, method: MaskSource, experiment: Experiment) -> PrunedModel:
    """Return the masks of a mask source, proven strict and moved to the device of the model."""
    bundle, patterns = experiment.bundle, experiment.patterns(job.pattern)
    weights = {name: experiment.dense.layer(layer) for name, layer in bundle.layers.items()}
    pruned = method.bring(DenseModel(weights, patterns, bundle.skipped, StoredNames.of(bundle.model).parameter))
    check_masks(pruned.masks, patterns, bundle.shapes, job.label)
    layers = {name: moved(layer, bundle.device) for name, layer in pruned.layers.items()}
    return dataclasses.replace(pruned, layers=layers)


def cost_of_row(record: Mapping[str, Any] | None) -> tuple[Cost | None, float]:
    """Tokens (None: unknown) and seconds that it took to make the masks of a row, its own start included."""
    if record is None or record["cost"]["forward_tokens"] is None:
        return None, 0.0
    return Cost(**record["cost"]), record["seconds"]["prune"] or 0.0


def learnt(job: Job, method: MaskLearner, experiment: Experiment, directory: RunDirectory) -> Made:
    """Return the masks of a learner, on the dense weights; the model is proven unchanged after the learning.

    The whole cost of the start is added.
    """
    start = start_row(job, directory)
    task = task_of(job, method, experiment, directory, start)
    masks = method.learn(task)
    experiment.check_intact(job.label)
    check_masks(masks, task.pattern, task.layers, job.label)
    cost, (start_cost, start_seconds) = task.settle(), cost_of_row(start)
    if start_cost is not None:
        cost.include(start_cost)
    seconds = task.checkpoints.earlier_seconds + start_seconds
    pruned = {name: Pruned(mask.to(experiment.bundle.device)) for name, mask in masks.items()}
    return Made(
        PrunedModel(pruned, task.notes, experts=task.experts, curve=task.curve), cost if start_cost else None, seconds
    )


def task_of(job: Job, method: MaskLearner, experiment: Experiment, directory: RunDirectory, start: Record) -> LearnTask:
    """Return the task of a learner. Pool and selection are copies, so that writing into them changes no other job."""
    pool = experiment.pools[job.seed]
    return LearnTask(
        experiment.bundle,
        experiment.dense,
        experiment.patterns(job.pattern),
        start_masks(start, job, directory),
        pool.calibration.clone(),
        pool.selection.clone(),
        job.seed,
        FileCheckpoints(directory.file("checkpoints", job.name, ".safetensors"), job.digest),
        job.label,
        experiment.learner_reporter(job.title, method),
    )


def start_row(job: Job, directory: RunDirectory) -> Record:
    """Return the record of the start of a learner. Raises `NMBenchError` if that row failed."""
    wanted = (job.start, str(job.pattern), job.seed)
    rows = [record for record in directory.records() if identity(record) == wanted]
    if not rows or rows[0]["status"] != "ok":
        raise NMBenchError(f"{job.label} has no initial mask, because {job.start} failed.")
    return rows[0]


def start_masks(start: Record, job: Job, directory: RunDirectory) -> dict[str, Tensor]:
    """Return the masks of the row `start`. Raises `NMBenchError` unless the mask file has the digest of the proof."""
    path = directory.file("masks", job.files_of(start["label"]), ".safetensors")
    masks = load_masks(path)
    if start["proof"] is None or masks_digest(masks) != start["proof"]["masks_digest"]:
        raise NMBenchError(f"{path} does not hold the masks of its record; remove it and give the same command again.")
    return masks
