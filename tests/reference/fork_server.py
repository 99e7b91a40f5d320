"""A process that has imported what is slow to import, and forks into a Python program for each request.

Started by `reference.processes` with the number of a listening socket, the import path to add, and the modules.
PYTHONPATH is not in its environment, because Python would then leave out what is on its own import path as well. Every
connection is one program: a message that carries its standard input, output and error as open files, then a line of
JSON; the id of the program's process and its exit status go back, a line each. The server ends when its standard input
does, at the latest with the process that started it.

Nothing is computed before a fork: threads of torch, which a fork would lose, start with the first computation.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
import types
from dataclasses import dataclass


def preload(modules: list[str]) -> None:
    """Import the modules, but not plugins of pytest: it warns of those that were imported before it ran."""
    for module in modules:
        importlib.import_module(module)
    plugins = {point.module.partition(".")[0] for point in importlib.metadata.entry_points(group="pytest11")}
    for module in [name for name in sys.modules if name.partition(".")[0] in plugins]:
        del sys.modules[module]


def connected(listener: socket.socket) -> socket.socket:
    """Wait for connections; returns one, in a process forked for it."""
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return connection
        connection.close()


def become_program(connection: socket.socket) -> dict:
    """Fork once more: one process waits, and reports how the other ended; in the other the request is returned."""
    with connection:
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        request = json.loads(connection.makefile().readline())
        if pid := os.fork():
            connection.sendall(f"{pid}\n".encode())
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            connection.sendall(f"{status}\n".encode())
            os._exit(0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    return request


def settle(cwd: str, environment: dict[str, str], flag: str, own: list[str]) -> None:
    """Working directory, environment, import path and signals are those of a Python started with them; `own` is what
    Python itself puts on the import path.
    """
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    given = paths(environment.get("PYTHONPATH", ""))
    sys.path[:] = [cwd if flag == "-m" else "", *given, *(entry for entry in own if entry not in given)]
    importlib.invalidate_caches()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def paths(text: str) -> list[str]:
    return [os.path.abspath(entry) for entry in text.split(os.pathsep) if entry]


def execute(flag: str, what: str, *arguments: str) -> None:
    """`python -c what` or `python -m what`."""
    if flag == "-m":
        sys.argv[:] = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = ["-c", *arguments]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)


def status_of(arguments: list[str]) -> int:
    """Execute a program; returns its exit status."""
    try:
        execute(*arguments)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@dataclass
class Ending:
    """Called at exit, after all functions that were registered later; taking all modules down would take a second."""

    status: int | None = None

    def __call__(self) -> None:
        if self.status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status)


if __name__ == "__main__":
    atexit.register(ending := Ending())
    number, path, *modules = sys.argv[1:]
    own = sys.path[1:]  # [0] is the folder of this file
    sys.path[1:1] = paths(path)
    preload(modules)
    gc.collect()
    gc.freeze()  # else a collection in a fork would copy all that is shared
    request = become_program(connected(socket.socket(fileno=int(number))))
    settle(request["cwd"], request["environment"], request["arguments"][0], own)
    ending.status = status_of(request["arguments"])
