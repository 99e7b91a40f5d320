"""The GPU of a rank: taken before anything in its process uses CUDA, and proven to be the only one in sight."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nmbench.cli import ranks as command
from nmbench.errors import NMBenchError
from nmbench.runtime import gpus
from nmbench.runtime.ranks import Launch, joined, launch
from nmbench.spec import MethodSpec, RunSpec
from reference.ranks import started

GPUS = "CUDA_VISIBLE_DEVICES"
PLACE = Launch(3, 4, 1, 2)
JOINING = """
# Nothing that may use CUDA can be imported, and nothing of nmbench was imported while it could be; nobody asks torch
# about GPUs. Every rank ends where it would take its GPU.
import contextlib, runpy, sys, torch
heavy = ("transformers", "torchao", "accelerate", "triton", "nmbench_plugins")
for name in [name for name in sys.modules if name.partition(".")[0] in (*heavy, "nmbench", "shapes")]:
    del sys.modules[name]
sys.modules.update(dict.fromkeys(heavy))
for name in ("device_count", "is_available", "init", "_lazy_init", "get_device_capability"):
    setattr(torch.cuda, name, None)

@contextlib.contextmanager
def joined(launch, device):
    print(f"rank {launch.rank} joins by {device}", file=sys.__stdout__, flush=True)
    sys.exit()
    yield

import nmbench.runtime.ranks
nmbench.runtime.ranks.joined = joined
"""
COMMANDS = {
    "run": (
        "runpy.run_module('nmbench.cli', run_name='__main__')",
        *("run", "--method", "wanda", "--plugin", "none.py", "--device", "cuda", "--out", "out"),
    ),
    "benchmark": (
        "sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv.pop(1) + '/ranks.py', {}, '__main__')",
        *(str(Path(__file__).parents[2] / "benchmarks"), "--shape", "tiny", "--worker", "rows.json"),
    ),
}


def never() -> int:
    raise AssertionError("the GPUs are counted")


def uncountable() -> int:
    raise NMBenchError("no answer")


def test_every_rank_has_a_gpu_of_its_own():
    """A rank takes one GPU, of those that are named or counted; too few are refused, and a CPU needs none."""
    environment = {GPUS: "4, 7,-1,9"}
    assert PLACE.take_gpu("auto", environment, never)
    assert environment == {GPUS: "7"}
    assert PLACE.take_gpu("cuda", counted := {}, lambda: 2)
    assert counted == {GPUS: "1"}
    with pytest.raises(NMBenchError, match="started 2 ranks on a host with 1 GPUs; give --nproc-per-node 1"):
        PLACE.take_gpu("cuda", {GPUS: "4"}, never)
    assert not PLACE.take_gpu("cpu", {}, never)


@pytest.mark.parametrize("environment", [{GPUS: ""}, {GPUS: "-1"}, {}])
def test_no_gpu_in_sight_stays_so(environment):
    """With `auto` GPUs that are hidden, or cannot be counted, are none, and the run sees none either."""
    assert not PLACE.take_gpu("auto", environment, uncountable)
    assert environment == {GPUS: ""}


def test_gpus_that_cannot_be_counted_are_an_error_if_asked_for():
    with pytest.raises(NMBenchError, match="no answer"):
        PLACE.take_gpu("cuda", {}, uncountable)


def test_gpus_are_counted_by_another_process(monkeypatch):
    """The number is what a process prints last; a torch for CPUs starts none."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(gpus, "COUNT", "print('a greeting'); print(3)")
    assert gpus.counted() == 3
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert gpus.counted() == 0


@pytest.mark.parametrize(
    ("program", "seconds", "why"),
    [
        ("import sys; sys.exit('no driver')", 60, r"\(no driver\)"),
        ("pass", 60, r"\(no number\)"),
        ("import time; time.sleep(60)", 0.2, r"\(no answer in 0 s\)"),
    ],
)
def test_a_failed_count_is_one_line(program, seconds, why):
    with pytest.raises(NMBenchError, match=f"cannot be counted: .* failed {why}; name them in {GPUS}") as caught:
        gpus.answer(program, seconds)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("count", "used", "line"),
    [
        (2, False, "took GPU 1 by CUDA_VISIBLE_DEVICES too late: .* gives it 2 GPUs .*; join the ranks before"),
        (1, True, "took GPU 1 by CUDA_VISIBLE_DEVICES too late"),
        (0, False, "took GPU 1 by CUDA_VISIBLE_DEVICES, and CUDA finds no such GPU; compare it with `nvidia-smi -L`"),
    ],
)
def test_a_gpu_that_was_not_taken_is_refused(monkeypatch, count, used, line):
    """Ranks do not join unless CUDA gives the process the one GPU that it took."""
    monkeypatch.setenv(GPUS, "0,1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(launch, "seen", lambda: count)
    with pytest.raises(NMBenchError, match=line), joined(PLACE, "cuda"):
        raise AssertionError("joined")
    assert os.environ[GPUS] == "1"


def test_a_gpu_that_was_taken_is_used(monkeypatch):
    monkeypatch.setenv(GPUS, "0,1")
    monkeypatch.setattr(launch, "seen", lambda: 1)
    assert PLACE.has_gpu("cuda")


def test_cuda_itself_is_asked(monkeypatch):
    """The count is not that of torch, which reads the variable itself."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 2, raising=False)
    assert gpus.seen() == 2
    monkeypatch.delattr(torch._C, "_cuda_getDeviceCount")
    assert gpus.seen() == 0


def test_a_rank_that_cannot_join_says_so(monkeypatch, capfd):
    """Rank 0 may wait for it, and know nothing of the reason; it is silent if torchrun ends it in the meantime."""
    waited, handlers = [], []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    monkeypatch.setattr(command.signal, "signal", lambda *given: handlers.append(given))
    monkeypatch.setenv(GPUS, "4")
    spec = RunSpec((MethodSpec("wanda", "wanda", {}),), "demo", device="cuda")
    for rank, said in ((0, ""), (1, "Error: rank 1: torchrun started 2 ranks on a host with 1 GPUs; ")):
        with pytest.raises(NMBenchError, match="with 1 GPUs"), command.joining(Launch(rank, 2, rank, 2), spec):
            raise AssertionError("joined")
        assert capfd.readouterr().err.startswith(said) and len(waited) == rank
    assert handlers == [(command.signal.SIGTERM, command.signal.SIG_DFL)]


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_uses_cuda_before_a_rank_has_its_gpu(python, tmp_path, name):
    """Neither the command line nor the script that times ranks imports transformers, torchao or a plugin earlier."""
    program, *flags = COMMANDS[name]
    programs = started(python, 2, tmp_path, "-c", JOINING + program, *flags)
    for rank, program in enumerate(programs):
        assert (program.wait(), *program.communicate()) == (0, f"rank {rank} joins by cuda\n", "")
