"""Losses and metrics, and the comparison of losses for plugins."""

from nmbench.comparison import (
    ONE_SIDED_95,
    Confirmation,
    Difference,
    groups_changed,
    not_worse,
    paired,
    standard_error,
)
from nmbench.evaluation.losses import all_logits, batch_size, losses_in_parts, window_losses
from nmbench.evaluation.objective import Objective
from nmbench.evaluation.subject import DenseSubject, Subject

__all__ = [
    "ONE_SIDED_95",
    "Confirmation",
    "DenseSubject",
    "Difference",
    "Objective",
    "Subject",
    "all_logits",
    "batch_size",
    "groups_changed",
    "losses_in_parts",
    "not_worse",
    "paired",
    "standard_error",
    "window_losses",
]
