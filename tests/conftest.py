"""What several test files share: small real texts, and the command line as a function."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from nmbench.cli.process import wait_without_spinning

wait_without_spinning()  # before any test imports torch, and in every worker
pytest.register_assert_rewrite("reference")
settings.register_profile("fewer", max_examples=50)  # tox -e slow draws 100
settings.load_profile("fewer")
SERVER: pytest.StashKey[Any] = pytest.StashKey()


def pytest_collection_finish() -> None:
    """Garbage collections pass over what was imported until now, which would double their time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """`os.fsync` returns at once: no test cuts the power, and the files of a run are fsynced a dozen times.

    Tests that files are fsynced, and in which order, put a function of their own in its place.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.fstat(file) and None)
        yield


@pytest.fixture(scope="session", autouse=True)
def packages_are_looked_up_once() -> Iterator[None]:
    """The entry points of installed packages are read once for each import path, and not by every command again."""
    from importlib import metadata

    read = metadata.entry_points

    @functools.cache
    def known(path: tuple[str, ...], **group: str) -> Any:
        return read(**group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "entry_points", lambda **group: known(tuple(sys.path), **group))
        yield


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pieces of two of the demo's plays, cal.txt of 10 kB and test.txt of 2.5 kB; nobody writes to it."""
    from nmbench_plugins.demo import DemoPlays

    folder = tmp_path_factory.mktemp("texts")
    for name, split, length in (("cal", "calibration", 10_000), ("test", "test", 2_500)):
        text = next(iter(DemoPlays().texts(split)))[4000 : 4000 + length]
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """All workers of pytest-xdist share one fork server: another would import torch once more."""
    from reference.processes import ForkServer

    if SERVER not in node.config.stash:
        node.config.stash[SERVER] = ForkServer()
    node.workerinput["fork_server"] = node.config.stash[SERVER].address


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the fork server of the workers."""
    if SERVER in config.stash:
        config.stash[SERVER].close()


@pytest.fixture(scope="session")
def python(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Starts Python programs in processes of their own, which need not import torch again: `Programs`."""
    from reference.processes import ForkServer, Programs

    if address := getattr(request.config, "workerinput", {}).get("fork_server"):
        yield Programs(address)
        return
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def nmbench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Call the command line in this process, in a folder of its own; returns click's result."""
    from click.testing import CliRunner

    from nmbench.cli import main

    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="session")
def small(texts: Path) -> list[str]:
    """Flags of a run that takes a second: a tiny random model on real text."""
    text = ["--calibration", f"text:{texts}/cal.txt", "--metric", f"ppl:text:{texts}/test.txt@64"]
    return [
        *("--model", "tiny:llama", *text),
        *("--windows", "4", "--window-tokens", "64", "--pool-tokens", "2048", "--selection-tokens", "1024"),
        *("--set", "maskpro.steps=6", "--set", "maskpro.check_every=3", "--set", "maskpro.checkpoint_every=2"),
        *("--method", "maskpro", "--out", "out"),
    ]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Do a run unless the same flags were given before; returns click's result and the folder that it was done in."""
    known: dict[tuple[str, ...], tuple[Any, Path]] = {}

    def make(nmbench: Callable[..., Any], flags: tuple[str, ...]) -> tuple[Any, Path]:
        if flags not in known:
            folder = tmp_path_factory.mktemp("made")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                known[flags] = nmbench("run", *flags), folder
        return known[flags]

    return make


@pytest.fixture
def finished(nmbench: Callable[..., Any], made: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Like `nmbench("run", ...)` for a run that must succeed and needs no file of the test, into a new `--out`.

    A run that another test has asked for is not done again: this one gets a copy of its directory, and its output.
    """

    def finish(*args: Any) -> Any:
        flags = tuple(map(str, args))
        result, folder = made(nmbench, flags)
        assert result.exit_code == 0, result.output
        out = flags[flags.index("--out") + 1]
        shutil.copytree(folder / out, tmp_path / out)
        return result

    return finish


def records_of(directory: Path) -> list[dict[str, Any]]:
    """All records of a run directory, in the order of their lines."""
    return [json.loads(line) for line in (directory / "records.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def records() -> Callable[[Path], list[dict[str, Any]]]:
    return records_of
