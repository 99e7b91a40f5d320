"""The order of jobs that several processes do: every job after its start, every record kept in the order of the run."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmbench
from nmbench.experiment.contenders import Contender
from nmbench.experiment.jobs import Job
from nmbench.results.directory import RunDirectory
from nmbench.results.files import write_tensors
from nmbench.spec import RunSpec
from nmbench.workers import schedule
from nmbench.workers.asked import Workers, workers_of
from nmbench.workers.engine import Engine
from nmbench.workers.schedule import TRIES, rows_by
from nmbench.workers.script import stages
from nmbench_plugins.wanda import Wanda

PATTERN = nmbench.Pattern(2, 4)
SPEC = RunSpec.from_dict({"methods": {"a": {"method": "wanda"}}}, "a test")
PLUGINS = SimpleNamespace(announce=lambda *_, **__: None)


class Start(nmbench.MaskLearner):
    """A method that has a start."""


def job(label: str, start: str | None = None, work: str | None = None) -> Job:
    """A job of a label; `work` defaults to the label."""
    init = Contender(start, "wanda", Wanda(), {}) if start else None
    contender = Contender(label, "wanda", Start() if start else Wanda(), {}, init)
    return Job(contender, PATTERN, 0, digest=label, work=work or label)


def record(name: str) -> dict:
    """The little of a record that the schedule reads."""
    label = name.partition("--")[0]
    row = {"label": label, "pattern": "2:4", "seed": 0, "job_digest": label, "status": "ok", "strict": None}
    return {**row, "format": 2, "notes": {}, "metrics": {}, "seconds": {}, "cost": {}}


def with_losses(directory: RunDirectory, *labels: str) -> None:
    """Write the files without which a row is not finished."""
    for label in labels:
        write_tensors(directory.file("losses", job(label).name, ".safetensors"), {"losses": torch.zeros(1)}, {})


@dataclasses.dataclass
class Instant(Engine):
    """An engine that does tasks at once, in this process; names in `killed` leave nothing the first times."""

    directory: RunDirectory
    killed: dict[str, int] = dataclasses.field(default_factory=dict)
    log: list = dataclasses.field(default_factory=list)
    pause: float = 0.0

    def submit(self, task):
        self.log.append(task)
        self.killed[task.name] = self.killed.get(task.name, 0) - 1
        if self.killed[task.name] < 0:
            self.directory.leave(record(task.name), task.name)
        return SimpleNamespace(done=lambda: True, result=lambda: None)


def done_by(engine: Engine, jobs, monkeypatch) -> list:
    monkeypatch.setattr(Workers, "engine", lambda self: engine)
    monkeypatch.setattr(schedule, "give_back", lambda: None)
    return rows_by(Workers("local"), SPEC, jobs, engine.directory, PLUGINS)


@st.composite
def runs(draw) -> list[Job]:
    """Jobs of up to seven labels, each with a start among the labels before it or none; some do the same work."""
    found = []
    for number in range(draw(st.integers(1, 7))):
        start = draw(st.sampled_from([None, *(other.label for other in found)]))
        work = draw(st.sampled_from([None, *(other.work for other in found if not other.start)]))
        found.append(job(f"job{number}", start, None if start else work))
    return found


@settings(max_examples=40)
@given(runs(), st.data())
def test_every_job_is_done_once_and_after_what_it_needs(tmp_path_factory, jobs, data):
    """Starts and rows of the same work come first, whatever is killed; records are in the order of the run."""
    killed = {j.name: data.draw(st.integers(0, TRIES - 1)) for j in jobs}
    with pytest.MonkeyPatch.context() as patch, RunDirectory(tmp_path_factory.mktemp("run")) as directory:
        engine = Instant(directory, dict(killed))
        rows = done_by(engine, jobs, patch)
        assert [row["label"] for row in rows] == [j.label for j in jobs]
        assert [row["label"] for row in directory.records()] == [j.label for j in jobs]
    assert not (directory.path / "left").exists()
    last = {task.name: number for number, task in enumerate(engine.log)}
    for each in jobs:
        assert sum(task.name == each.name for task in engine.log) == killed[each.name] + 1
        first = next(number for number, task in enumerate(engine.log) if task.name == each.name)
        if each.start:
            assert last[each.files_of(each.start)] < first
        twins = [j for j in jobs if j.work == each.work]
        assert (engine.log[last[each.name]].twin is None) == (each is twins[0])


def test_a_job_that_kills_its_process_ends_the_run(tmp_path, monkeypatch):
    """Three dead processes are enough; the error names the job, and what is done stays."""
    with RunDirectory(tmp_path) as directory:
        engine = Instant(directory, {job("b").name: 10})
        with pytest.raises(nmbench.NMBenchError, match="b--2-4--seed0: its process was killed 3 times"):
            done_by(engine, [job("a"), job("b")], monkeypatch)
        assert [row["label"] for row in directory.records()] == ["a"]


def test_records_that_a_killed_run_left_are_taken_up(tmp_path, monkeypatch):
    """A job that ended after the run was killed is not done again."""
    with RunDirectory(tmp_path) as directory:
        directory.leave(record("a"), job("a").name)
        with_losses(directory, "a")
        engine = Instant(directory)
        rows = done_by(engine, [job("a"), job("b", start="a")], monkeypatch)
    assert [task.name for task in engine.log] == [job("b").name]
    assert [row["label"] for row in rows] == ["a", "b"]


def test_failures_that_a_killed_run_left_are_tried_again(tmp_path, monkeypatch):
    """A row that failed is done once more by the same command, as in a run of one process."""
    with RunDirectory(tmp_path) as directory:
        directory.leave({**record("a"), "status": "failed"}, job("a").name)
        engine = Instant(directory)
        (row,) = done_by(engine, [job("a")], monkeypatch)
    assert len(engine.log) == 1 and row["status"] == "ok"


def test_rows_of_earlier_runs_are_not_copied(tmp_path, monkeypatch):
    """A row under another label is made anew, because the code may have changed since."""
    with RunDirectory(tmp_path) as directory:
        done_by(Instant(directory), [job("a")], monkeypatch)
        with_losses(directory, "a")
        engine = Instant(directory)
        done_by(engine, [job("a"), job("b", work="a")], monkeypatch)
    assert [(task.name, task.twin) for task in engine.log] == [(job("b").name, None)]


@given(st.dictionaries(st.integers(0, 9), st.sets(st.integers(0, 9))))
def test_stages(needs):
    """Every name is in one stage, later than all that it needs."""
    wanted = {str(name): {str(n) for n in others if n in needs and n < name} for name, others in needs.items()}
    found = stages(wanted)
    at = {name: number for number, stage in enumerate(found) for name in stage}
    assert sorted(at) == sorted(wanted) and sum(map(len, found)) == len(wanted)
    assert all(at[other] < at[name] for name, others in wanted.items() for other in others)


@pytest.mark.parametrize("text", ["local", "local:0", "local:-1", "local:two", "slurm:3", "4", ""])
def test_other_workers_are_refused(text):
    with pytest.raises(nmbench.NMBenchError, match="expected local:K"):
        workers_of(text, {}, quiet=True)
