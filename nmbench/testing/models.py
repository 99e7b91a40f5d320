"""Tiny random models of real architectures, for tests of code that runs whole models."""

from __future__ import annotations

from nmbench.models.bundle import Bundle
from nmbench.plugins.loading import load_plugins
from nmbench.spec import TINY

__all__ = ["tiny_bundle"]


def tiny_bundle(family: str = "llama", dtype: str = "float32") -> Bundle:
    """Load `tiny:FAMILY`: two blocks of width 64 and a byte tokenizer; the same random weights every time.

    Raises `NMBenchError` with the list of families for an unknown `family`.
    """
    plugins = load_plugins()
    bundle: Bundle = plugins.lookup(plugins.registries.models, TINY)(dtype=dtype).load(family)
    return bundle
