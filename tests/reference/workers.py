"""Tasks that stand in for real jobs in processes of their own."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from nmbench.workers.task import Task


def killed_once(task: Task) -> None:
    """Kill the process the first time; then write down the environment."""
    marker = task.directory / f"{task.name}.begun"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    early = "torch imported too early" if "torch" in sys.modules else "no torch"
    (task.directory / task.name).write_text(f"{os.environ['OMP_NUM_THREADS']} {early}", encoding="utf-8")


def by_name(task: Task) -> None:
    """Kill the process for the task `killed`; for the task `until FILE` wait for that file, and a second more."""
    if task.name == "killed":
        killed_once(task)
    deadline = time.monotonic() + 60
    while not (task.directory / task.name.removeprefix("until ")).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)
    (task.directory / task.name).touch()


def never_ending(task: Task) -> None:
    """Write the number of the process down, then sleep."""
    (task.directory / task.name).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


def forbidden(task: Task) -> None:
    """Raise an error."""
    raise ValueError(f"{task.name} is forbidden")


def alive(pid: int) -> bool:
    """True if a process runs, a zombie not counted."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
