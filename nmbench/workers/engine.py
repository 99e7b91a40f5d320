"""The contract of an engine, which runs the jobs of a run in other processes."""

from __future__ import annotations

from typing import Protocol

from nmbench.workers.task import Task


class Handle(Protocol):
    """A task that was handed over."""

    def done(self) -> bool:
        """Return True if its process has ended."""

    def result(self) -> None:
        """Raise what the process raised; return if it ended well or was killed."""


class Engine:
    """Something that runs tasks, as a context manager. `pause`: seconds between two looks at the handles."""

    pause: float = 0.05

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close(interrupted=kind is not None)

    def free(self) -> bool:
        """Return True if a task that is handed over now begins soon."""
        return True

    def submit(self, task: Task) -> Handle:
        """Hand a task over."""
        raise NotImplementedError

    def close(self, interrupted: bool) -> None:
        """End the processes; if the run was interrupted, also those that are at work."""
