"""Engines: processes of this machine and jobs of a cluster, with tasks that stand in for real ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nmbench
from nmbench.spec import RunSpec
from nmbench.workers import local, slurm
from nmbench.workers.local import Local, environment
from nmbench.workers.slurm import Slurm
from nmbench.workers.task import Task
from reference import workers as tasks

SPEC = RunSpec.from_dict({"methods": {"a": {"method": "wanda"}}}, "a test")


def wait(handle) -> None:
    """Wait for the end of a task, and raise what it raised."""
    deadline = time.monotonic() + 120
    while not handle.done():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    handle.result()


def test_a_killed_process_is_replaced(tmp_path, monkeypatch):
    """The engine goes on after a kill -9, with as many threads and cards as before."""
    monkeypatch.setattr(local, "do", tasks.killed_once)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    with Local(2) as engine:
        for _ in range(2):
            wait(engine.submit(Task(SPEC, tmp_path, "a")))
    assert (tmp_path / "a").read_text(encoding="utf-8") == "3 no torch"


def test_variables_of_a_process_are_not_those_of_its_parent(monkeypatch):
    """They are set while a process starts, and then what they were."""
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = dict(os.environ)
    with local.variables({"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "5"}):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("3", "5")
    assert dict(os.environ) == before


def test_a_killed_process_harms_no_other(tmp_path, monkeypatch):
    """Another task at work goes on, and a task waits for a free place."""
    monkeypatch.setattr(local, "do", tasks.by_name)
    with Local(2) as engine:
        long = engine.submit(Task(SPEC, tmp_path, "until killed.begun"))
        killed = engine.submit(Task(SPEC, tmp_path, "killed"))
        assert not engine.free()
        wait(killed)
        assert engine.free() and killed.killed
        wait(long)
        assert not long.killed and (tmp_path / "until killed.begun").exists()


def test_an_interrupted_run_ends_what_is_at_work(tmp_path, monkeypatch):
    """SIGTERM reaches the processes at work; nothing else is begun."""
    monkeypatch.setattr(local, "do", tasks.never_ending)
    engine, began = Local(1), time.monotonic()
    handle = engine.submit(Task(SPEC, tmp_path, "a"))
    while not (tmp_path / "a").exists():
        time.sleep(0.02)
    engine.close(interrupted=True)
    assert handle.done() and time.monotonic() - began < 100


def test_errors_of_a_task_are_raised(tmp_path, monkeypatch):
    """What is no failure of a method reaches the run."""
    monkeypatch.setattr(local, "do", tasks.forbidden)
    with Local(1) as engine, pytest.raises(ValueError, match="a is forbidden"):
        wait(engine.submit(Task(SPEC, tmp_path, "a")))


def test_processes_end_with_a_killed_run(tmp_path):
    """A run that is killed leaves no process behind; each had its GPU before it imported anything of the program."""
    program = (
        "import os\nfrom pathlib import Path\n"
        "from nmbench.workers import local\nfrom nmbench.workers.task import Task\nfrom nmbench.spec import RunSpec\n"
        "from reference import workers as tasks\n"
        f"if __name__ != '__main__':\n    Path({str(tmp_path / 'gpu')!r}).write_text(os.environ[local.GPUS])\n"
        "if __name__ == '__main__':\n"
        "    local.do, local.cards = tasks.never_ending, lambda: ['5']\n"
        "    spec = RunSpec.from_dict({'methods': {'a': {'method': 'wanda'}}}, 'a test')\n"
        "    engine = local.Local(1)\n"
        f"    engine.submit(Task(spec, Path({str(tmp_path)!r}), 'a')).future.result()\n"
    )
    script = tmp_path / "killed.py"
    script.write_text(program, encoding="utf-8")
    paths = os.pathsep.join(filter(None, [str(Path(tasks.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": paths})
    note, deadline = tmp_path / "a", time.monotonic() + 60
    while not (note.exists() and note.read_text(encoding="utf-8")):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child = int(note.read_text(encoding="utf-8"))
    assert (tmp_path / "gpu").read_text(encoding="utf-8") == "5"
    parent.kill()
    parent.wait()
    while tasks.alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("place", "count", "cards", "threads", "expected"),
    [
        (0, 2, [], "8", {"OMP_NUM_THREADS": "4"}),
        (1, 2, ["0", "1", "2"], "8", {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "1"}),
        (3, 4, ["2", "5"], "2", {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "5"}),
    ],
)
def test_cards_and_threads_are_divided(monkeypatch, place, count, cards, threads, expected):
    """Every process has a card of those that are visible, and its share of the threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert environment(place, count, cards) == expected


@pytest.fixture
def cluster(monkeypatch):
    """The stand-in for a cluster that submitit has, whose jobs see what this process sees."""
    monkeypatch.setattr(slurm, "do", tasks.killed_once)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Slurm({"minutes": 5}, system="local")


def test_a_cluster_does_tasks(tmp_path, cluster):
    """Submitit hands a task over."""
    (tmp_path / "a.begun").touch()
    with cluster as engine:
        wait(engine.submit(Task(SPEC, tmp_path, "a")))
    assert (tmp_path / "a").exists()


@pytest.mark.slow  # submitit waits for the results of a job that was killed
def test_a_killed_job_of_a_cluster_is_no_error(tmp_path, cluster):
    """The run may hand the task over once more."""
    with cluster as engine:
        wait(engine.submit(Task(SPEC, tmp_path, "a")))
    assert not (tmp_path / "a").exists()


def test_an_error_on_the_cluster_is_one_line(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(slurm, "do", tasks.forbidden)
    with pytest.raises(nmbench.NMBenchError, match=r"^a, job \d+ of the cluster: ValueError: a is forbidden$"):
        wait(cluster.submit(Task(SPEC, tmp_path, "a")))


def test_an_unknown_key_of_the_cluster_is_refused():
    with pytest.raises(nmbench.NMBenchError, match=r"\[slurm\] has no queue; it may have partition, account, minutes"):
        Slurm({"queue": "long"})
