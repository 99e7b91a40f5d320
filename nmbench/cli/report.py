"""`nmbench report`: the table of finished runs, and report files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from nmbench.cli.shared import check_plugin_files, plugin_option, terminal_width, write_reports


@click.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "formats", multiple=True, metavar="NAME", help="Also write report files, as csv or json.")
@click.option("--pattern", "patterns", multiple=True, metavar="N:M", help="Only rows of this pattern; repeatable.")
@click.option("--method", "labels", multiple=True, metavar="LABEL", help="Only rows of this label; repeatable.")
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(min=0), help="Only rows of this seed; repeatable.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the files.  [the directory]")
@plugin_option
def report(
    directories: Sequence[Path],
    formats: Sequence[str],
    patterns: Sequence[str],
    labels: Sequence[str],
    seeds: Sequence[int],
    out: Path | None,
    plugin_files: Sequence[str],
) -> None:
    """Print the table of one or more run directories, and write report files in other formats."""
    from nmbench.plugins.loading import load_plugins
    from nmbench.results.results import load_results
    from nmbench.results.table import render

    plugins = load_plugins(plugin_files)
    check_plugin_files(plugins)
    results = load_results(*directories).only(patterns, labels, seeds)
    click.echo(render(results, terminal_width()))
    for path in write_reports(plugins, results, out or directories[0], formats):
        click.echo(f"wrote {path}")
