"""Failures in the middle of a run: nothing else is lost, and the same command goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

PLUGIN = '''
import nmbench


class Broken(nmbench.Scorer):
    def score(self, weight, stats):
        raise ValueError("no score today")


class Lossy(nmbench.Solver):
    """Masks that are not strict: it fails in the proof."""

    def solve(self, weight, stats, pattern):
        return nmbench.Pruned(weight == weight)


@nmbench.hookimpl
def nmbench_register_baselines(register):
    register("broken", Broken)
    register("lossy", Lossy)
'''
ORDER = ["--method", "lossy", "--method", "broken", "--method", "wanda"]
STARTED = ["--method", "least-squares", "--set", "least-squares.init=broken"]


@pytest.fixture
def flags(small, tmp_path):
    """Flags of a run with methods that fail, instead of the learner of `small`."""
    (tmp_path / "failing.py").write_text(PLUGIN)
    return [*small[: small.index("--set")], "--out", "out", "--plugin", "failing.py"]


def test_a_failure_costs_its_own_row_only(nmbench, flags, records, tmp_path):
    """Failures in the method, in the proof and in the start of a later row are rows; all other rows are there."""
    result = nmbench("run", *flags, *ORDER, *STARTED)
    assert result.exit_code == 1
    found = {row["label"]: row["status"] for row in records(tmp_path / "out")}
    assert found == {"dense": "ok", "lossy": "failed", "broken": "failed", "wanda": "ok", "least-squares": "failed"}


def test_fail_fast(nmbench, flags, records, tmp_path):
    """With --fail-fast the first failure ends the run; without it the same command does the rest."""
    result = nmbench("run", *flags, *ORDER, "--fail-fast")
    assert result.exit_code == 1
    assert [row["label"] for row in records(tmp_path / "out")] == ["dense", "lossy"]
    assert "Ended at the first failure (--fail-fast)" in result.stderr
    nmbench("run", *flags, *ORDER)
    assert [row["label"] for row in records(tmp_path / "out")][-1] == "wanda"


def test_a_model_that_cannot_be_loaded_again_costs_no_record(nmbench, flags, records, tmp_path, monkeypatch):
    """A method that breaks the model has its record before the model is loaded again, even if that fails."""
    from nmbench.errors import ModelChanged
    from nmbench.experiment.setup import Experiment

    def refuse(experiment, who):
        raise ModelChanged(f"gone after {who}")

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "renew", refuse)
        patch.setattr(Experiment, "is_intact", lambda experiment, restore=True: not restore)
        result = nmbench("run", *flags, *ORDER)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "Error: gone after lossy 2:4 seed 0")
    assert nmbench("run", *flags, *ORDER).exit_code == 1
    assert [row["label"] for row in records(tmp_path / "out")] == ["dense", "lossy", "broken", "wanda"]


def test_a_damaged_mask_is_made_again(nmbench, flags, records, tmp_path):
    """A flipped bit in a mask file is found when the command is given again: the row is made again, the same."""
    command = [*flags, "--method", "wanda"]
    assert nmbench("run", *command).exit_code == 0
    path = tmp_path / "out/masks/wanda--2-4--seed0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    result = nmbench("run", *command)
    assert result.exit_code == 0
    assert "NOTICE cannot read out/masks/wanda--2-4--seed0.safetensors: it is damaged." in result.stderr
    assert path.read_bytes() == whole
    assert [row["label"] for row in records(tmp_path / "out")] == ["dense", "wanda", "wanda"]


def test_a_full_disk_at_every_file(nmbench, flags, records, tmp_path, monkeypatch):
    """A disk that fills up at the k-th file gives one line; with space again, the command goes on to the same rows."""
    command, real, ended = [*flags, "--method", "wanda"], os.replace, []
    for allowed in range(1, 20, 4):
        count = [0]

        def replace(source, target, allowed=allowed, count=count):
            count[0] += 1
            if count[0] > allowed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            result = nmbench("run", *command)
        ended.append(result.exit_code)
        if result.exit_code:
            assert result.exit_code == 1, result.output
            assert result.stderr.splitlines()[-1].startswith("Error: cannot write "), result.stderr
            assert "No space left on device" in result.stderr
    assert ended[0] == 1 and ended[-1] == 0
    assert [row["label"] for row in records(tmp_path / "out")] == ["dense", "wanda"]
    assert not [path for path in Path(tmp_path / "out").rglob(".*.*") if path.name != ".lock"]


def test_a_report_that_cannot_be_written(nmbench, flags, tmp_path):
    """A report whose file is in the way is one line, and every record is kept."""
    (tmp_path / "out/report.csv").mkdir(parents=True)
    result = nmbench("run", *flags, "--method", "wanda")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(
        "Error: cannot write a report to out: Is a directory. Every record"
    )


def test_dry_run(nmbench, flags, tmp_path):
    """Before, in the middle and at the end: rows, what is done, and seconds by rows of the same directory."""
    command = [*flags, "--method", "wanda", "--seed", "0"]
    before = nmbench("run", *command, "--dry-run")
    assert before.exit_code == 0, before.output
    assert [line.split()[0] for line in before.stdout.splitlines()[1:3]] == ["dense", "wanda"]
    assert "2 of 2 rows are to do: time not known." in before.stdout
    assert not (tmp_path / "out").exists()

    assert nmbench("run", *command).exit_code == 0
    assert "All 2 rows are done." in nmbench("run", *command, "--dry-run").stdout
    more = nmbench("run", *command, "--seed", "1", "--method", "magnitude", "--dry-run").stdout
    lines = {" ".join(line.split()[:4]): line.split()[4:] for line in more.splitlines()[2:6]}
    assert lines["wanda 2:4 seed 0"][0] == "done"
    assert lines["wanda 2:4 seed 1"][:2] == ["to", "do"] and lines["wanda 2:4 seed 1"][2] != "-"
    assert "and 2 of unknown time" in more
    assert (tmp_path / "out/records.jsonl").read_text().count("\n") == 2  # nothing was done


def test_dry_run_refuses_what_the_run_would(nmbench, flags):
    """A setting that the run directory does not have is refused, as the run would."""
    assert nmbench("run", *flags, "--method", "wanda").exit_code == 0
    result = nmbench("run", *flags, "--method", "wanda", "--windows", "3", "--dry-run")
    assert result.exit_code == 1
    assert result.stderr == "Error: out holds another run: windows was 4, now 3. Give another --out.\n"
