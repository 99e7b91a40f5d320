"""One job as a process of its own does it: the record is left in the run directory, where the run collects it.

A new process imports this module before it knows its threads and its GPU, so that nothing here imports torch at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nmbench.errors import NMBenchError
from nmbench.spec import RunSpec

if TYPE_CHECKING:
    from nmbench.evaluation.subject import DenseSubject
    from nmbench.experiment.jobs import Job
    from nmbench.experiment.setup import Experiment
    from nmbench.results.directory import RunDirectory
    from nmbench.results.format import Record


@dataclass(frozen=True)
class Task:
    """A job of a run directory: `name` is that of its files.

    `twin`: the record of a row made in this run that does the same work under another label, which is copied.
    `patient`: wait while another process does the job.
    """

    spec: RunSpec
    directory: Path
    name: str
    quiet: bool = True
    twin: Record | None = None
    patient: bool = True


@dataclass
class Prepared:
    """The model, the tokens and the dense row of one run, which its tasks share in a process."""

    experiment: Experiment
    dense: DenseSubject
    directory: RunDirectory

    def job(self, name: str) -> Job:
        """Return the job of a name. Raises `NMBenchError` if the run has none, or if its start has no row yet."""
        from nmbench.results.records import identity

        jobs = {job.name: job for job in self.experiment.jobs()}
        if name not in jobs:
            raise NMBenchError(f"{self.directory.path} has no job {name!r}; it has {', '.join(jobs)}.")
        job = jobs[name]
        rows = set(map(identity, self.directory.records()))
        if job.start and (job.start, str(job.pattern), job.seed) not in rows:
            raise NMBenchError(f"{name} begins with {start_name(job)}, which has no row yet; do that job first.")
        return job


def start_name(job: Job) -> str:
    """Return the name of the files of the row that `job` begins with."""
    return job.files_of(str(job.start))


_prepared: dict[Path, Prepared] = {}  # of this process: the model is loaded once, however many jobs it does


def do(task: Task) -> None:
    """Do one job and leave its record in the run directory, unless it is there. The dense row must be there."""
    from nmbench.experiment.reuse import Shared
    from nmbench.pruning.rows import new_row

    here = prepared_for(task)
    job = here.job(task.name)
    with here.directory.working_on(job.name, task.patient):
        if here.directory.finished(job.digest, job.name) is None:
            shared = Shared()
            if task.twin is not None:
                shared.rows[job.work] = task.twin
            here.directory.leave(new_row(job, here.experiment, here.dense, here.directory, shared), job.name)


def prepared_for(task: Task) -> Prepared:
    """Return the set-up of the run of `task`, made at the first task of this process."""
    if task.directory not in _prepared:
        _prepared.clear()
        _prepared[task.directory] = prepare(task)
    return _prepared[task.directory]


def prepare(task: Task) -> Prepared:
    """Load the model and the tokens of a run whose dense row is finished."""
    from nmbench.experiment.jobs import dense_digest
    from nmbench.experiment.plan import checked
    from nmbench.experiment.progress import ProgressPrinter
    from nmbench.experiment.run_log import log_of
    from nmbench.experiment.self_text import sample_text
    from nmbench.experiment.setup import prepared
    from nmbench.plugins.loading import load_plugins
    from nmbench.pruning.rows import dense_row
    from nmbench.results.directory import RunDirectory
    from nmbench.spec import DENSE

    plugins = load_plugins(task.spec.plugins)
    for line in plugins.broken_files:
        raise NMBenchError(f"{line}; mend the file.")
    if not task.quiet:
        plugins.add_observer(ProgressPrinter(), "progress")  # lines, because several processes print on one terminal
    log_of(plugins, task.directory)
    experiment, directory = prepared(checked(task.spec, plugins)), RunDirectory(task.directory)
    if directory.finished(dense_digest(experiment.protocol_digest), DENSE) is None:
        raise NMBenchError(f"the dense row of {task.directory} is not finished; do that job first.")
    sample_text(experiment, directory)
    return Prepared(experiment, dense_row(experiment, directory)[1], directory)
