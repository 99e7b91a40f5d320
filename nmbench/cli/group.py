"""The command group, which turns errors into one line and an exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any

import click

from nmbench.cli.compare import compare
from nmbench.cli.diff import diff
from nmbench.cli.export import export
from nmbench.cli.methods import methods_command
from nmbench.cli.new_plugin import new_plugin_command
from nmbench.cli.plugins import plugins_command
from nmbench.cli.process import wait_without_spinning
from nmbench.cli.ranks import check_command, silent
from nmbench.cli.report import report
from nmbench.cli.reproduce import reproduce
from nmbench.cli.run import run
from nmbench.cli.speed import speed
from nmbench.cli.validate import validate
from nmbench.cli.work import work
from nmbench.errors import NMBenchError, is_panic
from nmbench.experiment.stopping import Terminated, listening

INTERRUPTED, TERMINATED = 130, 143
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG)


class Commands(click.Group):
    """A group that turns errors into one line and an exit status.

    `NMBenchError` and the panic of a library give status 1, Ctrl-C gives 130, SIGTERM 143. Output that cannot be
    written, as on a full disk, is one line and exit status 1 too; a reader that closed the pipe, as `head` does, gets
    no message, by click's own rule.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        wait_without_spinning()
        try:
            with silent(), listening():
                return super().main(*args, **kwargs)
        except OSError as error:
            if error.filename is not None or error.errno not in NOT_WRITTEN:
                raise
            discard_output()
            click.echo(f"Error: the output cannot be written: {error.strerror}.", err=True)
            sys.exit(1)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if odd := [text for text in args if not encodable(text)]:
            click.echo(f"Error: {odd[0]!r} holds bytes that are not UTF-8; rename the file, or give another.", err=True)
            ctx.exit(1)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NMBenchError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt as signal:
            how, status = ("Terminated", TERMINATED) if isinstance(signal, Terminated) else ("Interrupted", INTERRUPTED)
            click.echo(f"\n{how}; nothing finished is lost. The same command goes on from here.", err=True)
            ctx.exit(status)
        except BaseException as error:
            if not is_panic(error):
                raise
            click.echo(f"Error: a library written in Rust panicked: {' '.join(str(error).split())}", err=True)
            ctx.exit(1)


def encodable(text: str) -> bool:
    """True if a text can be written in UTF-8; Python reads bytes of an argument that are not UTF-8 as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def discard_output() -> None:
    """Send standard output nowhere, so that the interpreter does not fail once more when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="nmbench")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Compare strict N:M pruning methods (keep N of every M consecutive weights) on language models."""
    check_command(ctx.invoked_subcommand)


for command in (
    compare,
    diff,
    export,
    methods_command,
    new_plugin_command,
    plugins_command,
    report,
    reproduce,
    run,
    speed,
    validate,
    work,
):
    main.add_command(command)
