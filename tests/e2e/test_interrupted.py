"""Kill a run at any moment: the same command goes on and ends with the same masks."""

from __future__ import annotations

import signal

import pytest

from nmbench.pruning.learning import COUNTERS
from nmbench.results.directory import RunDirectory
from nmbench.results.files import FileCheckpoints, read_tensors

SLOWLY = ["--set", "maskpro.steps=60", "--set", "maskpro.checkpoint_every=5", "--set", "maskpro.check_every=20"]


LEARNS = """
from pathlib import Path
import nmbench

@nmbench.hookimpl
def nmbench_progress(event):
    if (event.stage, event.done) == ("learn", 3):
        Path("learns").touch()
"""
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("how", STATUS)
def test_a_killed_run_ends_like_one_that_was_not(nmbench, python, finished, small, records, tmp_path, how):
    """Killed, or stopped by Ctrl-C or SIGTERM, while it learns: the resumed run has the same masks and costs."""
    flags = [*small, *SLOWLY]
    process = python.start("-m", "nmbench.cli", "run", *flags)
    process.wait_for(tmp_path / "out/checkpoints/maskpro--2-4--seed0.safetensors")
    process.send_signal(how)
    _, stderr = process.communicate()
    assert process.returncode == STATUS[how]
    if how is not signal.SIGKILL:
        assert "The same command goes on" in stderr
        assert "Traceback" not in stderr
    done = records(tmp_path / "out")
    assert [row["label"] for row in done] == ["dense", "maskpro@init"]

    assert nmbench("run", *flags).exit_code == 0
    finished(*(flag if flag != "out" else "whole" for flag in flags))
    resumed, straight = records(tmp_path / "out"), records(tmp_path / "whole")
    assert resumed[:2] == done
    assert [row["proof"] for row in resumed] == [row["proof"] for row in straight]
    assert [row["metrics"] for row in resumed] == [row["metrics"] for row in straight]
    assert resumed[2]["cost"]["unique_tokens"] == straight[2]["cost"]["unique_tokens"]


def test_sigterm_stores_a_checkpoint(python, small, tmp_path):
    """A learner that is asked to end by SIGTERM stores its last step, however far the next checkpoint is."""
    seldom = ["--set", "maskpro.steps=100000", "--set", "maskpro.checkpoint_every=100000", "--quiet"]
    (tmp_path / "learns.py").write_text(LEARNS, encoding="utf-8")
    seldom += ["--plugin", "learns.py"]
    process = python.start("-m", "nmbench.cli", "run", *small, *seldom, cwd=tmp_path)
    process.wait_for(tmp_path / "learns")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 143, stderr
    assert stderr.splitlines()[-1].startswith("Terminated; nothing finished is lost. The same command goes on")
    checkpoint = tmp_path / "out/checkpoints/maskpro--2-4--seed0.safetensors"
    assert read_tensors(checkpoint)[1]["plain"]["step"] % 100000 > 0


def test_a_torn_last_record_is_done_again(nmbench, finished, small, records, tmp_path):
    """A line that was cut in the middle of writing is dropped, and its job done again with the same result."""
    finished(*small)
    path = tmp_path / "out/records.jsonl"
    content = path.read_bytes()
    whole = records(tmp_path / "out")
    path.write_bytes(content[:-40])
    assert nmbench("run", *small).exit_code == 0
    again = records(tmp_path / "out")
    assert [row["proof"] for row in again] == [row["proof"] for row in whole]
    assert again[:-1] == whole[:-1]


def test_a_checkpoint_is_not_needed_once_its_job_is_done(finished, small, tmp_path):
    """Finished jobs leave no checkpoint behind."""
    finished(*small)
    assert not list((tmp_path / "out").glob("checkpoints/*.safetensors"))


def test_two_runs_cannot_write_to_one_directory(nmbench, small, tmp_path):
    """While one run is at work a second one in the same directory is refused at once."""
    with RunDirectory(tmp_path / "out"):
        result = nmbench("run", *small)
    assert result.exit_code == 1
    assert "another nmbench run is writing to out" in result.stderr


def test_a_checkpoint_of_another_device_is_refused(nmbench, small, monkeypatch):
    """Random numbers differ between devices, so a checkpoint from another one is refused with one line."""

    def save_as_on_a_gpu(store, state, save=FileCheckpoints.save):
        save(store, {**state, COUNTERS: {**state[COUNTERS], "device": "cuda"}})
        raise KeyboardInterrupt

    monkeypatch.setattr(FileCheckpoints, "save", save_as_on_a_gpu)
    assert nmbench("run", *small).exit_code == 130
    result = nmbench("run", *small)
    assert result.exit_code == 1
    assert "go on with --device cuda" in result.stdout
