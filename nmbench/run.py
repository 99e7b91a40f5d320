"""A comparison from beginning to end. Read this file first: it is the method section of the paper.

Every method starts from the same dense weights, sees the same calibration tokens, is checked to be strictly N:M, and
meets the same evaluator. A finished job is never repeated; a record is durable before anyone is told of it.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmbench.errors import CannotWrite, NMBenchError
from nmbench.evaluation.measure import measure_all
from nmbench.evaluation.subject import DenseSubject, Subject
from nmbench.experiment.jobs import Job, check_supported, contenders, jobs, lineage, with_typed_options
from nmbench.experiment.loading import load_model
from nmbench.experiment.memory import planned
from nmbench.experiment.record import against_dense, described, failed
from nmbench.experiment.reuse import Shared
from nmbench.experiment.setup import Experiment, check_names, prepare, renewed
from nmbench.methods import Baseline, DenseModel, MaskLearner, MaskSource, Method, Pruned, PrunedModel
from nmbench.models.bundle import Bundle
from nmbench.models.dense_view import DenseView
from nmbench.plugins.loading import Plugins, load_plugins
from nmbench.pruning.learning import LearnTask
from nmbench.pruning.one_shot import apply, prune_one_shot
from nmbench.results.directory import RunDirectory
from nmbench.results.files import FileCheckpoints, load_masks, read_tensors, save_masks, write_atomic, write_tensors
from nmbench.results.records import Record, Results, identity
from nmbench.runtime.cost import Cost, Meter
from nmbench.runtime.isolation import fenced
from nmbench.spec import RunSpec
from nmbench.verification.strict import check_divides, check_masks, check_strict, masks_digest

__all__ = ["run"]


def run(spec: RunSpec, out: Path | None = None, plugins: Plugins | None = None) -> Results:
    """Do every job of `spec` that its run directory does not hold yet, and return all rows of the directory.

    `out` defaults to `runs/<protocol digest>`. Raises `NMBenchError` for what the user can fix; a method that fails is
    recorded as failed and does not stop the others.
    """
    plugins = plugins or load_plugins(spec.plugins)
    check_names(spec, plugins)
    spec = with_typed_options(spec, plugins)
    methods = contenders(spec, plugins)
    check_supported(methods, spec)
    used = [c.method for contender in methods for c in lineage(contender)]
    bundle = load_model(spec, plugins, used)
    spec = spec.resolved(bundle.defaults)
    check_names(spec, plugins)
    check_supported(methods, spec)
    for pattern in spec.patterns:
        check_divides(spec.layer_patterns(pattern, bundle.layers), shapes(bundle))
    experiment = prepare(spec, plugins, bundle, learners=any(isinstance(c.method, MaskLearner) for c in methods))

    with RunDirectory(out or experiment.directory()) as directory:
        directory.adopt(spec, experiment.manifest())
        memory = planned(bundle, spec, used, bundle.device, bundle.streaming is not None)
        plugins.announce("nmbench_run_started", spec=spec, memory=memory)
        records, shared = [], Shared()
        for job in jobs(spec, methods, experiment.protocol_digest):
            record = directory.finished(job.digest, job.name)
            if record is None:
                record = shared.row(job, experiment, directory)
                if record is None:
                    record = attempt(job, experiment, directory)
                    experiment = sound(experiment, job, record, used)
                    shared.keep(job, record)
                directory.append(record)
                directory.drop_checkpoint(job.name, record)
                plugins.announce("nmbench_method_finished", record=record)
            elif job.contender is None:
                experiment.reference = DenseSubject(read_tensors(directory.file("losses", job.name, ".safetensors"))[0])
            records.append(record)
        plugins.announce("nmbench_run_finished", records=records)
        return Results(directory.records(), [directory.path], records)


def sound(experiment: Experiment, job: Job, record: Record, used: Sequence[Method]) -> Experiment:
    """The experiment for the next job: the same, or with the model loaded again if this job left another one behind.

    The model is put where all methods `used` can work on it.
    """
    if experiment.is_intact(restore=record["status"] != "ok"):  # a job that ended well has restored the dense weights
        return experiment
    return renewed(experiment, load_model(experiment.spec, experiment.plugins, used), job.title)


def attempt(job: Job, experiment: Experiment, directory: RunDirectory) -> Record:
    """Do one job; a method that raises, or calls exit, gives a failed record with the traceback in a file.

    Raises `NMBenchError` if the dense model fails, because nothing can be compared without the reference.
    """
    try:
        with fenced():
            return do(job, experiment, directory)
    except CannotWrite:
        raise
    except (Exception, SystemExit) as error:
        trace = directory.file("errors", job.name, ".txt")
        write_atomic(trace, traceback.format_exc().encode())
        kind = "" if isinstance(error, NMBenchError) else f"{type(error).__name__}: "
        message = " ".join(f"{kind}{error}".split())
        if job.contender is None:
            raise NMBenchError(f"the dense model cannot be measured: {message} (traceback: {trace})") from error
        return failed(job, experiment, message, str(trace.relative_to(directory.path)))


def do(job: Job, experiment: Experiment, directory: RunDirectory) -> Record:
    """Prune, prove, evaluate: one row. Raises whatever goes wrong."""
    cost = Cost()
    with Meter(experiment.bundle.device) as pruning:
        pruned, earlier_seconds = prune(job, experiment, directory, cost) if job.contender else (None, 0.0)
    with Meter(experiment.bundle.device) as evaluating:
        try:
            proof, subject, metrics, measured_digest = evaluate(job, experiment, pruned)
        finally:
            experiment.dense.restore()
    if pruned is None:
        experiment.reference = DenseSubject(subject.cached)
    keep_files(job, experiment, directory, pruned, subject)
    prune_seconds = earlier_seconds + pruning.seconds if pruned else 0.0
    return {
        **described(job, experiment),
        "status": "ok",
        "strict": True if pruned else None,
        "proof": proof,
        "measured_digest": measured_digest,
        "weights_changed": pruned.weights_changed if pruned else False,
        "metrics": metrics,
        "against_dense": against_dense(subject, experiment.reference) if pruned else {},
        "seconds": {
            "prune": round(prune_seconds, 3),
            "evaluate": round(evaluating.seconds, 3),
            "total": round(prune_seconds + evaluating.seconds, 3),
        },
        "peak_bytes": {
            "host": max(pruning.host_bytes, evaluating.host_bytes),
            "device": max(filter(None, (pruning.device_bytes, evaluating.device_bytes)), default=None),
        },
        "cost": asdict(cost),
        "notes": dict(pruned.notes) if pruned else {},
    }


def prune(job: Job, experiment: Experiment, directory: RunDirectory, cost: Cost) -> tuple[PrunedModel, float]:
    """The masks (and weights) of one job, and the seconds spent on them before: in an interrupted process, and by the
    learner whose masks it starts from.
    """
    assert job.contender and job.pattern and job.seed is not None
    method = job.contender.method
    patterns = experiment.spec.layer_patterns(job.pattern, experiment.bundle.layers)
    if isinstance(method, Baseline):
        return one_shot(job, method, experiment, patterns, cost), 0.0
    if isinstance(method, MaskSource):
        return brought(job, method, experiment, patterns), 0.0
    assert isinstance(method, MaskLearner) and job.contender.init
    start = start_row(job, directory)
    task = LearnTask(
        experiment.bundle,
        experiment.dense,
        patterns,
        initial_masks(start, job, directory),
        experiment.pools[job.seed].calibration.clone(),  # not even a learner that writes into its tokens reaches others
        experiment.pools[job.seed].selection.clone(),
        job.seed,
        FileCheckpoints(directory.file("checkpoints", job.name, ".safetensors"), job.digest),
        job.label,
        experiment.learner_reporter(job.title, method),
        cost,
    )
    masks = method.learn(task)
    experiment.check_intact(job.label)  # whatever the learner left behind is undone, or its row fails
    check_masks(masks, patterns, shapes(experiment.bundle), job.label)
    task.settle()
    pruned = {name: Pruned(mask.to(experiment.bundle.device)) for name, mask in masks.items()}
    seconds = task.checkpoints.earlier_seconds
    if isinstance(job.contender.init.method, MaskLearner):  # this one goes on with its work: the cost of both is told
        cost.include(Cost(**start["cost"]))
        seconds += start["seconds"]["prune"]
    return PrunedModel(pruned, task.notes), seconds


def one_shot(
    job: Job, method: Baseline, experiment: Experiment, patterns: Mapping[str, Any], cost: Cost
) -> PrunedModel:
    """A baseline's result from the first `--windows` windows of the pool."""
    assert job.seed is not None
    windows = experiment.pools[job.seed].calibration[: experiment.spec.windows]
    report = experiment.reporter(job.title, "prune")
    init = job.contender.init.method if job.contender and job.contender.init else None
    assert init is None or isinstance(init, Baseline)
    return prune_one_shot(experiment.bundle, experiment.dense, method, patterns, windows, job.label, cost, report, init)


def brought(job: Job, method: MaskSource, experiment: Experiment, patterns: Mapping[str, Any]) -> PrunedModel:
    """Masks that were made elsewhere, checked and on the model's device."""
    weights = {name: experiment.dense.layer(layer) for name, layer in experiment.bundle.layers.items()}
    pruned = method.bring(DenseModel(weights, patterns, experiment.bundle.skipped))
    check_masks(pruned.masks, patterns, shapes(experiment.bundle), job.label)
    device = experiment.bundle.device
    layers = {
        name: Pruned(layer.mask.to(device), None if layer.weight is None else layer.weight.to(device))
        for name, layer in pruned.layers.items()
    }
    return PrunedModel(layers, pruned.notes)


def start_row(job: Job, directory: RunDirectory) -> Record:
    """The record of the row that a learner starts from. Raises `NMBenchError` unless it ended well."""
    assert job.contender and job.contender.init
    label = job.contender.init.label
    wanted = (label, str(job.pattern), job.seed)
    rows = [record for record in directory.records() if identity(record) == wanted]
    if not rows or rows[0]["status"] != "ok":
        raise NMBenchError(f"{job.label} has no initial mask, because {label} failed.")
    return rows[0]


def initial_masks(start: Record, job: Job, directory: RunDirectory) -> dict[str, Tensor]:
    """The masks of the row `start`. Raises `NMBenchError` unless its file holds the masks that were proven there."""
    path = directory.file("masks", job.files_of(start["label"]), ".safetensors")
    masks = load_masks(path)
    if masks_digest(masks) != start["proof"]["masks_digest"]:
        raise NMBenchError(f"{path} does not hold the masks of its record; remove it and give the same command again.")
    return masks


def evaluate(
    job: Job, experiment: Experiment, pruned: PrunedModel | None
) -> tuple[dict[str, Any] | None, Subject, dict[str, dict[str, Any]], str]:
    """Apply, prove strict, measure, and prove by hash that the very tensors measured are still the same.

    The hash comes last: it tells whether a model that is made again is the one that was measured.
    """
    if pruned is not None:
        apply(experiment.bundle, pruned)
    measured = experiment.bundle.in_dtype(getattr(torch, str(experiment.spec.eval_dtype)))
    proof = prove(job, experiment, measured, pruned)
    before = measured.digest()
    texts = {name: tokens.clone() for name, tokens in experiment.texts.items()}  # a metric is lent copies
    subject = Subject(measured, texts, experiment.reporter(job.title, "evaluate"))
    cached = (
        {name: losses.clone() for name, losses in experiment.reference.cached.items()} if pruned is not None else {}
    )
    reference = DenseSubject(cached, subject if pruned is None else None, DenseView(measured, experiment.dense.copies))
    metrics = measure_all(experiment.metrics, subject, reference)
    if measured.digest() != before:
        raise NMBenchError(f"the weights of {job.title} changed while they were measured; no number is recorded.")
    return proof, subject, metrics, before


def prove(job: Job, experiment: Experiment, measured: Bundle, pruned: PrunedModel | None) -> dict[str, Any] | None:
    """The proof of strictness of the weights that are measured; None for the dense model."""
    if pruned is None or job.pattern is None:
        return None
    weights = {name: layer.read() for name, layer in measured.layers.items()}
    return check_strict(weights, pruned.masks, experiment.spec.layer_patterns(job.pattern, weights), job.label)


def keep_files(
    job: Job, experiment: Experiment, directory: RunDirectory, pruned: PrunedModel | None, subject: Subject
) -> None:
    """Store what the record speaks of: packed masks and per-window losses."""
    about = {
        "label": job.label,
        "job_digest": job.digest,
        "model": experiment.bundle.ref,
        "model_digest": experiment.dense.digest,
    }
    per_window = {**subject.cached, **subject.per_window}
    write_tensors(directory.file("losses", job.name, ".safetensors"), per_window, about)
    if pruned is not None:
        assert job.pattern
        patterns = experiment.spec.layer_patterns(job.pattern, pruned.masks)
        save_masks(directory.file("masks", job.name, ".safetensors"), pruned.masks, patterns, about)


def shapes(bundle: Bundle) -> dict[str, tuple[int, int]]:
    return {name: layer.shape for name, layer in bundle.layers.items()}
