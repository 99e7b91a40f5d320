"""A comparison from beginning to end. Read this file first: it is the method section of the paper.

Every method starts from the same dense weights, reads the same calibration tokens, is proven strictly N:M, and is
measured by the same evaluator. A finished job is never repeated; a record is durable before observers receive it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nmbench.evaluation.subject import DenseSubject
from nmbench.experiment.forecast import forecasts_of
from nmbench.experiment.jobs import Job
from nmbench.experiment.memory import planned
from nmbench.experiment.plan import checked
from nmbench.experiment.reuse import Shared
from nmbench.experiment.self_text import sample_text
from nmbench.experiment.setup import Experiment, prepared
from nmbench.plugins.loading import Plugins, load_plugins
from nmbench.pruning.rows import dense_row, keep_row, new_row
from nmbench.results.directory import RunDirectory
from nmbench.results.format import Record
from nmbench.results.results import Results
from nmbench.spec import RunSpec
from nmbench.workers.asked import Workers
from nmbench.workers.ranks import helped
from nmbench.workers.schedule import rows_by

__all__ = ["run"]


def run(
    spec: RunSpec,
    out: Path | None = None,
    plugins: Plugins | None = None,
    workers: Workers | None = None,
    fail_fast: bool = False,
) -> Results:
    """Do every job of `spec` that its run directory does not hold yet, and return all rows of the directory.

    `out` defaults to `runs/<protocol digest>`. With `workers`, other processes do the jobs. Raises `NMBenchError` for
    errors that the user can fix; a method that fails is recorded as failed, and the other methods go on, unless
    `fail_fast`, which needs that this process does the jobs.
    """
    plugins = plugins or load_plugins(spec.plugins)
    plan = checked(spec, plugins)  # names, options, patterns: nothing is loaded yet
    experiment = prepared(plan)  # the dense model, tokens, metrics: nothing is pruned yet
    with RunDirectory(out or experiment.directory()) as directory:
        record, dense = opened(experiment, directory)
        jobs = experiment.jobs()
        if workers is None:
            with helped(experiment, directory):  # by other processes, if torchrun has started them
                rows = rows_in_turn(jobs, experiment, dense, directory, fail_fast)
        else:
            del experiment, dense  # other processes need the memory
            rows = rows_by(workers, spec, jobs, directory, plugins)
        plugins.announce("nmbench_run_finished", records=[record, *rows])
        return Results(directory.records(), [directory.path], [record, *rows])


def run_dense(spec: RunSpec, out: Path, plugins: Plugins) -> Record:
    """Return the dense row of a run directory, measured unless it is there; other processes may do the jobs then."""
    experiment = prepared(checked(spec, plugins))
    with RunDirectory(out) as directory:
        return opened(experiment, directory)[0]


def opened(experiment: Experiment, directory: RunDirectory) -> tuple[Record, DenseSubject]:
    """Return the dense row, the reference of every job; the directory is then that of this run."""
    sample_text(experiment, directory)  # calibration text of the model itself, if the run asks for it
    directory.adopt(experiment.spec, experiment.manifest())
    announce_start(experiment, directory)
    return dense_row(experiment, directory)


def rows_in_turn(
    jobs: Sequence[Job], experiment: Experiment, dense: DenseSubject, directory: RunDirectory, fail_fast: bool
) -> list[Record]:
    """Return the records of all jobs, done one after the other; `fail_fast`: up to the first that failed."""
    shared, rows = Shared(), []
    for job in jobs:
        rows.append(row_of(job, experiment, dense, directory, shared))
        if fail_fast and rows[-1]["status"] != "ok":
            break
    return rows


def row_of(job: Job, experiment: Experiment, dense: DenseSubject, directory: RunDirectory, shared: Shared) -> Record:
    """Return the record of one job: finished earlier, copied from a row of the same work, or made now."""
    record = directory.finished(job.digest, job.name)
    if record is None:
        with directory.working_on(job.name):
            record = new_row(job, experiment, dense, directory, shared)
            keep_row(record, job.name, directory, experiment.plugins)
    elif directory.left(job.name, job.digest):
        keep_row(record, job.name, directory, experiment.plugins)
    else:
        directory.drop_checkpoint(job.name, record)  # which a kill after the record has left
    return record


def announce_start(experiment: Experiment, directory: RunDirectory) -> None:
    """Call the hook `nmbench_run_started` with the estimate of the device memory, the doubts, and all rows."""
    bundle, spec = experiment.bundle, experiment.spec
    memory = planned(bundle, spec, experiment.plan.methods, bundle.device, bundle.streaming is not None)
    doubts = list(map(str, experiment.doubts))
    rows = forecasts_of(experiment.jobs(), experiment.protocol_digest, directory)
    known = {"spec": spec, "memory": memory, "doubts": doubts, "directory": directory.path, "rows": rows}
    experiment.plugins.announce("nmbench_run_started", **known)
