"""What several test files share: small real texts, and the command line as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("reference")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with cal.txt, sel.txt and test.txt: pieces of three of the demo's plays, about 20 kB each."""
    from nmbench_plugins.demo import DemoPlays

    folder = tmp_path / "texts"
    folder.mkdir()
    for name, split in (("cal", "calibration"), ("sel", "selection"), ("test", "test")):
        (folder / f"{name}.txt").write_text(next(iter(DemoPlays().texts(split)))[4000:24000], encoding="utf-8")
    return folder


@pytest.fixture
def nmbench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Call the command line in this process, in a folder of its own; returns click's result."""
    from click.testing import CliRunner

    from nmbench.cli import main

    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def small(texts: Path) -> list[str]:
    """Flags of a run that takes a second: a tiny random model on real text."""
    return [
        *(
            "--model",
            "tiny:llama",
            "--calibration",
            f"text:{texts}/cal.txt",
            "--metric",
            f"ppl:text:{texts}/test.txt@64",
        ),
        *("--windows", "4", "--window-tokens", "64", "--pool-tokens", "2048", "--selection-tokens", "1024"),
        *("--set", "maskpro.steps=6", "--set", "maskpro.check_every=3", "--set", "maskpro.checkpoint_every=2"),
        *("--method", "maskpro", "--out", "out"),
    ]


def records_of(directory: Path) -> list[dict[str, Any]]:
    """All records of a run directory, in the order of their lines."""
    return [json.loads(line) for line in (directory / "records.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def records() -> Callable[[Path], list[dict[str, Any]]]:
    return records_of
