"""The dispatch of one job by the kind of its method: a one-shot method, a mask learner, or a source of masks."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.experiment.jobs import Job
from nmbench.experiment.setup import Experiment
from nmbench.methods import Baseline, DenseModel, MaskLearner, MaskSource, Pruned, PrunedModel
from nmbench.models.applying import moved
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
        return Made(imported(job, method, experiment), Cost())
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
    pruned = method.bring(DenseModel(weights, patterns, bundle.skipped))
    check_masks(pruned.masks, patterns, bundle.shapes, job.label)
    return PrunedModel({name: moved(layer, bundle.device) for name, layer in pruned.layers.items()}, pruned.notes)


def learnt(job: Job, method: MaskLearner, experiment: Experiment, directory: RunDirectory) -> Made:
    """Return the masks of a learner, on the dense weights; the model is proven unchanged after the learning.

    If the start of the learner is the row of another learner, the cost and seconds of that row are added.
    """
    start = start_row(job, directory)
    task = task_of(job, method, experiment, directory, start)
    masks = method.learn(task)
    experiment.check_intact(job.label)
    check_masks(masks, task.pattern, task.layers, job.label)
    cost, seconds = task.settle(), task.checkpoints.earlier_seconds
    assert job.contender.init
    if isinstance(job.contender.init.method, MaskLearner):
        cost.include(Cost(**cast("dict[str, int]", start["cost"])))
        seconds += start["seconds"]["prune"] or 0.0
    pruned = {name: Pruned(mask.to(experiment.bundle.device)) for name, mask in masks.items()}
    return Made(PrunedModel(pruned, task.notes, experts=task.experts), cost, seconds)


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
