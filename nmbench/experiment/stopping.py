"""Ending on request: Ctrl-C and SIGTERM, after the checkpoint of a learner that is at work, or at once.

A learner that asks `due` after every step stores a checkpoint and ends there. Anything else ends where it is, because
finished jobs are on disk already. A second signal ends the process at once, and so do `GRACE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

GRACE_SECONDS = 5.0  # docker kills after 10 s, Slurm and Kubernetes after 30 s


class Terminated(KeyboardInterrupt):
    """SIGTERM, which clusters send before they kill."""


class Stopping:
    """Whether the process was asked to end, and whether a learner is at work that ends at a checkpoint."""

    def __init__(self) -> None:
        self.wanted: KeyboardInterrupt | None = None
        self.asked = False  # a learner asks after every step
        self._timer: threading.Timer | None = None

    def due(self) -> bool:
        """Return True if the process was asked to end; who asks stores a checkpoint then, and calls `end`."""
        self.asked = True
        return self.wanted is not None

    def end(self) -> None:
        """Raise Ctrl-C or `Terminated` if the process was asked to end: everything is stored."""
        if self.wanted is not None:
            raise self.wanted

    def leave(self) -> None:
        """Note that no learner is at work any more."""
        self.asked = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: wait for the checkpoint of a learner, or raise at once."""
        error = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if not self.asked or self.wanted is not None:
            raise error
        self.wanted = error
        self._timer = threading.Timer(GRACE_SECONDS, os.kill, (os.getpid(), number))
        self._timer.daemon = True
        self._timer.start()

    def reset(self) -> None:
        """Forget signals that were handled, and send no other."""
        self.wanted, self.asked = None, False
        if self._timer is not None:
            self._timer.cancel()


stopping = Stopping()  # signals are of the process, too


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM while the context is open; signals that the caller ignores stay ignored."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    usual = {number: handler for number, handler in own.items() if signal.getsignal(number) == handler}
    stopping.reset()
    try:
        for number in usual:
            signal.signal(number, stopping.on_signal)
        yield
    finally:
        stopping.reset()
        for number, handler in usual.items():
            signal.signal(number, handler)
