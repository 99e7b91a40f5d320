"""Processes that tests start."""

import signal


def listening() -> None:
    """In a new process: let Ctrl-C through, also where the tests themselves run in the background, deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
