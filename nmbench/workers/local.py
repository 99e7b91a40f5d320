"""Processes of this machine: a GPU each where there are several, the threads of the processor divided."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from nmbench.experiment.stopping import GRACE_SECONDS, listening
from nmbench.workers.engine import Engine
from nmbench.workers.task import Task, do

THREADS = "OMP_NUM_THREADS"
GPUS = "CUDA_VISIBLE_DEVICES"


class Local(Engine):
    """`count` processes, each with a place: a GPU and its threads. A process that was killed is replaced."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._places: list[Place] = []

    def free(self) -> bool:
        """Return True if a place is free."""
        return not self._places or any(place.free for place in self._places)

    def submit(self, task: Task) -> Attempt:
        """Hand a task over to a free place."""
        if not self._places:
            gpus = cards()
            self._places = [Place(environment(number, self.count, gpus)) for number in range(self.count)]
        return next(place for place in self._places if place.free).take(task)

    def close(self, interrupted: bool) -> None:
        """End the processes; if the run was interrupted, those at work end at a checkpoint, or are killed."""
        children = multiprocessing.active_children() if interrupted else []
        for child in children:
            child.terminate()
        if interrupted:
            concurrent.futures.wait([p.attempt.future for p in self._places if p.attempt], GRACE_SECONDS + 1)
        for child in children:
            child.kill()
        for place in self._places:
            place.close()


@dataclass
class Place:
    """Room for one process, which does one task after the other under the variables of `environment`."""

    environment: Mapping[str, str]
    pool: ProcessPoolExecutor | None = None
    attempt: Attempt | None = None

    @property
    def free(self) -> bool:
        """True unless a task is at work here."""
        return self.attempt is None or self.attempt.done()

    def take(self, task: Task) -> Attempt:
        """Do a task here, in a new process if the last one was killed."""
        if self.attempt is not None and self.attempt.killed:
            self.close()
            self.pool = None
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(1, context, initializer=begin)
        with variables(self.environment):  # a process starts with them, whatever the user's program imports in it
            self.attempt = Attempt(self.pool.submit(at_work, do, task))
        return self.attempt

    def close(self) -> None:
        """End the process."""
        if self.pool is not None:
            self.pool.shutdown()


@dataclass(frozen=True)
class Attempt:
    """A task in a process of this machine."""

    future: Future[None]

    @property
    def killed(self) -> bool:
        """True if the process was killed."""
        return self.future.done() and isinstance(self.future.exception(), BrokenProcessPool)

    def done(self) -> bool:
        """Return True if the process has ended the task, or was killed."""
        return self.future.done()

    def result(self) -> None:
        """Raise what the task raised; a process that was killed raises nothing."""
        if not self.killed:
            self.future.result()


def cards() -> list[str]:
    """Return the GPUs that this process may use, as CUDA names them."""
    import torch

    from nmbench.runtime.gpus import visible

    return visible(os.environ, torch.cuda.device_count)


def environment(place: int, count: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the variables of the process at `place` of `count`: its GPU, if there are some, and its threads."""
    chosen = {GPUS: gpus[place % len(gpus)]} if gpus else {}
    return {**chosen, THREADS: str(max(1, threads() // count))}


def threads() -> int:
    """Return the threads of this process: those of OpenMP, if the user has chosen them, or one for each core."""
    first = os.environ.get(THREADS, "").split(",")[0].strip()
    if first.isdecimal():
        return int(first)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def variables(given: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process, which processes that it starts inherit, while the context is open."""
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def begin() -> None:
    """Prepare a new process: its end with that of its parent.

    Ctrl-C reaches all processes of a terminal. This one leaves it to its parent, which sends SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def at_work(do: Callable[[Task], None], task: Task) -> None:
    """Do a task; at SIGTERM a learner ends at a checkpoint."""
    with listening():
        do(task)


def end_with_parent() -> None:
    """Wait for the end of the parent, then end this process: a killed run leaves no processes behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
