"""`nmbench reproduce`: run a published table, and compare its figures with ours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from nmbench.cli.shared import done, plugin_option


@click.command()
@click.argument("name", required=False)
@click.option("--model", metavar="REF", help="Weights in place of the published model, as a folder.  [the hub's]")
@click.option("--masks", type=click.Path(path_type=Path), help="The published mask file.  [the hub's]")
@click.option("--only", "chosen", multiple=True, metavar="LABEL", help="Only lines of this label; repeatable.")
@click.option("--device", metavar="auto|cpu|cuda", help="auto takes a CUDA GPU if torch finds one.  [auto]")
@click.option("--dtype", metavar="DTYPE", help="Load and prune in this dtype.  [bfloat16 on a GPU, else float32]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Run directory.  [runs/PROTOCOL]")
@click.option("--quiet", is_flag=True, help="No progress, only doubts and the verdicts.")
@plugin_option
def reproduce(
    name: str | None, masks: Path | None, chosen: Sequence[str], out: Path | None, quiet: bool, **flags: Any
) -> None:
    """Run the published table NAME and print ours, theirs and the verdict; without NAME, list the tables.

    NAME may be a TOML file of the same form. Exit status 1: a line is outside its tolerance, or its row failed. The
    same command resumes.
    """
    from nmbench.cli.published.catalogue import table_named, tables

    if name is None:
        for entry in tables():
            click.echo(f"{entry.name:<24} {entry.title} ({len(entry.lines)} lines)\n{'':<24} {entry.source}")
        return
    from nmbench.cli.published.specification import only, spec_of
    from nmbench.cli.published.verdicts import verdict_text, verdicts

    table = only(table_named(name), chosen)
    flags["plugins"] = flags.pop("plugin_files")
    spec = spec_of(table, {key: value for key, value in flags.items() if value}, masks)
    results = done(spec, out, quiet)
    found = verdicts(table, results.asked)
    click.echo(f"\n{verdict_text(table, found, spec.model)}\n\n{results.directories[0]} holds the run")
    if not all(verdict.within for verdict in found):
        sys.exit(1)
