"""What scripts share that draw figures from results/."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> dict[str, Any]:
    """The figures of a file in results/."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


@contextlib.contextmanager
def two_panels(about: str, height: float) -> Iterator[tuple[Any, Any]]:
    """The axes of two panels side by side, saved at the end where the option `--plot` of the script says."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, height), layout="constrained")
    yield axes[0], axes[1]
    figure.savefig(args.plot, dpi=110)
