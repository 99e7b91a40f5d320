"""`nmbench report`: the table of finished runs, and report files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from nmbench.cli.shared import plugin_option, terminal_width, warn_of_broken_files, write_reports


@click.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "formats", multiple=True, metavar="NAME", help="Also write report files, as csv or json.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the files.  [the directory]")
@plugin_option
def report(directories: Sequence[Path], formats: Sequence[str], out: Path | None, plugin_files: Sequence[str]) -> None:
    """Print the table of one or more run directories, and write report files in other formats."""
    from nmbench.plugins.loading import load_plugins
    from nmbench.results.results import load_results
    from nmbench.results.table import render

    results, plugins = load_results(*directories), load_plugins(plugin_files)
    warn_of_broken_files(plugins)
    click.echo(render(results, terminal_width()))
    for path in write_reports(plugins, results, out or directories[0], formats):
        click.echo(f"wrote {path}")
