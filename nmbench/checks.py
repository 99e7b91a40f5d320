"""Whether numbers are finite: looked at one by one, or all together at the end.

To look at a number that a GPU computes is to wait for it, and the GPU then waits for what it is told next. A walk that
looks at every statistic and every score is a tenth slower than one that looks once, when it is through.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Checks:
    """Looks at tensors at once, or, if `later`, notes what `failed` looks at."""

    def __init__(self, later: bool = False) -> None:
        self.later = later
        self._extremes: list[Tensor] = []

    def finite(self, values: Tensor, problem: Callable[[], Exception]) -> None:
        """Unless it is looked at later, raise what `problem` returns if one of the values is NaN or infinite."""
        if self.later and values.numel() and values.is_floating_point():
            self._extremes += torch.aminmax(values)  # NaN if one of the values is
        elif not values.isfinite().all():
            raise problem()

    def failed(self) -> bool:
        """Whether something noted until now is NaN or infinite."""
        return bool(self._extremes) and not bool(torch.stack(self._extremes).isfinite().all())


AT_ONCE = Checks()
