"""What observers are told while a job works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `stage` (prune, learn, evaluate, or one that a learner names) of the job `job`;
    `values` are figures such as the loss.
    """

    job: str
    stage: str
    done: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)
