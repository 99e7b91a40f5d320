"""`nmbench speed`: 2:4 sparse products against dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from nmbench.cli.shared import plugin_option
from nmbench.spec import MODEL


@click.command()
@click.option("--model", metavar="REF", default=MODEL, show_default=True, help="As for `nmbench run`.")
@click.option("--pattern", default="2:4", metavar="N:M", show_default=True, help="Prune to N:M, by magnitude.")
@click.option("--tokens", multiple=True, type=click.IntRange(min=1), help="Tokens in a product.  [1, 16, 2048]")
@click.option("--dtype", metavar="DTYPE", help="float16 or bfloat16.  [bfloat16]")
@click.option("--trust-remote-code", is_flag=True, help="Let the model run its own code from the hub.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@plugin_option
def speed(as_json: bool, tokens: Sequence[int], **flags: Any) -> None:
    """Time 2:4 sparse against dense: the products of the model's layers, and the whole model. Needs an NVIDIA GPU."""
    import json

    from nmbench.speed.command import speed_of
    from nmbench.speed.report import render

    counts = tuple(dict.fromkeys(tokens)) or (1, 16, 2048)
    found = speed_of(tokens=counts, report=lambda line: click.echo(f"timing {line}", err=True), **flags)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else render(found))
