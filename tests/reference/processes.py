"""Processes that tests start: real ones, with files, signals and an exit status, that need not import torch again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SERVER = Path(__file__).with_name("fork_server.py")
PRELOADED = (
    *("torch", "transformers.models.auto", "transformers.models.llama.modeling_llama", "pandas", "pytest"),
    *("nmbench.run", "nmbench.cli", "nmbench.testing.kit"),
)
WITHOUT_TRITON = """
# Triton cannot be imported, and nothing of nmbench was imported while it could be.
import sys
for name in [name for name in sys.modules if name.partition(".")[0] in ("triton", "nmbench", "nmbench_plugins")]:
    del sys.modules[name]
sys.modules["triton"] = None
"""


@dataclass
class Program:
    """A Python program that was forked. `returncode`: as of `subprocess.Popen`, known once it was asked for."""

    arguments: tuple[str, ...]
    pid: int
    connection: socket.socket
    stdout: IO[str]
    stderr: IO[str]
    returncode: int | None = None

    def wait(self, seconds: float = 300) -> int:
        """The exit status; raises TimeoutError for a program that runs on."""
        if self.returncode is None:
            self.connection.settimeout(seconds)
            self.returncode = int(line(self.connection))
        return self.returncode

    def poll(self) -> int | None:
        """The exit status, or None while the program runs."""
        try:
            return self.wait(0)
        except BlockingIOError:
            return None

    def wait_for(self, path: Path, seconds: float = 120) -> None:
        """Wait until a file appears, while the program runs."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert self.poll() is None, self.communicate()
            assert time.monotonic() < deadline, f"no {path}"
            time.sleep(0.01)

    def send_signal(self, which: int) -> None:
        os.kill(self.pid, which)

    def communicate(self, seconds: float = 300) -> tuple[str, str]:
        """Wait for the end; returns what was written to standard output and error."""
        self.wait(seconds)
        self.connection.close()
        return tuple(written(file) for file in (self.stdout, self.stderr))


def line(connection: socket.socket) -> str:
    """The next line of the server."""
    found = b""
    while not found.endswith(b"\n"):
        byte = connection.recv(1)
        assert byte, "the fork server has ended"
        found += byte
    return found.decode()


def written(file: IO[str]) -> str:
    """The content of a file, which is closed."""
    with file:
        file.seek(0)
        return file.read()


class Programs:
    """Starts Python programs by the fork server that listens at `address`."""

    def __init__(self, address: str) -> None:
        self.address = address

    def start(self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] = os.environ) -> Program:
        """Start `python *arguments`, the first of which is `-m` or `-c`, without input."""
        files = [tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")]  # noqa: SIM115 - closed when they are read
        ours = socket.socket(socket.AF_UNIX)
        ours.connect(self.address)
        with open(os.devnull) as nothing:
            socket.send_fds(ours, [b"."], [file.fileno() for file in (nothing, *files)])
        request = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "environment": dict(env)}
        ours.sendall(json.dumps(request).encode() + b"\n")
        return Program(arguments, int(line(ours)), ours, *files)

    def run(self, *arguments: str, **rest: Any) -> subprocess.CompletedProcess[str]:
        """Like `subprocess.run` with captured text."""
        program = self.start(*arguments, **rest)
        stdout, stderr = program.communicate()
        return subprocess.CompletedProcess(arguments, program.wait(), stdout, stderr)


class ForkServer(Programs):
    """Starts Python programs by forking a process that has imported torch, transformers and nmbench, or `modules`."""

    def __init__(self, modules: tuple[str, ...] = PRELOADED, env: Mapping[str, str] = os.environ) -> None:
        self.folder = tempfile.mkdtemp()
        super().__init__(f"{self.folder}/socket")
        environment = {**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        path = environment.pop("PYTHONPATH", "")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen(128)
            command = [sys.executable, str(SERVER), str(listener.fileno()), path, *modules]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, env=environment, pass_fds=[listener.fileno()], start_new_session=True
            )

    def close(self) -> None:
        self.process.communicate()
        shutil.rmtree(self.folder)
