"""Kills at file operations and at random moments: the short version of `benchmarks/kill_test.py`, and its reports."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_test.py"


@pytest.fixture
def kill_test(monkeypatch):
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("kill_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kill_test", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_kills_change_nothing(kill_test, tmp_path):
    """Killed at every fifth point around a file operation, or at any moment, a run ends with the same files."""
    args = kill_test.parser().parse_args(["--model", "tiny:llama", "--every", "5", "--random", "3"])
    result = kill_test.harness(args, tmp_path)
    assert result["differences"] == []
    assert result["complete"] and result["kills"] >= result["points"] // 5


@pytest.fixture
def harness(kill_test, tmp_path, monkeypatch):
    """The harness with made-up runs of four points in the place of processes; `spoil` may change a resumed run."""

    def harness(*flags, spoil=lambda out, kill: None):
        killed = set()

        def run(self, out, kill=None):
            path = self.folder / out
            for kind in ("masks", "losses"):
                (path / kind).mkdir(parents=True, exist_ok=True)
            (path / "records.jsonl").write_text('{"seconds": 1}\n')
            if kill is not None:
                killed.add(out)
                (self.folder / f"{out}.phase").write_text(f"before fsync of {kill.point % 2}".ljust(200))
                return -9, ""
            spoil(path, out in killed)
            return 0, "points 4"

        monkeypatch.setattr(kill_test.Harness, "run", run)
        path = tmp_path / "figures.json"
        args = kill_test.parser().parse_args([*flags, "--random", "1", "--json", str(path)])
        found = kill_test.harness(args, tmp_path)
        assert json.loads(path.read_text()) == json.loads(json.dumps(found))
        return found, kill_test.table(found)

    return harness


def test_kills_are_counted_by_phase(harness):
    """Kills by what the run did, and no difference, whatever the number of workers."""
    found, text = harness("--workers", "3")
    assert (found["kills"], found["differences"], found["complete"]) == (5, [], True)
    assert found["at_file_operations"] == {"before fsync of 1": 2, "before fsync of 0": 2}
    assert sum(found["at_random_moments"].values()) == 1
    assert text.endswith("5 kills, 0 differences, 4 points in a run")


def test_a_difference_is_named(harness):
    """A resumed run with another mask is a difference."""

    def spoil(path, resumed):
        if resumed and path.name == "point2":
            (path / "masks" / "wanda").write_text("other")

    assert harness(spoil=spoil)[0]["differences"] == ["point2: masks/wanda"]


def test_an_interrupted_harness_says_what_it_had(harness):
    """Ctrl-C, or the end of the time, leaves the kills so far in the file and in the last line."""

    def interrupt(path, resumed):
        if resumed and path.name == "point3":
            raise KeyboardInterrupt

    found, text = harness(spoil=interrupt)
    assert (found["kills"], found["complete"], len(found["outcomes"])) == (2, False, 2)
    assert text.endswith("ended after 2 of 5 planned kills")
    assert harness("--budget", "0")[1].endswith("ended after 0 of 5 planned kills")
