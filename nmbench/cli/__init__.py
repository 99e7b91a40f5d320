"""The command line, one command per file: parse, call, print. `nmbench --help` imports no torch."""

from nmbench.cli.group import main

__all__ = ["main"]
