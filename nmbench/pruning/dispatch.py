"""One job, from its method to masks and weights: a one-shot method, a mask learner, or masks that exist already."""

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
    """Do the work of `job`. Raises `NMBenchError` for masks that are not strict, and what the method raises."""
    method = job.contender.method
    if isinstance(method, Baseline):
        return one_shot(job, method, experiment)
    if isinstance(method, MaskSource):
        return Made(brought(job, method, experiment), Cost())
    assert isinstance(method, MaskLearner)
    return learnt(job, method, experiment, directory)


def one_shot(job: Job, method: Baseline, experiment: Experiment) -> Made:
    """The result of a one-shot method from the first `--windows` windows of the pool."""
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


def brought(job: Job, method: MaskSource, experiment: Experiment) -> PrunedModel:
    """Masks that were made elsewhere, checked and on the model's device."""
    bundle, patterns = experiment.bundle, experiment.patterns(job.pattern)
    weights = {name: experiment.dense.layer(layer) for name, layer in bundle.layers.items()}
    pruned = method.bring(DenseModel(weights, patterns, bundle.skipped))
    check_masks(pruned.masks, patterns, bundle.shapes, job.label)
    return PrunedModel({name: moved(layer, bundle.device) for name, layer in pruned.layers.items()}, pruned.notes)


def learnt(job: Job, method: MaskLearner, experiment: Experiment, directory: RunDirectory) -> Made:
    """The masks of a learner, on the dense weights.

    The cost of another learner whose masks are its start is added. The model is proven unchanged afterwards.
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
    """The task of a learner; its tokens are copies, so that a learner that writes into them reaches no other job."""
    pool = experiment.pools[job.seed]
    return LearnTask(
        experiment.bundle,
        experiment.dense,
        experiment.patterns(job.pattern),
        initial_masks(start, job, directory),
        pool.calibration.clone(),
        pool.selection.clone(),
        job.seed,
        FileCheckpoints(directory.file("checkpoints", job.name, ".safetensors"), job.digest),
        job.label,
        experiment.learner_reporter(job.title, method),
    )


def start_row(job: Job, directory: RunDirectory) -> Record:
    """The record of the row that a learner begins with. Raises `NMBenchError` if that row failed."""
    wanted = (job.start, str(job.pattern), job.seed)
    rows = [record for record in directory.records() if identity(record) == wanted]
    if not rows or rows[0]["status"] != "ok":
        raise NMBenchError(f"{job.label} has no initial mask, because {job.start} failed.")
    return rows[0]


def initial_masks(start: Record, job: Job, directory: RunDirectory) -> dict[str, Tensor]:
    """The masks of the row `start`. Raises `NMBenchError` unless its file holds the masks that were proven there."""
    path = directory.file("masks", job.files_of(start["label"]), ".safetensors")
    masks = load_masks(path)
    if start["proof"] is None or masks_digest(masks) != start["proof"]["masks_digest"]:
        raise NMBenchError(f"{path} does not hold the masks of its record; remove it and give the same command again.")
    return masks
