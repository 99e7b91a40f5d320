"""A program that the fork server starts behaves as one that Python starts anew."""

import os
import signal
import subprocess
import sys
import sysconfig

import pytest

from reference.processes import ForkServer

SURROUNDINGS = """
import json, os, signal, sys
print(json.dumps([__name__, sys.argv, sys.path, os.getcwd(), dict(os.environ), sys.stdin.read()]))
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, file=sys.stderr)
"""
ENDINGS = {
    "end": "print('the end')",
    "number": "raise SystemExit(3)",
    "text": "raise SystemExit('a reason')",
    "exit at once": "import os; print('lost'); os._exit(5)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()",
    "at exit": "import atexit; atexit.register(print, 'first'); atexit.register(print, 'second'); raise SystemExit(2)",
}


def cold(*arguments, **rest):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=listening, **rest)


def listening():
    """Let Ctrl-C through, also where the tests themselves run in the background, deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def same(one, other):
    assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_ends_are_the_same(python, ending):
    """Exit status and output are those of a cold start."""
    same(python.run("-c", ending), cold("-c", ending, stdin=subprocess.DEVNULL))


def test_surroundings_are_the_same(python, tmp_path):
    """Arguments, import path, working directory, environment and signals are those of a cold start, for a module of the
    working directory as well.
    """
    (tmp_path / "there").mkdir()
    (tmp_path / "program.py").write_text(SURROUNDINGS)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "there"), "here"]), "MINE": "1"}
    for program in (["-c", SURROUNDINGS, "a", "b c"], ["-m", "program", "--flag"]):
        same(
            python.run(*program, cwd=tmp_path, env=env),
            cold(*program, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL),
        )


def test_the_path_of_the_tests_is_not_that_of_programs(tmp_path):
    """What PYTHONPATH has for the tests and Python finds by itself as well is on the import path of every program."""
    program = ["-c", "import sys; print(sys.path)"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    both = sysconfig.get_path("purelib")
    server = ForkServer(modules=(), env={**env, "PYTHONPATH": both})
    try:
        for other in ({}, {"PYTHONPATH": str(tmp_path)}, {"PYTHONPATH": both}):
            given = {**env, **other}
            same(server.run(*program, cwd=tmp_path, env=given), cold(*program, cwd=tmp_path, env=given))
    finally:
        server.close()


def test_errors_are_told(python):
    """An error that nobody handles is told with its traceback, and is exit status 1."""
    done = python.run("-c", "1 / 0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == cold("-c", "1 / 0").stderr.splitlines()[-1]


def test_programs_do_not_meet(python):
    """What one program imports or changes is unknown to the next; torch was imported before both, and runs."""
    program = "import torch, nmbench.run as run; print(hasattr(run, 'mine'), float(torch.ones(9).dot(torch.ones(9))))"
    for _ in range(2):
        done = python.run("-c", f"{program}; run.mine = 1")
        assert done.stdout == "False 9.0\n", done.stderr


def test_a_running_program_is_signalled(python, tmp_path):
    """A signal reaches a program that runs, and no other one."""
    program = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    one, other = (python.start("-c", program, str(tmp_path / name)) for name in "ab")
    for running, name in ((one, "a"), (other, "b")):
        running.wait_for(tmp_path / name)
    one.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in one.communicate()[1]
    assert other.poll() is None
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert other.returncode == -signal.SIGKILL
