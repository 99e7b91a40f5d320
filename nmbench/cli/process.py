"""The process of the command line: how its threads wait for each other."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

WAITING = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
)  # how threads wait; read when torch is loaded


def wait_without_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads of OpenMP sleep while they wait, unless the user has chosen; call it before torch is imported.

    A thread that spins at a barrier keeps the core from the thread that the barrier waits for, as soon as the cores are
    shared with other processes.
    """
    if not any(name in environment for name in WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
