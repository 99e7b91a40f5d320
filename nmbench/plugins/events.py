"""The event that observing hooks receive while a job works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Progress of the job `job`: `done` of `total` units of its `stage`, with figures such as the loss in `values`.

    A stage is prune, learn, evaluate, or a name that the learner chooses.
    """

    job: str
    stage: str
    done: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)
