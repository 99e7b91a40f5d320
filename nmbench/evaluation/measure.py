"""Measurement of all metrics of a run on one subject."""

from __future__ import annotations

from collections.abc import Mapping

from nmbench.errors import NMBenchError
from nmbench.evaluation.subject import DenseSubject, Subject
from nmbench.sources import Metric, Value, ValueRecord


def measure_all(metrics: Mapping[str, Metric], subject: Subject, dense: DenseSubject) -> dict[str, ValueRecord]:
    """Return the values of all metrics as plain data, by full name.

    Raises `NMBenchError` for a result that is not a `Value`.
    """
    found: dict[str, ValueRecord] = {}
    for metric in metrics.values():
        for name, value in metric.measure(subject, dense).items():
            if not isinstance(value, Value):
                raise NMBenchError(f"metric {name} gave {type(value).__name__} instead of nmbench.Value.")
            found[name] = value.recorded()
    return found
