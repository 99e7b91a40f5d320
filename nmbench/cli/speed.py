"""`nmbench speed`: 2:4 sparse products against dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from nmbench.cli.shared import plugin_option
from nmbench.spec import MODEL

PARTS = ("products", "model", "prefill")


@click.command()
@click.option("--model", metavar="REF", default=MODEL, show_default=True, help="As for `nmbench run`.")
@click.option("--pattern", default="2:4", metavar="N:M", show_default=True, help="Prune to N:M, by magnitude.")
@click.option("--tokens", multiple=True, type=click.IntRange(min=1), help="Tokens in a product.  [1, 16, 2048]")
@click.option("--dtype", metavar="DTYPE", help="float16 or bfloat16.  [bfloat16]")
@click.option("--only", "parts", multiple=True, type=click.Choice(PARTS), help="Measure these.  [products, model]")
@click.option("--prefill", type=click.IntRange(min=16), default=2048, show_default=True, help="Tokens of a prefill.")
@click.option("--seconds", type=click.FloatRange(min=0), help="Begin no further way of a prefill after these.  [all]")
@click.option("--merged", is_flag=True, help="One sparse product for layers with the same input, in the whole model.")
@click.option(
    "--cusparselt", metavar="PATH", type=click.Path(path_type=Path), help="Load this cuSPARSELt, not torch's own."
)
@click.option("--trust-remote-code", is_flag=True, help="Let the model run its own code from the hub.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@plugin_option
def speed(as_json: bool, tokens: Sequence[int], parts: Sequence[str], cusparselt: Path | None, **flags: Any) -> None:
    """Time 2:4 sparse against dense: the products of the model's layers, and the whole model. Needs an NVIDIA GPU.

    `--only prefill` shows where the time of a prefill goes, with every way of multiplying, FP8 included.
    """
    import json

    if cusparselt:
        from nmbench.speed.preload import preload_cusparselt

        preload_cusparselt(cusparselt)  # before anything that imports torch

    from nmbench.speed.command import speed_of
    from nmbench.speed.report import render

    counts = tuple(dict.fromkeys(tokens)) or (1, 16, 2048)
    found = speed_of(
        tokens=counts,
        parts=parts or PARTS[:2],
        report=lambda line: click.echo(f"timing {line}", err=True),
        **flags,
    )
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else render(found))
