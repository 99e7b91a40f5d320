"""From the flags of `nmbench speed` to its report."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from nmbench.experiment.loading import load_model
from nmbench.pattern import Pattern
from nmbench.plugins.loading import load_plugins
from nmbench.speed.gpu import SparseTensorCores, half
from nmbench.speed.measure import check_pattern, measure
from nmbench.speed.report import Report
from nmbench.speed.whole_model import Sizes


def speed_of(
    model: str,
    pattern: str,
    tokens: Sequence[int],
    dtype: str | None,
    trust_remote_code: bool,
    plugin_files: Sequence[str],
    parts: Collection[str],
    prefill: int,
    seconds: float | None,
    merged: bool,
    report: Callable[[str], None],
) -> Report:
    """Load a model and measure it.

    `parts`, `prefill` (tokens), `seconds` (of the profile; None: all it needs) and `merged` are those of `measure`.
    `report` receives one line of progress per measurement. Raises `NMBenchError`, before the model is loaded, if the
    hardware is missing or cannot multiply `pattern`.
    """
    chosen = Pattern.parse(pattern)
    check_pattern(chosen)
    precision = half(dtype)
    hardware = SparseTensorCores()
    plugins = load_plugins(plugin_files)
    bundle = load_model(model, plugins, dtype=precision, device="cuda", trust_remote_code=trust_remote_code)
    sizes = Sizes(prefill_tokens=prefill, prefill_seconds=math.inf if seconds is None else seconds)
    return measure(bundle, chosen, tokens, hardware, report, sizes, parts, merged)
