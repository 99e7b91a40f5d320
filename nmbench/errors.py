"""The errors of nmbench. Every message is one line: what, where, expected, remedy."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

PANIC = ("pyo3_runtime", "PanicException")  # a class that no module exports


class NMBenchError(Exception):
    """A problem that the user can fix; the command line prints the message without a traceback and exits with 1."""


class UnknownName(NMBenchError):
    """A method, option, model, data set, metric or reporter that is not registered."""


class NotStrict(NMBenchError):
    """A mask, or a weight under a mask, that is not strictly N:M; the message names the first broken group."""


class NumericalFailure(NMBenchError):
    """NaN, Inf or a matrix that cannot be factorised, where continuing would mean another algorithm."""


class RunMismatch(NMBenchError):
    """A run directory that holds another run; the message shows the difference."""


class ModelChanged(NMBenchError):
    """The dense model is not the one that the run was made with."""


class NotReproduced(NMBenchError):
    """A row made again is not the one that was measured."""


class CannotWrite(NMBenchError):
    """A full or failing disk: the run stops, because no later result could be saved."""


class RankLost(NMBenchError):
    """Processes of torchrun that are no longer in step, because one has ended or failed alone: the run stops."""


class FailedAlone(RankLost):
    """A failure of this process of torchrun, while the others go on."""


class FailedElsewhere(NMBenchError):
    """A failure of another process of torchrun, which ends the job on all of them; they stay in step."""


class PluginError(NMBenchError):
    """A plugin that failed at a named stage; the original exception is the cause."""


def did_you_mean(name: str, known: Iterable[str], question: str = "Did you mean") -> str:
    """Return " Did you mean 'x'?" for the nearest known name, or an empty text."""
    near = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.5)
    return f" {question} {near[0]!r}?" if near else ""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UnknownName:
    """Return the error for an unknown `name` of some `kind`, with the nearest known name and the whole list."""
    known = sorted(known)
    listed = ", ".join(known) or "none"
    return UnknownName(f"unknown {kind} {name!r}{where}.{did_you_mean(name, known)} Known: {listed}")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_panic(error: BaseException) -> bool:
    """Return True for the panic of a library written in Rust, such as tokenizers: it is no `Exception`."""
    return (type(error).__module__, type(error).__name__) == PANIC


def interrupts(error: BaseException) -> bool:
    """Return True for what goes through every guard, as Ctrl-C does: no error, no exit that code calls, no panic."""
    return not isinstance(error, (Exception, SystemExit)) and not is_panic(error)


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Raise `NMBenchError` in place of any error inside the context, panics included; `what` says what failed."""
    try:
        yield
    except NMBenchError:
        raise
    except BaseException as error:
        if interrupts(error):
            raise
        said = " ".join(str(error).split())
        raise NMBenchError(f"{what}: {type(error).__name__}: {said}") from error
