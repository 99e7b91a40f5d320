"""The order in which processes do the jobs of a run: starts first, the rest as places become free."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nmbench.errors import NMBenchError
from nmbench.experiment.jobs import Job
from nmbench.experiment.reuse import Shared
from nmbench.plugins.loading import Plugins
from nmbench.pruning.rows import keep_row
from nmbench.results.directory import RunDirectory
from nmbench.results.format import Record
from nmbench.runtime.memory import give_back
from nmbench.spec import RunSpec
from nmbench.workers.asked import Workers
from nmbench.workers.engine import Engine, Handle
from nmbench.workers.task import Task, start_name

TRIES = 3  # processes that may be killed at one job


@dataclass
class Board:
    """The jobs of one run: what waits, what is done elsewhere, what is finished.

    `shared` holds the one-shot rows of this run, which other labels copy.
    """

    jobs: Sequence[Job]
    directory: RunDirectory
    shared: Shared = field(default_factory=Shared)
    running: dict[str, Handle] = field(default_factory=dict)
    tries: Counter[str] = field(default_factory=Counter)
    finished: dict[str, Record] = field(default_factory=dict)

    @cached_property
    def wanted(self) -> dict[str, set[str]]:
        """The names of the jobs that must be finished before each job."""
        return needs(self.jobs)

    def ready(self) -> list[Job]:
        """Return the jobs that could begin now, in the order of the run."""
        waiting = (j for j in self.jobs if j.name not in self.running and j.name not in self.finished)
        return [job for job in waiting if self.wanted[job.name] <= self.finished.keys()]

    def hand_over(self, engine: Engine, task: Task) -> None:
        """Let `engine` do a task. Raises `NMBenchError` if processes have died at it too often."""
        self.tries[task.name] += 1
        if self.tries[task.name] > TRIES:
            raise NMBenchError(
                f"{task.name}: its process was killed {TRIES} times, perhaps for want of memory; the same command with "
                f"fewer --jobs goes on."
            )
        self.running[task.name] = engine.submit(task)

    def look(self) -> bool:
        """Take up the jobs that ended; return True if there were some. Raises what a process raised."""
        ended = [job for job in self.jobs if job.name in self.running and self.running[job.name].done()]
        for job in ended:
            self.running.pop(job.name).result()
            if record := self.directory.left(job.name, job.digest) or self.directory.finished(job.digest, job.name):
                self.finished[job.name] = record
                self.shared.keep(job, record)
        return bool(ended)

    def take_up(self) -> None:
        """Note the jobs that ended well before this run, those too whose records wait in the directory.

        Their rows are not copied, because the code may be another than theirs.
        """
        for job in self.jobs:
            if record := self.directory.finished(job.digest, job.name):
                self.finished[job.name] = record


def needs(jobs: Sequence[Job]) -> dict[str, set[str]]:
    """Return, for the name of every job, the names of the jobs before it: its start, and earlier ones of its work."""
    names, first = {job.name for job in jobs}, dict[str, str]()
    for job in jobs:
        first.setdefault(job.work, job.name)
    wanted = {job.name: {first[job.work], *([start_name(job)] if job.start else [])} for job in jobs}
    return {name: others & names - {name} for name, others in wanted.items()}


def rows_by(
    workers: Workers, spec: RunSpec, jobs: Sequence[Job], directory: RunDirectory, plugins: Plugins
) -> list[Record]:
    """Return the records of all jobs in their order, as one process would make them; the dense row is finished.

    Records are appended in the order of the jobs. Raises what a process raises that is not the failure of a method.
    """
    give_back()
    board, kept = Board(jobs, directory), 0
    board.take_up()
    with workers.engine() as engine:
        while kept < len(jobs):
            for job in itertools.takewhile(lambda _: engine.free(), board.ready()):
                twin = board.shared.rows.get(job.work)
                board.hand_over(engine, Task(spec, directory.path.absolute(), job.name, workers.quiet, twin))
            kept = keep_in_order(board, kept, plugins)
            if kept < len(jobs) and not board.look():
                time.sleep(engine.pause)
    return [board.finished[job.name] for job in jobs]


def keep_in_order(board: Board, kept: int, plugins: Plugins) -> int:
    """Append the records of the jobs that follow the first `kept` ones without a gap; return how many are kept."""
    while kept < len(board.jobs) and board.jobs[kept].name in board.finished:
        job = board.jobs[kept]
        if board.directory.left(job.name, job.digest) is not None:
            keep_row(board.finished[job.name], job.name, board.directory, plugins)
        kept += 1
    return kept
