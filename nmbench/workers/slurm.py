"""Jobs of a Slurm cluster, handed over by submitit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nmbench.errors import NMBenchError, failing_as
from nmbench.workers.engine import Engine
from nmbench.workers.task import Task, do

NAMES = {
    "partition": "slurm_partition",
    "account": "slurm_account",
    "minutes": "timeout_min",
    "memory_gb": "mem_gb",
    "cpus": "cpus_per_task",
    "gpus": "gpus_per_node",
}


class Slurm(Engine):
    """One job of the cluster for each task. `cluster`: the table `[slurm]` of a specification."""

    pause = 2.0

    def __init__(self, cluster: Mapping[str, Any], system: str = "slurm") -> None:
        unknown = cluster.keys() - NAMES.keys()
        if unknown:
            raise NMBenchError(f"[slurm] has no {', '.join(sorted(unknown))}; it may have {', '.join(NAMES)}.")
        try:
            import submitit
        except ModuleNotFoundError:
            raise NMBenchError("--jobs slurm needs submitit: pip install 'nmbench[slurm]'.") from None
        self.cluster, self.system, self.submitit = cluster, system, submitit
        self._handles: list[Submitted] = []

    def submit(self, task: Task) -> Submitted:
        """Hand a task to the cluster."""
        with failing_as("--jobs slurm: submitit cannot hand jobs over"):
            executor = self.submitit.AutoExecutor(folder=task.directory / "slurm", cluster=self.system)
            executor.update_parameters(name=task.name, **{NAMES[name]: value for name, value in self.cluster.items()})
            handle = Submitted(executor.submit(do, task), task.name)
        self._handles.append(handle)
        return handle

    def close(self, interrupted: bool) -> None:
        """Cancel the jobs that are left, if the run was interrupted."""
        for handle in self._handles if interrupted else ():
            handle.job.cancel()


@dataclass(frozen=True)
class Submitted:
    """A task on the cluster."""

    job: Any
    name: str

    def done(self) -> bool:
        """Return True if the job has ended, or was killed."""
        return bool(self.job.done())

    def result(self) -> None:
        """Raise `NMBenchError` with the last line of what the task raised; a job that was killed raises nothing."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            self.job.result()
        except FailedJobError as error:
            raise NMBenchError(f"{self.name}, job {self.job.job_id} of the cluster: {last_line(str(error))}") from None
        except UncompletedJobError:
            return


def last_line(text: str) -> str:
    """Return the last line of the traceback in a message of submitit, where rules of dashes enclose it."""
    traceback = next((part for part in re.split(r"^-{9,}$", text, flags=re.M) if "Traceback" in part), text)
    return traceback.strip().splitlines()[-1]
