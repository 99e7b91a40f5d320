"""Reuse of one-shot rows: work that several rows have in common is done once.

The start of a learner has its own row, `<label>@init`. Several learners may start from the same mask, and the method of
this mask may be in the comparison too. Such rows differ only in their labels, so the second row is a copy of the first,
with files, figures, seconds and tokens; the field `copied_from` of the copy, and a line below the table, name the first
row. Only rows of this process are copied, because a digest does not cover the code of nmbench and its built-in
methods, which may have changed since an earlier run.
"""

from __future__ import annotations

from typing import cast

from nmbench.errors import CannotWrite, NMBenchError
from nmbench.experiment.jobs import Job
from nmbench.experiment.record import identity_of
from nmbench.experiment.setup import Experiment
from nmbench.methods import Baseline
from nmbench.results.directory import RunDirectory
from nmbench.results.files import read_tensors, write_tensors
from nmbench.results.format import Record

KINDS = ("masks", "losses")  # of files


class Shared:
    """The one-shot rows that this process made, by `Job.work`."""

    def __init__(self) -> None:
        self.rows: dict[str, Record] = {}

    def keep(self, job: Job, record: Record) -> None:
        """Store a new row, if the row may be copied: a one-shot method, and no failure."""
        if isinstance(job.contender.method, Baseline) and record["status"] == "ok":
            self.rows[job.work] = record

    def row(self, job: Job, experiment: Experiment, directory: RunDirectory) -> Record | None:
        """Return a copy of the row that does the same work under another label, with copies of its files; else None."""
        record = self.rows.get(job.work)
        if record is None:
            return None
        try:
            copy_files(job, record, directory)
        except CannotWrite:
            raise
        except NMBenchError:  # the files of the row are damaged or gone
            return None
        own = {**identity_of(job, experiment), "copied_from": record["label"], "kept_bytes": None}
        return cast(Record, {**record, **own})


def copy_files(job: Job, record: Record, directory: RunDirectory) -> None:
    """Copy the masks and losses of `record` to the files of `job`, with the label and digest of `job`."""
    for kind in KINDS:
        tensors, metadata = read_tensors(directory.file(kind, job.files_of(record["label"]), ".safetensors"))
        own = {**metadata, "label": job.label, "job_digest": job.digest}
        write_tensors(directory.file(kind, job.name, ".safetensors"), tensors, own)
