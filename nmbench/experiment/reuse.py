"""One-shot work that several rows have in common is done once.

The mask that a learner begins with has a row of its own, `<label>@init`. Several learners may begin with the same mask,
and the method that makes it may be in the comparison itself. All that decides such rows is the same but for the label,
so the second row is a copy of the first, files and figures, seconds and tokens included; its field `copied_from`, and a
line below the table, name the first. Only rows that this process made are copied: a digest names a method and its
options, not its code, which may have changed since an earlier run.
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
    """The one-shot rows that this process made, by what decides them."""

    def __init__(self) -> None:
        self.rows: dict[str, Record] = {}

    def keep(self, job: Job, record: Record) -> None:
        """Remember a row that was just made, if it may be copied."""
        if isinstance(job.contender.method, Baseline) and record["status"] == "ok":
            self.rows[job.work] = record

    def row(self, job: Job, experiment: Experiment, directory: RunDirectory) -> Record | None:
        """A copy of the row that does the same work under another label, its files copied too; or None."""
        record = self.rows.get(job.work)
        if record is None:
            return None
        try:
            copy_files(job, record, directory)
        except CannotWrite:
            raise
        except NMBenchError:  # its files are damaged or gone
            return None
        return cast(Record, {**record, **identity_of(job, experiment), "copied_from": record["label"]})


def copy_files(job: Job, record: Record, directory: RunDirectory) -> None:
    """Copy masks and losses of a row, under the name and the digest of another."""
    for kind in KINDS:
        tensors, metadata = read_tensors(directory.file(kind, job.files_of(record["label"]), ".safetensors"))
        own = {**metadata, "label": job.label, "job_digest": job.digest}
        write_tensors(directory.file(kind, job.name, ".safetensors"), tensors, own)
