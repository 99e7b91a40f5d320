"""`nmbench report`: the table of finished runs, and report files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from nmbench.cli.shared import loaded, plugin_option, print_table, row_options, write_reports
from nmbench.errors import CannotWrite

PAGE = ("html",)  # the format of a command that names none


@click.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "formats", multiple=True, metavar="NAME", help="Report files, as csv or json.  [html]")
@row_options
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
    """Print the table of one or more run directories, and write `report.html`, or report files in other formats.

    DIRECTORY:LABEL[:N:M[:SEED]] stands for the rows of one label.
    """
    from nmbench.results.results import addressed
    from nmbench.results.undone import undone_lines

    plugins = loaded(plugin_files)
    results = addressed(directories).only(patterns, labels, seeds)
    directories = results.directories
    print_table(results)
    labels = "\n".join(f"LABEL {one}" for one in results.meanings() if not one.plain)
    for paragraph in filter(None, [labels, *undone_lines(directories)]):
        click.echo(f"\n{paragraph}")
    try:
        paths = write_reports(plugins, results, out or directories[0], formats or PAGE)
    except CannotWrite as error:
        if formats:
            raise
        click.echo(f"no report.html: {error}", err=True)  # the table of a read-only folder is enough
    else:
        click.echo("\n".join(f"wrote {path}" for path in paths))
