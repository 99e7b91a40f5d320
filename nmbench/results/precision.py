"""The digits of a printed figure: no more than its standard error justifies. Records keep all digits.

A figure shows three significant digits of its standard error, but at least two and at most four decimals: 146.9665 with
a standard error of 2.31 is printed as 146.97. A figure without a standard error has four decimals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nmbench.sources import ValueRecord

SIGNIFICANT, LEAST, MOST = 3, 2, 4  # digits of the standard error; decimals of the figure


def printed(metric: ValueRecord) -> str:
    """Return the value of a metric with the digits that its standard error justifies."""
    return f"{metric['value']:.{decimals(metric.get('stderr'))}f}"


def decimals(stderr: float | None) -> int:
    """Return the number of decimals of a figure with this standard error; None: unknown."""
    if stderr is None or not math.isfinite(stderr) or stderr <= 0:
        return MOST
    exponent = int(f"{stderr:.{SIGNIFICANT - 1}e}".partition("e")[2])  # of the rounded error: 0.9996 is 1.00
    return min(MOST, max(LEAST, SIGNIFICANT - 1 - exponent))


def decimals_of_mean(metrics: Sequence[ValueRecord]) -> int:
    """Return the decimals of a mean over seeds: those of the mean standard error, as all seeds share their windows."""
    errors = [metric.get("stderr") for metric in metrics]
    known = [error for error in errors if error is not None]
    return decimals(sum(known) / len(known) if len(known) == len(errors) else None)
