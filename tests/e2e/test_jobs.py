"""Rows that other processes make, through the command line: the same digits, the same table."""

from __future__ import annotations

import re
import shlex

import pytest

FORKING = """
import multiprocessing, sys
from nmbench.cli import main

def forked(method, of=multiprocessing.get_context):
    assert method == "spawn"
    return of("fork")

multiprocessing.get_context = forked
main(sys.argv[1:])
"""
METHODS = ("--method", "wanda", "--method", "again=wanda", "--set", "maskpro.init=wanda")
SAME = ("label", "pattern", "seed", "status", "metrics", "measured_digest", "cost", "copied_from", "job_digest")


def figures(rows: list[dict]) -> list[dict]:
    """What must not depend on who made a row."""
    return [{name: row.get(name) for name in SAME} for row in rows]


@pytest.mark.parametrize(
    "program", [("-c", FORKING), pytest.param(("-m", "nmbench.cli"), marks=pytest.mark.slow)], ids=["forked", "spawned"]
)
def test_rows_of_other_processes_are_the_same(nmbench, finished, python, small, records, tmp_path, program):
    """Starts, learners and copied rows: figures, digests and order are those of one process."""
    finished(*small, *METHODS)
    elsewhere = [*small, *METHODS, "--jobs", "local:1"]
    elsewhere[elsewhere.index("out")] = "other"
    done = python.run(*program, "run", *elsewhere)
    assert done.returncode == 0, done.stderr
    assert figures(records(tmp_path / "other")) == figures(records(tmp_path / "out"))
    assert not (tmp_path / "other" / "left").exists()
    assert nmbench("run", *elsewhere).exit_code == 0
    assert len(records(tmp_path / "other")) == len(records(tmp_path / "out"))


def test_the_commands_for_a_scheduler(nmbench, finished, small, records, tmp_path):
    """Each printed command does one job; a start comes in an earlier stage; the last command makes the table."""
    finished(*small, *METHODS)
    script = [*small, *METHODS, "--jobs", "script"]
    script[script.index("out")] = "other"
    lines = nmbench("run", *script).output.splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        *("# first", *2 * ["# then, at the same time"], "# at the end, for the table")
    ]
    commands = [shlex.split(line)[1:] for line in lines if not line.startswith("#")]
    too_early = nmbench(*commands[1])
    assert too_early.exit_code == 1 and "the dense row of" in too_early.output
    for command in commands:
        result = nmbench(*command)
        assert result.exit_code == 0, result.output
    assert re.search(r"wanda +2:4", result.output)
    wanted = [{**row, "copied_from": None} for row in figures(records(tmp_path / "out"))]
    assert [{**row, "copied_from": None} for row in figures(records(tmp_path / "other"))] == wanted


def test_commands_of_two_runs_join(nmbench, small, tmp_path):
    """A second method printed for the same directory does not take the first one's commands away."""
    for method in ("magnitude", "wanda"):
        assert nmbench("run", *small, "--method", method, "--jobs", "script").exit_code == 0
    assert nmbench("run", *small, "--method", "ria", "--dry-run").exit_code == 0
    for job in ("dense", "magnitude--2-4--seed0", "wanda--2-4--seed0"):
        result = nmbench("work", "out", job, "--quiet")
        assert result.exit_code == 0, result.output
    assert {"magnitude", "wanda"} <= set(nmbench("report", "out").stdout.split())


def test_bad_jobs_are_one_line(nmbench, small, tmp_path):
    """An unknown form, a directory that the commands cannot name, a job that does not exist."""
    assert "expected local:K" in nmbench("run", *small, "--jobs", "many").output
    without = small[: small.index("--out")]
    assert "give --out DIR" in nmbench("run", *without, "--jobs", "script").output
    nmbench("run", *small, "--jobs", "script")
    assert nmbench("work", "out", "dense", "--quiet").exit_code == 0
    unknown = nmbench("work", "out", "none")
    assert unknown.exit_code == 1 and "has no job 'none'; it has maskpro@init--2-4--seed0" in unknown.output
    early = nmbench("work", "out", "maskpro--2-4--seed0")
    assert early.exit_code == 1 and "has no row yet; do that job first" in early.output
