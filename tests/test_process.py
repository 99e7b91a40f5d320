"""Laws of the process of the command line: how its threads wait, and what a signal does."""

import signal
import time

import pytest

from nmbench.cli.process import WAITING, wait_without_spinning
from nmbench.experiment.stopping import Stopping, Terminated, listening, stopping


def test_threads_sleep_while_they_wait():
    """Without a choice of the user the OpenMP threads of torch sleep at barriers instead of spinning."""
    environment = {}
    wait_without_spinning(environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("name", WAITING)
def test_the_choice_of_the_user_stays(name):
    """A user who has said how threads wait, by whichever variable, is not overruled."""
    environment = {name: "ACTIVE"}
    wait_without_spinning(environment)
    assert environment == {name: "ACTIVE"}


def test_the_command_line_sets_it_before_torch_is_loaded(python):
    """When a command imports torch, the variable is set already, which torch reads only once."""
    code = """
import os, sys
for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"): os.environ.pop(name, None)
from nmbench.cli import main
main(["methods"], standalone_mode=False)
print(os.environ["OMP_WAIT_POLICY"])
"""
    result = python.run("-c", code)
    assert result.stdout.splitlines()[-1] == "PASSIVE", result.stderr


@pytest.fixture(autouse=True)
def usual_handlers():
    """Handlers of a program that was started in the foreground; one that a script puts behind it ignores Ctrl-C."""
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


def signalled(*signals, asked=False, then=lambda: None):
    """Send signals to this process while the command line listens, after a learner asked; returns what was raised."""
    try:
        with listening():
            if asked:
                assert not stopping.due()
            for which in signals:
                signal.raise_signal(which)
            then()
    except KeyboardInterrupt as error:
        return type(error)
    return None


@pytest.mark.parametrize(("which", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_ends_at_once_what_keeps_no_checkpoints(which, error):
    """Ctrl-C and SIGTERM are raised where they arrive, and the usual handlers come back after the command."""
    before = signal.getsignal(which)
    assert signalled(which) is error
    assert signal.getsignal(which) is before


def test_a_signal_waits_for_the_checkpoint_of_a_learner():
    """A learner that asks after every step hears of the signal there, and ends when its checkpoint is stored."""
    heard = []
    assert signalled(signal.SIGTERM, asked=True, then=lambda: heard.append(stopping.due())) is None
    assert heard == [True]
    assert signalled(signal.SIGTERM, asked=True, then=stopping.end) is Terminated


def test_a_second_signal_does_not_wait():
    """Whoever presses Ctrl-C again does not want to wait for a checkpoint."""
    assert signalled(signal.SIGINT, signal.SIGINT, asked=True) is KeyboardInterrupt


def test_a_learner_that_takes_too_long_is_ended(monkeypatch):
    """A step that lasts longer than a cluster waits is cut off, with the last checkpoint in force."""
    monkeypatch.setattr("nmbench.experiment.stopping.GRACE_SECONDS", 0.05)
    assert signalled(signal.SIGTERM, asked=True, then=lambda: time.sleep(30)) is Terminated


def test_a_learner_that_has_ended_is_not_waited_for():
    """After the learning a signal ends the run at once again."""
    own = Stopping()
    own.due()
    own.leave()
    with pytest.raises(Terminated):
        own.on_signal(signal.SIGTERM, None)
