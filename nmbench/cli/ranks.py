"""A command that torchrun has started several times: rank 0 speaks, the others take part in its rows."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nmbench.errors import FailedAlone, NMBenchError, RankLost

if TYPE_CHECKING:
    from nmbench.runtime.ranks import Launch
    from nmbench.spec import RunSpec

COMMAND = "run"  # that several ranks can do together
GRACE_SECONDS = 5.0  # for rank 0 to end by the error that ends this rank


def launched() -> Launch | None:
    """Return the place of this process among those of torchrun; None without, for which torch is not imported."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    from nmbench.runtime.ranks import Launch

    return Launch.of()


def follows() -> bool:
    """Return True for a process of torchrun that is not rank 0."""
    launch = launched()
    return launch is not None and launch.rank > 0


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Print nothing while the context is open if this process follows rank 0, and leave Ctrl-C and SIGTERM to that."""
    if not follows():
        yield
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with (
        open(os.devnull, "w", encoding="utf-8") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        yield


def check_command(name: str | None) -> None:
    """Raise `NMBenchError` if torchrun started a command that is for one process."""
    if name != COMMAND and launched() is not None:
        raise NMBenchError(f"torchrun is for `nmbench {COMMAND}`; start `nmbench {name}` without it.")


def check_flags(runs: int, jobs: str | None, dry_run: bool) -> None:
    """Raise `NMBenchError` for what several ranks cannot do."""
    impossible = {
        "--jobs gives other processes the rows": jobs is not None,
        "--dry-run does nothing": dry_run,
        f"the command has {runs} runs, and torchrun does one": runs > 1,
    }
    for what, given in impossible.items():
        if given:
            raise NMBenchError(f"{what}; leave that out, or start the command without torchrun.")


@contextlib.contextmanager
def joining(launch: Launch | None, spec: RunSpec) -> Iterator[bool]:
    """Join the ranks of `launch`; yield whether this process does the run: if it is rank 0, or the only one.

    Any other rank has taken part in it by then.
    """
    if launch is None:
        yield True
        return
    from nmbench.runtime.ranks import joined

    with contextlib.ExitStack() as stack:
        try:
            ranks = stack.enter_context(joined(launch, spec.device))
        except RankLost:
            raise
        except NMBenchError as error:
            if launch.rank:
                say_unless_ended(f"rank {launch.rank}: {error}")
            raise
        if not ranks.leads:
            take_part(spec)
        yield ranks.leads


def take_part(spec: RunSpec) -> None:
    """Make rows with rank 0 until they are done. What fails here alone is said on standard error."""
    from nmbench.cli.shared import loaded
    from nmbench.experiment.contenders import with_typed_options
    from nmbench.runtime.ranks import joined_ranks
    from nmbench.workers.ranks import help_out

    try:
        plugins = loaded(spec.plugins)
        help_out(with_typed_options(spec, plugins), plugins)
    except FailedAlone as error:
        say(str(error))
        raise
    except RankLost:  # of which rank 0 speaks, if it is there
        raise
    except Exception as error:
        if not joined_ranks().watch.outlasted(GRACE_SECONDS):  # else rank 0 has ended by the same error, and said it
            say(f"rank {joined_ranks().rank}: {error}")
        raise


def say_unless_ended(text: str) -> None:
    """Say an error of a process that has not joined, unless torchrun ends it soon: rank 0 has then said the same."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE_SECONDS)
    say(text)


def say(text: str) -> None:
    """Write an error to standard error, though this process is silent."""
    if sys.__stderr__:
        print(f"Error: {text}", file=sys.__stderr__, flush=True)
