"""`nmbench plugins`: every plugin, its hooks and its failures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from nmbench.cli.shared import plugin_option

if TYPE_CHECKING:
    from nmbench.plugins.loading import PluginInfo


@click.command("plugins")
@plugin_option
def plugins_command(plugin_files: Sequence[str]) -> None:
    """List every plugin with its origin, its hooks and its registered names, or with the reason why it failed."""
    from nmbench.plugins.hookspecs import HOOKS_VERSION
    from nmbench.plugins.loading import load_plugins
    from nmbench.testing import KIT_VERSION

    plugins = load_plugins(plugin_files)
    for info in plugins.infos:
        click.echo(f"{info.name}: {state_of(info)}")
        for text in info.deprecations:
            click.echo(f"  deprecated: {text}")
    click.echo(f"hooks {HOOKS_VERSION}, test kit {KIT_VERSION}")
    if plugins.failures:
        sys.exit(1)


def state_of(info: PluginInfo) -> str:
    """The line of a plugin: FAILED with the reason, disabled, or its hooks and registered names."""
    if info.failure:
        return f"FAILED at {info.failure}"
    registered = f"; brings {', '.join(info.registered)}" if info.registered else ""
    return "disabled" if info.disabled else f"{', '.join(info.hooks)}{registered}"
