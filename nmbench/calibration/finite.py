"""Checks that numbers are finite: one by one, or all together at the end.

Reading a value back from a GPU blocks the host, and the GPU then waits for its next kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from nmbench.errors import NumericalFailure, RankLost
from nmbench.pattern import all_finite
from nmbench.runtime.ranks import ALONE, Ranks

Made = TypeVar("Made")


class Checks:
    """Checks tensors at once, or, if `later`, notes extremes on the device, which `failed` reads back."""

    def __init__(self, later: bool = False) -> None:
        self.later = later
        self._extremes: list[Tensor] = []

    def finite(self, values: Tensor, problem: Callable[[], Exception]) -> None:
        """Raise the error that `problem` returns if a value is NaN or infinite, unless the check is made later."""
        if not values.numel() or not (values.is_floating_point() or values.is_complex()):
            return
        if self.later and not values.is_complex():
            self._extremes += torch.aminmax(values)  # NaN if one of the values is
        elif not all_finite(values):
            raise problem()

    def made_finite(self, values: Tensor, problem: Callable[[], Exception]) -> Tensor:
        """The same, and the values; if the check is made later, zeros in place of NaN and infinite values."""
        self.finite(values, problem)
        return values.nan_to_num(0.0, 0.0, 0.0) if self.later else values

    def failed(self) -> bool:
        """True if a value noted until now is NaN or infinite; reading the extremes back blocks the host."""
        return bool(self._extremes) and not bool(torch.stack(self._extremes).isfinite().all())


ONE_BY_ONE = Checks()


def checked_later(walked: Callable[[Checks], Made], who: str, ranks: Ranks = ALONE) -> Made:
    """Return the result of a walk whose statistics and scores are checked to be finite after the walk.

    If a value is not finite, on any of the `ranks` that share the walk, all of them repeat it with a check of each
    value, which raises the error of the layer. Raises `NumericalFailure` if the repeated walk finds only finite values.
    """
    checks = Checks(later=True)
    try:
        made = walked(checks)
    except RankLost:
        raise
    except Exception:
        if ranks.every(not has_failed(checks)):
            raise
    else:
        if ranks.every(not checks.failed()):
            return made
    walked(ONE_BY_ONE)
    raise NumericalFailure(
        f"{who} met NaN or infinite inputs or scores, and did not when it was repeated; nothing it does on this device "
        f"can be relied on."
    )


def has_failed(checks: Checks) -> bool:
    """Return True if a noted value is not finite; False as well if the device cannot be read after an error."""
    try:
        return checks.failed()
    except RuntimeError:
        return False
