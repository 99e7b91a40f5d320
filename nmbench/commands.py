"""The commands on files: validate, diff and export. Parsing and printing only; torch is imported when they run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import click

from nmbench.errors import NMBenchError

NOT_STRICT, CANNOT_TELL = 1, 3


@click.command()
@click.argument("path")
@click.option("--pattern", metavar="N:M", help="Keep N of every M weights.  [what the file claims, or shows]")
@click.option("--skip", multiple=True, metavar="LAYERS", help="Layers that may be dense, as 'q_proj'; repeatable.")
@click.option("--like", metavar="PATH", help="A checkpoint of the same model, for masks without shapes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def validate(path: str, pattern: str | None, skip: Sequence[str], like: str | None, as_json: bool) -> None:
    """Is this checkpoint, or mask file, strictly N:M? The first broken group is named.

    PATH is a folder of transformers, a safetensors, torch or .npz file, a folder of masks, or RUN_DIRECTORY:LABEL.
    Exit status: 0 strict, 1 not strict, 3 could not tell.
    """
    from nmbench.pattern import Pattern

    wanted = Pattern.parse(pattern) if pattern else None
    try:
        from nmbench.artifacts.reading import open_artifact
        from nmbench.artifacts.text import validation_json, validation_text
        from nmbench.artifacts.validation import validate as judge

        found = judge(open_artifact(path), wanted, skip, open_artifact(like) if like else None)
    except NMBenchError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(CANNOT_TELL)
    click.echo(json.dumps(validation_json(found), indent=2) if as_json else validation_text(found))
    sys.exit(0 if found.strict else NOT_STRICT)


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--pattern", metavar="N:M", help="Count equal groups of M.  [what the files claim, or show]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def diff(first: str, second: str, pattern: str | None, as_json: bool) -> None:
    """How much do two masks have in common, by layer? Equal bits, equal groups, Jaccard index of the kept weights.

    A and B are what `nmbench validate` takes; of a checkpoint without masks, the non-zeros are compared.
    """
    from nmbench.artifacts.difference import compare
    from nmbench.artifacts.kept import kept_of
    from nmbench.artifacts.reading import open_artifact
    from nmbench.artifacts.text import difference_json, difference_text
    from nmbench.pattern import Pattern

    wanted = Pattern.parse(pattern) if pattern else None
    found = compare(kept_of(open_artifact(first)), kept_of(open_artifact(second)), wanted)
    click.echo(json.dumps(difference_json(found), indent=2) if as_json else difference_text(found))
