"""A thread that ends this process when a rank of the same host is gone.

A collective operation on GPUs waits for a lost rank for ever, and no Python runs meanwhile. On CPUs, and at the next
exchange, the operation itself raises an error; the thread gives it time to.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType

PAUSE_SECONDS = 0.5  # between two looks
GRACE_SECONDS = {True: 10.0, False: 2.0}  # for the process to end by itself: rank 0, which explains, and any other rank


class Watch:
    """Watch of the `processes` of other ranks, rank -> process id, while the context is open.

    `leads`: this process is rank 0, which says what happened.
    """

    def __init__(self, processes: Mapping[int, int], leads: bool) -> None:
        self.processes, self.leads = processes, leads
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def gone(self) -> list[int]:
        """Return the ranks whose processes have ended."""
        return [rank for rank, process in self.processes.items() if not alive(process)]

    def outlasted(self, seconds: float) -> bool:
        """Return True as soon as one of the ranks has ended, False if all go on for some seconds."""
        deadline = time.monotonic() + seconds
        while not self.gone():
            if time.monotonic() > deadline:
                return False
            time.sleep(PAUSE_SECONDS / 10)
        return True

    def _look(self) -> None:
        while not self._over.wait(PAUSE_SECONDS):
            gone = self.gone()
            if gone and not self._over.wait(GRACE_SECONDS[self.leads]):
                if self.leads and sys.__stderr__:
                    print(f"Error: {lost(gone)}", file=sys.__stderr__, flush=True)
                os._exit(1)


def lost(ranks: list[int], why: str = "") -> str:
    """Return the message on ranks that have ended; which ones is unknown if the list is empty, for a reason `why`."""
    names = f"rank {', '.join(map(str, ranks))} ended" if ranks else "another rank ended, or cannot be reached"
    said = f" ({why})" if why else ""
    return f"{names}{said}; the same command goes on from the last checkpoint, with any number of ranks."


def alive(process: int) -> bool:
    """Return True if a process of this host has not ended; a zombie has."""
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or no /proc
        return True
