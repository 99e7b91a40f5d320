"""Packed masks: bits of a row-major bool matrix in whole bytes, in either order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from nmbench.artifacts.artifact import Rows

Order = Literal["big", "little"]


def bool_rows(packed: np.ndarray[Any, Any], columns: int, order: Order) -> Rows:
    """A function that reads bool rows of `columns` entries out of `packed`, unpacking only the rows asked for."""

    def read(start: int, stop: int) -> torch.Tensor:
        first, last = start * columns, stop * columns
        some = np.unpackbits(packed[first // 8 : -(-last // 8)], bitorder=order)
        some = some[first % 8 : first % 8 + last - first]
        return torch.from_numpy(some.reshape(stop - start, columns)).view(torch.bool)

    return read
