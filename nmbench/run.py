"""A comparison from beginning to end. Read this file first: it is the method section of the paper.

Every method starts from the same dense weights, reads the same calibration tokens, is proven strictly N:M, and is
measured by the same evaluator. A finished job is never repeated; a record is durable before observers receive it.
"""

from __future__ import annotations

from pathlib import Path

from nmbench.evaluation.subject import DenseSubject
from nmbench.experiment.jobs import Job
from nmbench.experiment.memory import planned
from nmbench.experiment.plan import checked
from nmbench.experiment.reuse import Shared
from nmbench.experiment.self_text import sample_text
from nmbench.experiment.setup import Experiment, prepared
from nmbench.plugins.loading import Plugins, load_plugins
from nmbench.pruning.rows import attempted, dense_row
from nmbench.results.directory import RunDirectory
from nmbench.results.format import Record
from nmbench.results.results import Results
from nmbench.spec import RunSpec

__all__ = ["run"]


def run(spec: RunSpec, out: Path | None = None, plugins: Plugins | None = None, fail_fast: bool = False) -> Results:
    """Do every job of `spec` that its run directory does not hold yet, and return all rows of the directory.

    `out` defaults to `runs/<protocol digest>`. Raises `NMBenchError` for errors that the user can fix; a method that
    fails is recorded as failed, and the other methods go on, unless `fail_fast`.
    """
    plugins = plugins or load_plugins(spec.plugins)
    plan = checked(spec, plugins)  # names, options, patterns: nothing is loaded yet
    experiment = prepared(plan)  # the dense model, tokens, metrics: nothing is pruned yet
    with RunDirectory(out or experiment.directory()) as directory:
        sample_text(experiment, directory)  # calibration text of the model itself, if the run asks for it
        directory.adopt(experiment.spec, experiment.manifest())
        announce_start(experiment)
        record, dense = dense_row(experiment, directory)  # the reference, before every job
        shared = Shared()
        rows = [record]
        for job in experiment.jobs():
            rows.append(row_of(job, experiment, dense, directory, shared))
            if fail_fast and rows[-1]["status"] != "ok":
                break
        plugins.announce("nmbench_run_finished", records=rows)
        return Results(directory.records(), [directory.path], rows)


def row_of(job: Job, experiment: Experiment, dense: DenseSubject, directory: RunDirectory, shared: Shared) -> Record:
    """Return the record of one job: finished earlier, copied from a row of the same work, or made now."""
    record = directory.finished(job.digest, job.name)
    if record is not None:
        directory.drop_checkpoint(job.name, record)  # which a kill after the record has left
        return record
    record = shared.row(job, experiment, directory)
    copied = record is not None
    if record is None:
        record = attempted(job, experiment, dense, directory)
        shared.keep(job, record)
    directory.append(record)
    directory.drop_checkpoint(job.name, record)
    experiment.plugins.announce("nmbench_method_finished", record=record)
    if not copied and not experiment.is_intact(restore=record["status"] != "ok"):  # else the weights are restored
        experiment.renew(job.title)  # after the record, which a model that cannot be loaded again must not cost
    return record


def announce_start(experiment: Experiment) -> None:
    """Call the hook `nmbench_run_started` with the estimate of the device memory and the doubts."""
    bundle, spec = experiment.bundle, experiment.spec
    memory = planned(bundle, spec, experiment.plan.methods, bundle.device, bundle.streaming is not None)
    doubts = list(map(str, experiment.doubts))
    experiment.plugins.announce("nmbench_run_started", spec=spec, memory=memory, doubts=doubts)
