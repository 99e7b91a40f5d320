"""From the flags of `nmbench speed` to its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nmbench.experiment.loading import load_model
from nmbench.pattern import Pattern
from nmbench.plugins.loading import load_plugins
from nmbench.spec import MethodSpec, RunSpec
from nmbench.speed.gpu import SparseTensorCores, half
from nmbench.speed.measure import check_pattern, measure
from nmbench.speed.report import Report


def speed_of(
    model: str,
    pattern: str,
    tokens: Sequence[int],
    dtype: str | None,
    trust_remote_code: bool,
    plugin_files: Sequence[str],
    report: Callable[[str], None],
) -> Report:
    """Load a model and measure it.

    `report` receives one line of progress per measurement. Raises `NMBenchError`, before the model is loaded, if the
    hardware is missing or cannot multiply `pattern`.
    """
    chosen = Pattern.parse(pattern)
    check_pattern(chosen)
    spec = RunSpec(
        (MethodSpec("magnitude", "magnitude"),),
        model,
        dtype=half(dtype),
        device="cuda",
        stream=False,
        trust_remote_code=trust_remote_code,
        plugins=tuple(plugin_files),
    )
    hardware = SparseTensorCores()
    bundle = load_model(spec, load_plugins(spec.plugins))
    return measure(bundle, chosen, tokens, hardware, report)
