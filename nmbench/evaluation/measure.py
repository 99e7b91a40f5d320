"""Measurement of all metrics of a run on one subject."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nmbench.evaluation.subject import DenseSubject, Subject
from nmbench.sources import Metric


def measure_all(metrics: Mapping[str, Metric], subject: Subject, dense: DenseSubject) -> dict[str, dict[str, Any]]:
    """Return the values of all metrics by full name."""
    values: dict[str, dict[str, Any]] = {}
    for metric in metrics.values():
        values.update({name: dict(value) for name, value in metric.measure(subject, dense).items()})
    return values
