"""Processes of this machine: a GPU each where there are several, the threads of the processor divided."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from nmbench.workers.engine import Engine
from nmbench.workers.task import Task, do

THREADS = "OMP_NUM_THREADS"
GPUS = "CUDA_VISIBLE_DEVICES"


class Local(Engine):
    """`count` processes; one that was killed is replaced."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, task: Task) -> Attempt:
        """Hand a task over; it begins when a process is free."""
        try:
            return Attempt(self._running().submit(do, task))
        except BrokenProcessPool:
            self._pool = None
            return Attempt(self._running().submit(do, task))

    def close(self, interrupted: bool) -> None:
        """End the processes; those at work are interrupted as by Ctrl-C, if the run was."""
        for child in multiprocessing.active_children() if interrupted else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid or 0, signal.SIGINT)
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _running(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            places = context.Queue()
            for place in range(self.count):
                places.put(environment(place, self.count, cards()))
            self._pool = ProcessPoolExecutor(self.count, context, initializer=begin, initargs=(places,))
        return self._pool


@dataclass(frozen=True)
class Attempt:
    """A task in a process of this machine."""

    future: Future[None]

    def done(self) -> bool:
        """Return True if the process has ended the task, or was killed."""
        return self.future.done()

    def result(self) -> None:
        """Raise what the task raised; a process that was killed raises nothing."""
        with contextlib.suppress(BrokenProcessPool, concurrent.futures.CancelledError):
            self.future.result()


def cards() -> list[str]:
    """Return the GPUs that this process may use, as CUDA names them."""
    import torch

    visible = os.environ.get(GPUS)
    found = [str(number) for number in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    return [card for card in found if card]


def environment(place: int, count: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the variables of the process at `place` of `count`: its GPU, if there are some, and its threads."""
    chosen = {GPUS: gpus[place % len(gpus)]} if gpus else {}
    threads = int(os.environ.get(THREADS) or len(os.sched_getaffinity(0)))
    return {**chosen, THREADS: str(max(1, threads // count))}


def begin(places: Any) -> None:
    """Prepare a new process, before it loads torch: its GPU, its threads, and its end with that of its parent."""
    os.environ.update(places.get())
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the end of the parent, then end this process: a killed run leaves no processes behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
