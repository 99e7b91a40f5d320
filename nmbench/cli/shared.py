"""Code that several commands share: the plugin option, a run with its observers, the width of the terminal, reports."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmbench.errors import CannotWrite, NMBenchError

if TYPE_CHECKING:
    from nmbench.plugins.loading import Plugins
    from nmbench.results.results import Results
    from nmbench.spec import RunSpec
    from nmbench.workers.asked import Workers


plugin_option = click.option(
    "--plugin", "plugin_files", multiple=True, metavar="FILE", help="Load a plugin from FILE.py."
)


def row_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command with the options that choose rows: `--pattern`, `--method` and `--seed`."""
    options = (
        click.option(
            "--pattern", "patterns", multiple=True, metavar="N:M", help="Only rows of this pattern; repeatable."
        ),
        click.option("--method", "labels", multiple=True, metavar="LABEL", help="Only rows of this label; repeatable."),
        click.option(
            "--seed", "seeds", multiple=True, type=click.IntRange(min=0), help="Only rows of this seed; repeatable."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def done(
    spec: RunSpec,
    out: Path | None,
    quiet: bool,
    workers: Workers | None = None,
    fail_fast: bool = False,
    trackers: Sequence[str] = (),
) -> Results:
    """Do a run with progress, unless `quiet`, and doubts on standard error; write its reports; return the results.

    `trackers`: reporters that follow the run.
    """
    from nmbench.experiment.contenders import with_typed_options

    plugins = loaded(spec.plugins)
    follow(plugins, trackers)
    spec = with_typed_options(spec, plugins)  # a misspelt method or option is answered before torch is imported
    from nmbench.run import run

    with observed(plugins, quiet, live=workers is None):
        results = run(spec, out, plugins, workers, fail_fast)
    write_reports(plugins, results, results.directories[0], ("csv", "markdown"))
    return results


@contextlib.contextmanager
def observed(plugins: Plugins, quiet: bool, live: bool = True) -> Iterator[None]:
    """Observe a run: its progress, unless `quiet`, its doubts, and its log.

    `live`: progress is a live view where standard error is a terminal, else lines.
    """
    from nmbench.experiment.progress import DoubtPrinter
    from nmbench.experiment.run_log import log_of

    log = log_of(plugins)
    plugins.add_observer(DoubtPrinter(), "doubts")
    with contextlib.nullcontext() if quiet else progress_shown(plugins, live):
        try:
            yield
        except BaseException as error:
            log.ended(error)
            raise


@contextlib.contextmanager
def progress_shown(plugins: Plugins, live: bool = True) -> Iterator[None]:
    """Show progress on standard error: a live view on a terminal, if `live`, else lines."""
    from nmbench.experiment.live import LiveView, is_live
    from nmbench.experiment.progress import ProgressPrinter

    if not (live and is_live(sys.stderr)):
        plugins.add_observer(ProgressPrinter(), "progress")
        yield
        return
    view = LiveView()
    plugins.add_observer(view, "progress")
    try:
        yield
    finally:
        view.close()


def follow(plugins: Plugins, names: Sequence[str]) -> None:
    """Add the observers of reporters to the plugins of a run. Raises `NMBenchError` for a reporter without one."""
    reporters = {name: plugins.lookup(plugins.registries.reporters, name) for name in names}
    for name, reporter in reporters.items():
        if (observer := reporter().observer()) is None:
            raise NMBenchError(f"reporter {name!r} does not follow a run; write it afterwards, by `nmbench report`.")
        plugins.add_observer(observer, f"track {name}")


def print_table(results: Results) -> None:
    """Print the table of a run, in the width of the terminal; in full, as plain text, to a file or pipe."""
    from nmbench.results.rendering import render, show

    if sys.stdout.isatty():
        show(results, sys.stdout, shutil.get_terminal_size().columns)
    else:
        click.echo(render(results))


def loaded(files: Sequence[str]) -> Plugins:
    """Return all plugins, those of plugin files too; warn of installed ones that a file replaces.

    Raises `NMBenchError` for a file that failed to load.
    """
    from nmbench.plugins.loading import load_plugins

    plugins = load_plugins(files)
    for line in plugins.broken_files:
        raise NMBenchError(f"{line}; mend the file, or leave out --plugin.")
    for line in plugins.replaced:
        click.echo(f"WARNING {line}", err=True)
    return plugins


def write_reports(plugins: Plugins, results: Any, directory: Path, formats: Sequence[str]) -> list[Path]:
    """Write a report in each of `formats`; return the paths. An unknown format raises before any report is written."""
    reporters = [plugins.lookup(plugins.registries.reporters, name) for name in formats]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [reporter().write(results, directory) for reporter in reporters]
    except OSError as error:
        raise CannotWrite(
            f"cannot write a report to {directory}: {error.strerror or error}. Every record is kept; mend that, or "
            f"give another --out, and give the same command again."
        ) from error
