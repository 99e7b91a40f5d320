"""Processes that torchrun starts: one run, the digits of one process, and an end in one line that is resumed."""

from __future__ import annotations

import json

import pytest

from reference.ranks import started

RUN = (
    *("--set", "maskpro.select=false", "--set", "maskpro.prior=0.5", "--set", "maskpro.init=wanda"),
    *("--method", "wanda", "--method", "soft", "--set", "soft.init=wanda", "--set", "soft.learning_rate=0.1"),
    *("--set", "soft.tokens=1024", "--method", "distil", "--set", "distil.init=wanda", "--set", "distil.tokens=1024"),
    *("--method", "sparsegpt", "--method", "sparsegpt-repair", "--set", "sparsegpt-repair.init=wanda"),
    *("--method", "magnitude"),
)
SAME = ("label", "status", "cost", "job_digest", "started_from")
SIGNALLED = """
import os, signal
import nmbench

@nmbench.hookimpl
def nmbench_progress(event):
    if os.environ.get("RANK") in "{ranks}" and (event.stage, event.done) == ("learn", 5):
        os.kill(os.getpid(), signal.{signal})
"""
BROKEN = """
import os
from dataclasses import dataclass
import nmbench

@dataclass(frozen=True)
class Broken(nmbench.MaskLearner):
    "Fails on one rank."
    data_parallel = True

    def learn(self, task):
        if task.ranks.rank:
            raise ValueError("no luck")
        return task.initial

@nmbench.hookimpl
def nmbench_register_mask_learners(register):
    register("broken", Broken)
"""


DYING = """
import os, signal
from dataclasses import dataclass
import nmbench

@dataclass(frozen=True)
class Broken(nmbench.Solver):
    "Fails where rank 1 makes the layer."
    needs = nmbench.Stat.INPUT_NORM

    def solve(self, weight, stats, pattern):
        if os.environ.get("RANK") == "1":
            raise ValueError("no luck")
        return nmbench.Pruned(pattern.top(weight.abs()))

@nmbench.hookimpl
def nmbench_register_baselines(register):
    register("broken", Broken)

@nmbench.hookimpl
def nmbench_progress(event):
    if os.environ.get("RANK") == "1" and event.job.startswith("sparsegpt") and event.stage == "prune":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def rows(directory) -> dict[str, dict]:
    lines = (directory / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["label"]: record for record in map(json.loads, lines)}


def ended(programs) -> list[tuple[int, str, str]]:
    """Exit status and output of every program."""
    return [(program.wait(), *program.communicate()) for program in programs]


def in_other(flags) -> list[str]:
    return ["other" if flag == "out" else flag for flag in flags]


def test_two_ranks_are_one_run(nmbench, finished, small, python, tmp_path):
    """The decisions of a learner by losses, and all costs, are those of one process; rank 0 alone prints and writes."""
    finished(*small, *RUN)
    command = ("-m", "nmbench.cli", "run", *in_other(small), *RUN)
    (status, table, said), (other, *silent) = ended(started(python, 2, tmp_path, *command))
    assert (status, other, silent) == (0, 0, ["", ""]), said
    assert "other: records.jsonl" in table and "Warning" not in said
    alone, together = rows(tmp_path / "out"), rows(tmp_path / "other")
    assert [[row[name] for name in SAME] for row in together.values()] == [
        [row[name] for name in SAME] for row in alone.values()
    ]
    for label in ("wanda", "maskpro"):
        assert together[label]["measured_digest"] == alone[label]["measured_digest"]
    assert together["sparsegpt"]["proof"]["masks_digest"] == alone["sparsegpt"]["proof"]["masks_digest"]
    assert together["maskpro"]["measured_digest"] != together["wanda"]["measured_digest"]
    assert {row["ranks"] for row in alone.values()} == {1}
    assert {label for label, row in together.items() if row["ranks"] == 1} == {"dense", "magnitude"}
    assert {row["ranks"] for row in together.values()} == {1, 2}


@pytest.mark.parametrize(
    ("signal", "ranks", "statuses", "line"),
    [
        ("SIGKILL", "1", (1, -9), "Error: rank 1 ended; the same command goes on"),
        ("SIGTERM", "01", (143, 1), "Terminated; nothing finished is lost. The same command goes on"),
    ],
    ids=["killed", "terminated"],
)
def test_a_run_that_ends_early_is_resumed(nmbench, finished, small, python, tmp_path, signal, ranks, statuses, line):
    """A rank dies, or all are asked to end: one line, and one process goes on from the checkpoint to the same masks."""
    finished(*small, *RUN[:6])
    (tmp_path / "ending.py").write_text(SIGNALLED.format(signal=signal, ranks=ranks), encoding="utf-8")
    flags = [*in_other(small), *RUN[:6], "--plugin", "ending.py"]
    (status, _, said), (other, *silent) = ended(
        started(python, 2, tmp_path, "-m", "nmbench.cli", "run", *flags, "--quiet")
    )
    assert (status, other, silent) == (*statuses, ["", ""])
    errors = [text for text in said.splitlines() if text and not text.startswith("DOUBT")]
    assert len(errors) == 1 and errors[0].startswith(line)
    assert (tmp_path / "other" / "checkpoints" / "maskpro--2-4--seed0.safetensors").exists()
    assert nmbench("run", *flags).exit_code == 0
    found, wanted = rows(tmp_path / "other")["maskpro"], rows(tmp_path / "out")["maskpro"]
    assert (found["measured_digest"], found["cost"]) == (wanted["measured_digest"], wanted["cost"])


def test_a_rank_that_fails_alone_ends_the_run(small, python, tmp_path):
    """A learner that fails on one rank makes no failed row: one line names rank and error."""
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    flags = [*small[: small.index("--set")], "--out", "out", "--plugin", "broken.py", "--method", "broken", "--quiet"]
    (status, _, said), (other, *silent) = ended(started(python, 2, tmp_path, "-m", "nmbench.cli", "run", *flags))
    assert (status, other, silent) == (1, 1, ["", ""])
    assert said.splitlines()[-1] == "Error: rank 1 failed alone: ValueError: no luck"
    assert set(rows(tmp_path / "out")) == {"dense", "broken@init"}


def test_a_walk_with_a_broken_solver_and_a_dying_rank(small, python, tmp_path):
    """A solver that fails on one rank makes a failed row, and all go on; a rank that dies in a walk ends the run."""
    (tmp_path / "dying.py").write_text(DYING, encoding="utf-8")
    flags = [*small[: small.index("--set")], "--out", "out", "--plugin", "dying.py", "--quiet"]
    flags += ["--method", "broken", "--method", "sparsegpt"]
    (status, _, said), (other, *silent) = ended(started(python, 2, tmp_path, "-m", "nmbench.cli", "run", *flags))
    assert (status, other, silent) == (1, -9, ["", ""])
    assert said.splitlines()[-1].startswith("Error: rank 1 ended; the same command goes on")
    found = rows(tmp_path / "out")
    assert set(found) == {"dense", "broken"}
    assert found["broken"]["error"].startswith("rank 1: broken failed in model.layers.0.")
    assert found["broken"]["error"].endswith("ValueError: no luck")


def test_what_ranks_cannot_do_is_one_line(nmbench, small, monkeypatch, tmp_path):
    """Other processes for the rows, several runs, a command for one process."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {"TORCHELASTIC_RUN_ID": "test", **place}.items():
        monkeypatch.setenv(name, value)
    jobs = nmbench("run", *small, "--jobs", "local:2")
    assert jobs.exit_code == 1 and "--jobs gives other processes the rows; leave that out" in jobs.output
    assert "--dry-run does nothing" in nmbench("run", *small, "--dry-run").output
    assert "start `nmbench methods` without it" in nmbench("methods").output
    (tmp_path / "two.toml").write_text('models = ["tiny:llama", "tiny:gpt2"]\n', encoding="utf-8")
    two = nmbench("run", "--config", "two.toml", "--method", "wanda")
    assert two.exit_code == 1 and "2 runs, and torchrun does one" in two.output
