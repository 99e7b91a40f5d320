"""The command group, which turns errors into one line and an exit status."""

from __future__ import annotations

from typing import Any

import click

from nmbench.cli.diff import diff
from nmbench.cli.export import export
from nmbench.cli.methods import methods_command
from nmbench.cli.new_plugin import new_plugin_command
from nmbench.cli.plugins import plugins_command
from nmbench.cli.report import report
from nmbench.cli.run import run
from nmbench.cli.speed import speed
from nmbench.cli.validate import validate
from nmbench.errors import NMBenchError

INTERRUPTED = 130


class Commands(click.Group):
    """A group that turns `NMBenchError` into one line and exit status 1, and Ctrl-C into exit status 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NMBenchError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\nInterrupted; nothing finished is lost. The same command goes on from here.", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="nmbench")
def main() -> None:
    """Compare strict N:M pruning methods (keep N of every M consecutive weights) on language models."""


for command in (
    diff,
    export,
    methods_command,
    new_plugin_command,
    plugins_command,
    report,
    run,
    speed,
    validate,
):
    main.add_command(command)
