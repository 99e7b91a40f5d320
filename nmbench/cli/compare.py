"""`nmbench compare`: two runs, two versions of nmbench, two machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from nmbench.cli.shared import row_options
from nmbench.errors import NMBenchError

EXIT_CHANGED, EXIT_NOT_JUDGED = 1, 3


@click.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@row_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
def compare(
    first: Path, second: Path, patterns: Sequence[str], labels: Sequence[str], seeds: Sequence[int], as_json: bool
) -> None:
    """Compare two run directories: what changed from A to B, by how much, and is it more than noise?

    Exit status: 0 no row changed by more than noise, 1 some row did, 3 not judged: the runs are of two models or
    protocols, have no row or metric in common, or kept no losses.
    """
    try:
        from nmbench.results.results import addressed
        from nmbench.results.two_runs import comparison_json, comparison_text
        from nmbench.results.two_runs.comparing import compared_runs

        results = [addressed([directory]).only(patterns, labels, seeds) for directory in (first, second)]
        found = compared_runs(*results)
    except NMBenchError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_NOT_JUDGED)
    click.echo(json.dumps(comparison_json(found), indent=2) if as_json else comparison_text(found))
    sys.exit(EXIT_CHANGED if found.changed else 0 if found.judged else EXIT_NOT_JUDGED)
