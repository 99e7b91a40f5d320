"""The row that a learner or a repair begins with: its record, its masks and, if it changed them, its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.experiment.jobs import Job
from nmbench.methods import Pruned, PrunedModel
from nmbench.results.directory import RunDirectory
from nmbench.results.files import load_masks, notice
from nmbench.results.format import Record
from nmbench.results.kept_weights import load_weights
from nmbench.results.records import identity
from nmbench.verification.strict import masks_digest

WEIGHTS = "weights"  # the folder of kept weights in a run directory


@dataclass(frozen=True)
class Start:
    """The row that a job begins with, and the directory of its files."""

    record: Record
    job: Job
    directory: RunDirectory

    @classmethod
    def of(cls, job: Job, directory: RunDirectory) -> Start:
        """Return the start of `job`. Raises `NMBenchError` if that row failed."""
        wanted = (job.start, str(job.pattern), job.seed)
        rows = [record for record in directory.records() if identity(record) == wanted]
        if not rows or rows[0]["status"] != "ok":
            raise NMBenchError(f"{job.label} has nothing to begin with, because {job.start} failed.")
        return cls(rows[0], job, directory)

    @property
    def name(self) -> str:
        """The name of the files of the row."""
        return self.job.files_of(self.record["label"])

    def masks(self) -> dict[str, Tensor]:
        """Return the masks of the row. Raises `NMBenchError` unless the file has the digest of the proof."""
        path = self.directory.file("masks", self.name, ".safetensors")
        masks = load_masks(path)
        if self.record["proof"] is None or masks_digest(masks) != self.record["proof"]["masks_digest"]:
            raise NMBenchError(
                f"{path} does not hold the masks of its record; remove it and give the same command again."
            )
        return masks

    def pruned(self, again: Callable[[], PrunedModel]) -> PrunedModel:
        """Return masks and weights of the row; `again` makes the row once more, if its weights were not kept."""
        masks = self.masks()
        if not self.record["weights_changed"]:
            return PrunedModel({name: Pruned(mask) for name, mask in masks.items()})
        found = kept(self.directory, self.name, masks, self.record["job_digest"])
        return again() if found is None else found


def kept(directory: RunDirectory, name: str, masks: dict[str, Tensor], job_digest: str) -> PrunedModel | None:
    """Return the pruned model of a row whose weights were kept; None if there is no whole file of that job."""
    path = directory.file(WEIGHTS, name, ".safetensors")
    if not path.exists():
        return None
    try:
        weights, others, digest = load_weights(path, masks)
    except NMBenchError as error:
        notice(f"{error} The weights are made again.")
        return None
    if digest != job_digest:
        return None
    return PrunedModel({layer: Pruned(mask, weights.get(layer)) for layer, mask in masks.items()}, others=others)
