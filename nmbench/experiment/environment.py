"""Versions of packages and the name of the processor."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from pathlib import Path

VERSIONS = ("nmbench", "torch", "transformers", "tokenizers", "safetensors", "pluggy")


def cpu_name() -> str:
    """Return the model name of the processor from `/proc/cpuinfo`, else the name or architecture from `platform`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@functools.cache  # reading the metadata of a package takes milliseconds, and every row asks for six
def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
