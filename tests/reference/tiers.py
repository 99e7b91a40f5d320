"""Cases of a law in two tiers: a few that `tox -e tests` runs, and the others, which `tox -e slow` runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def tiered(*axes: Iterable[Any], fast: Callable[..., bool]) -> list[Any]:
    """Return all combinations of the values of `axes` as parameters; those for which `fast` is false are `slow`."""
    cases = itertools.product(*axes)
    return [pytest.param(*case, marks=[] if fast(*case) else [pytest.mark.slow]) for case in cases]
