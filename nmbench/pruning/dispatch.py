"""The dispatch of one job by the kind of its method: one-shot method, mask learner, source of masks, or repair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nmbench.experiment.jobs import Job
from nmbench.experiment.setup import Experiment
from nmbench.methods import (
    Baseline,
    BlockRepair,
    DenseModel,
    LayerRepair,
    MaskLearner,
    MaskSource,
    Pruned,
    PrunedModel,
    Repair,
    WeightLearner,
)
from nmbench.models.applying import moved
from nmbench.models.dense_weights import ByLayer
from nmbench.models.stored_names import StoredNames
from nmbench.pruning.blocks import Blocks
from nmbench.pruning.confirming import confirmed, unseen
from nmbench.pruning.learning import LearnTask
from nmbench.pruning.one_shot import Made, prune_one_shot
from nmbench.pruning.repairing import BlockStore, repaired_blocks, repaired_layers, repaired_model
from nmbench.pruning.starts import Start
from nmbench.pruning.weights_task import WeightTask
from nmbench.results.directory import RunDirectory
from nmbench.results.files import FileCheckpoints
from nmbench.results.format import Record
from nmbench.runtime.cost import Cost, Spent
from nmbench.runtime.ranks import sharing
from nmbench.verification.strict import check_masks


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
    if isinstance(method, Repair):
        return repaired(job, method, experiment, directory)
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
        ranks=sharing(),
    )


def imported(job: Job, method: MaskSource, experiment: Experiment) -> PrunedModel:
    """Return the masks of a mask source, proven strict and moved to the device of the model."""
    bundle, patterns = experiment.bundle, experiment.patterns(job.pattern)
    pruned = method.bring(
        DenseModel(ByLayer(experiment.dense), patterns, bundle.skipped, StoredNames.of(bundle.model).parameter)
    )
    check_masks(pruned.masks, patterns, bundle.shapes, job.label)
    return on_host(pruned, bundle.host)


def cost_of_row(record: Mapping[str, Any] | None) -> tuple[Cost | None, Spent]:
    """Tokens (None: unknown) and time that it took to make the masks of a row, its own start included."""
    if record is None or record["cost"]["forward_tokens"] is None:
        return None, Spent()
    seconds = record["seconds"]
    return Cost(**record["cost"]), Spent(seconds["prune"] or 0.0, seconds.get("prune_cpu"))


def learnt(job: Job, method: MaskLearner, experiment: Experiment, directory: RunDirectory) -> Made:
    """Return the masks of a learner, on the dense weights; the model is proven unchanged after the learning.

    The whole cost of the start is added.
    """
    start = Start.of(job, directory)
    task = LearnTask(*task_of(job, method, experiment, directory, start.masks()))
    masks = method.learn(task)
    experiment.check_intact(job.label)
    check_masks(masks, task.pattern, task.layers, job.label)
    pruned = {name: Pruned(mask.to(experiment.bundle.host)) for name, mask in masks.items()}
    model = PrunedModel(pruned, task.notes, experts=task.experts, curve=task.curve)
    return with_start(Made(model, task.settle(), task.checkpoints.earlier), start.record)


def repaired(job: Job, method: Repair, experiment: Experiment, directory: RunDirectory) -> Made:
    """Return a row repaired, confirmed on unseen selection windows; the model is proven unchanged afterwards.

    The whole cost of the start is added.
    """
    start = Start.of(job, directory)
    windows = unseen(experiment.pools[job.seed].selection, job.label)
    pruned = on_host(start.pruned(lambda: again(job, experiment, directory)), experiment.bundle.host)
    repair = repaired_from(pruned, job, method, experiment, directory)
    experiment.check_intact(job.label)
    assert repair.cost is not None
    chosen = confirmed(experiment, pruned, repair.pruned, windows, repair.cost, job.title)
    return with_start(dataclasses.replace(repair, pruned=chosen), start.record)


def on_host(pruned: PrunedModel, host: torch.device) -> PrunedModel:
    """Return the pruned model where results of methods are kept."""
    layers = {name: moved(layer, host) for name, layer in pruned.layers.items()}
    others = {name: tensor.to(host) for name, tensor in pruned.others.items()}
    return dataclasses.replace(pruned, layers=layers, others=others)


def again(job: Job, experiment: Experiment, directory: RunDirectory) -> PrunedModel:
    """Return the pruned model of the row that `job` begins with, made once more, because its weights were not kept."""
    same = (j for j in experiment.jobs() if (j.label, j.pattern, j.seed) == (job.start, job.pattern, job.seed))
    return made(next(same), experiment, directory).pruned


def repaired_from(
    start: PrunedModel, job: Job, method: Repair, experiment: Experiment, directory: RunDirectory
) -> Made:
    """Return the result of a repair by its range; the dense weights are live again."""
    pool, patterns, who = experiment.pools[job.seed], experiment.patterns(job.pattern), job.label
    report = experiment.reporter(job.title, "repair")
    if isinstance(method, LayerRepair):
        windows = pool.calibration[: experiment.spec.windows]
        model = experiment.bundle, experiment.dense
        return repaired_layers(*model, method, patterns, windows, who, start, report, sharing())
    if isinstance(method, BlockRepair):
        windows = pool.calibration[: method.windows_read]
        store = BlockStore(lambda index: block_checkpoints(job, index, directory))
        choices = (method.minibatch, method.dense_path, job.seed)
        blocks = Blocks(experiment.bundle, start, patterns, windows, *choices, inside(job, experiment))
        try:
            return repaired_blocks(blocks, method, who, store, report)
        finally:
            experiment.dense.put_back()
    assert isinstance(method, WeightLearner)
    return repaired_model(method, WeightTask(*task_of(job, method, experiment, directory, start.masks), start=start))


def inside(job: Job, experiment: Experiment) -> Callable[[int, int, int], None]:
    """Return a callback for the progress inside a block: its number, steps done, steps."""
    count = len(experiment.bundle.blocks)
    return lambda index, done, total: experiment.reporter(job.title, f"block {index + 1} of {count}")(done, total)


def block_checkpoints(job: Job, index: int, directory: RunDirectory) -> FileCheckpoints:
    """Return the file of one finished block of a repair."""
    return FileCheckpoints(directory.file("checkpoints", job.name, f".block{index}.safetensors"), job.digest)


def with_start(result: Made, start: Record) -> Made:
    """Add the whole cost of the start: its tokens (unknown ones make the sum unknown) and its time."""
    cost, spent = cost_of_row(start)
    if cost is not None and result.cost is not None:
        result.cost.include(cost)
    whole = None if cost is None else result.cost
    return dataclasses.replace(result, cost=whole, earlier=result.earlier + spent)


def task_of(
    job: Job,
    method: MaskLearner | WeightLearner,
    experiment: Experiment,
    directory: RunDirectory,
    initial: Mapping[str, Tensor],
) -> tuple[Any, ...]:
    """Return the arguments of a task. Pool and selection are copies, so that writing into them changes no other job."""
    pool = experiment.pools[job.seed]
    return (
        experiment.bundle,
        experiment.dense,
        experiment.patterns(job.pattern),
        initial,
        pool.calibration.clone(),
        pool.selection.clone(),
        job.seed,
        FileCheckpoints(directory.file("checkpoints", job.name, ".safetensors"), job.digest),
        job.label,
        experiment.learner_reporter(job.title, method),
    )
