"""`nmbench validate`: is a checkpoint or a mask file strictly N:M?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from nmbench.errors import NMBenchError

if TYPE_CHECKING:
    from nmbench.pattern import Pattern


NOT_STRICT, CANNOT_TELL = 1, 3


@click.command()
@click.argument("path")
@click.option("--pattern", metavar="N:M", help="Keep N of every M weights.  [what the file claims, or shows]")
@click.option("--skip", multiple=True, metavar="LAYERS", help="Layers that may be dense, as 'q_proj'; repeatable.")
@click.option("--like", metavar="PATH", help="A checkpoint of the same model: shapes of masks, layout.")
@click.option("--checksums", is_flag=True, help="Compare an export's files with the SHA-256 recorded for them, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def validate(
    path: str, pattern: str | None, skip: Sequence[str], like: str | None, checksums: bool, as_json: bool
) -> None:
    """Is this checkpoint, or mask file, strictly N:M? The first broken group is named.

    PATH is a folder of transformers, a safetensors, torch or .npz file, a folder of masks, or RUN_DIRECTORY:LABEL.
    Exit status: 0 strict, 1 not strict (or a file changed), 3 could not tell.
    """
    wanted = parsed(pattern)
    try:
        from nmbench.artifacts.checksums import changed_files
        from nmbench.artifacts.reading import open_artifact
        from nmbench.artifacts.rendering import validation_json, validation_text
        from nmbench.artifacts.validation import validate as judge

        artifact = open_artifact(path)
        found = judge(artifact, wanted, skip, open_artifact(like) if like else None)
        changed = changed_files(artifact) if checksums else []
    except NMBenchError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(CANNOT_TELL)
    content = {**validation_json(found), **({"changed_files": changed} if checksums else {})}
    click.echo(json.dumps(content, indent=2) if as_json else validation_text(found))
    if checksums and not as_json:
        click.echo(
            f"CHANGED since it was written: {', '.join(changed)}" if changed else "checksums as they were written"
        )
    sys.exit(0 if found.strict and not changed else NOT_STRICT)


def parsed(pattern: str | None) -> Pattern | None:
    """The pattern of a command whose exit status 1 says something else: an ill-formed one is wrong usage, 2."""
    from nmbench.pattern import Pattern

    try:
        return Pattern.parse(pattern) if pattern else None
    except NMBenchError as error:
        raise click.BadParameter(str(error), param_hint="--pattern") from error
