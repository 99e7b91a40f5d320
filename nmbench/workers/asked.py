"""The value of `--jobs`: how many processes do the rows, and who starts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nmbench.errors import NMBenchError
from nmbench.workers.engine import Engine

FORMS = "local:K (K processes of this machine), slurm, or script (print the commands)"


@dataclass(frozen=True)
class Workers:
    """Processes that do the jobs of a run.

    `kind`: local, slurm or script. `count`: processes at once, for local. `cluster`: what slurm asks for. `quiet`: no
    progress from the processes.
    """

    kind: str
    count: int = 1
    cluster: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = True

    def engine(self) -> Engine:
        """Return what runs the processes. Raises `NMBenchError` if a package that it needs is missing."""
        if self.kind == "local":
            from nmbench.workers.local import Local

            return Local(self.count)
        from nmbench.workers.slurm import Slurm

        return Slurm(self.cluster)


def workers_of(text: str, cluster: Mapping[str, Any], quiet: bool) -> Workers:
    """Return the workers that a text asks for. Raises `NMBenchError` for another text."""
    kind, _, count = text.partition(":")
    if kind == "local" and count.isdecimal() and int(count) > 0:
        return Workers(kind, int(count), quiet=quiet)
    if text in ("slurm", "script"):
        workers = Workers(text, cluster=cluster, quiet=quiet)
        if text == "slurm":
            workers.engine()  # a bad table or a missing package is said before anything is measured
        return workers
    raise NMBenchError(f"--jobs {text}: expected {FORMS}.")
