"""Checks that numbers are finite: one by one, or all together at the end.

To look at a number that a GPU computes is to wait for it, and then the GPU waits for what it is told next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Checks:
    """Checks tensors at once, or, if `later`, notes what `failed` looks at."""

    def __init__(self, later: bool = False) -> None:
        self.later = later
        self._extremes: list[Tensor] = []

    def finite(self, values: Tensor, problem: Callable[[], Exception]) -> None:
        """Raise what `problem` returns if one of the values is NaN or infinite, unless they are checked later."""
        if not values.numel() or not (values.is_floating_point() or values.is_complex()):
            return
        if self.later and not values.is_complex():
            self._extremes += torch.aminmax(values)  # NaN if one of the values is
        elif not values.isfinite().all():
            raise problem()

    def failed(self) -> bool:
        """Whether something noted until now is NaN or infinite."""
        return bool(self._extremes) and not bool(torch.stack(self._extremes).isfinite().all())


ONE_BY_ONE = Checks()
