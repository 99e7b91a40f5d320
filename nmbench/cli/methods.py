"""`nmbench methods`: the methods, or the options of one method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from nmbench.cli.shared import loaded, plugin_option


@click.command("methods")
@click.argument("name", required=False)
@plugin_option
def methods_command(name: str | None, plugin_files: Sequence[str]) -> None:
    """List the methods, or show the options of the method NAME."""
    plugins = loaded(plugin_files)
    if name is None:
        entries = list(plugins.registries.methods)
        names = max(len(entry.name) for entry in entries)
        kinds = max(len(entry.obj.method_kind) for entry in entries)
        for entry in entries:
            click.echo(f"{entry.name:<{names}} {entry.obj.method_kind:<{kinds}} {summary(entry.obj)}  ({entry.origin})")
        return
    cls = plugins.lookup(plugins.registries.methods, name)
    click.echo(f"{name}: {cls.method_kind} of {plugins.registries.methods.entries[name].origin}\n{summary(cls)}\n")
    click.echo(options_text(name, cls))


def options_text(name: str, cls: Any) -> str:
    """The options of a method, one a line in the form of `--set`, and the patterns that its defaults support."""
    from nmbench.options import describe
    from nmbench.pattern import Pattern

    lines = []
    for info in describe(cls):
        choices = f"; one of {', '.join(map(str, info.choices))}" if info.choices else ""
        unit = f" [{info.unit}]" if info.unit else ""
        default = "none" if info.default is None else info.default
        lines.append(f"  --set {name}.{info.name}={default}  ({info.type}){unit} {info.help}{choices}")
    for preset, values in cls.presets.items():
        listed = ", ".join(f"{key}={value}" for key, value in values.items())
        lines.append(f"  --set {name}.preset={preset}  sets {listed}")
    usual = ("1:2", "1:4", "2:4", "4:8", "8:16", "16:32", "2:4x2")
    supported = [text for text in usual if cls().supports(Pattern.parse(text)) is None]
    return "\n".join([*(lines or ["  no options"]), f"  patterns: {', '.join(supported)} and others alike"])


def summary(cls: Any) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())
