"""One-shot work that several rows have in common is done once.

The mask that a learner starts from has a row of its own, `<label>@init`. Several learners may start from the same mask,
and the method that makes it may be in the comparison itself. All that decides such rows is the same but for the label,
so the second is a copy of the first, files and figures, seconds and tokens included; its notes say of which.
"""

from __future__ import annotations

from nmbench.bench import Bench
from nmbench.jobs import Job
from nmbench.methods import Baseline
from nmbench.results import Record, RunDirectory
from nmbench.rows import described
from nmbench.store import read_tensors, write_tensors

KINDS = ("masks", "losses")


def shared(job: Job, bench: Bench, directory: RunDirectory) -> Record | None:
    """The row of a one-shot job that another row of the directory has the figures of already, or None.

    Only a row of the same environment will do. Its files are copied.
    """
    if job.contender is None or not isinstance(job.contender.method, Baseline):
        return None
    about = described(job, bench)
    for record in directory.records():
        if all(record.get(name) == about[name] for name in ("work_digest", "environment", "coverage")):
            found = directory.finished(record["job_digest"], job.files_of(record["label"]))
            if found is not None:
                copy_files(job, found, directory)
                return {**found, **about, "notes": {**found["notes"], "same_as": found["label"]}}
    return None


def copy_files(job: Job, record: Record, directory: RunDirectory) -> None:
    """Copy masks and losses of a row, under the name and the digest of another."""
    for kind in KINDS:
        tensors, metadata = read_tensors(directory.file(kind, job.files_of(record["label"]), ".safetensors"))
        own = {**metadata, "label": job.label, "job_digest": job.digest}
        write_tensors(directory.file(kind, job.name, ".safetensors"), tensors, own)
