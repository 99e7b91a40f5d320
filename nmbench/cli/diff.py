"""`nmbench diff`: the overlap of two masks."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--pattern", metavar="N:M", help="Count equal groups of M.  [claimed by the files, or inferred]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def diff(first: str, second: str, pattern: str | None, as_json: bool) -> None:
    """Compare two masks by layer: equal bits, equal groups, Jaccard index of the kept weights.

    A and B are paths as for `nmbench validate`; of a checkpoint without masks, the non-zeros are compared.
    """
    from nmbench.artifacts.difference import compare
    from nmbench.artifacts.kept_masks import kept_of
    from nmbench.artifacts.reading import open_artifact
    from nmbench.artifacts.rendering import difference_json, difference_text
    from nmbench.pattern import Pattern

    wanted = Pattern.parse(pattern) if pattern else None
    found = compare(kept_of(open_artifact(first)), kept_of(open_artifact(second)), wanted)
    click.echo(json.dumps(difference_json(found), indent=2) if as_json else difference_text(found))
