"""Losses of a streamed model, block by block: each block comes to the device once for all windows, not once a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nmbench.calibration.paused_forward import go_on, paused_forwards
from nmbench.calibration.trial import writing_blocks
from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle

Report = Callable[[int, int], None]


@torch.no_grad()
def losses_by_blocks(
    bundle: Bundle,
    measure: Callable[[Tensor], Tensor],
    windows: Tensor,
    size: int,
    report: Report = lambda done, total: None,
) -> Tensor | None:
    """Return `measure` of windows int64 `[n, window]`, `size` at a time, float32 `[n]`; None if passes cannot wait.

    `measure` runs the whole model on a batch; between blocks its passes wait. `report(blocks done, blocks)` is
    called after each block.
    """
    batches = windows.to(bundle.device).split(size)
    if not can_wait(bundle, batches):
        return None
    with paused_forwards(bundle, batches, work=measure) as passes:
        for index, block in enumerate(bundle.blocks.values()):
            with bundle.holding(block, undo=True):
                go_on(bundle, passes)
            report(index + 1, len(bundle.blocks))
        return torch.cat([one.result for one in passes])


def can_wait(bundle: Bundle, batches: Sequence[Tensor]) -> bool:
    """Return True if a forward pass of the model can be paused at every block."""
    try:
        writing_blocks(bundle, batches[0])
    except NMBenchError:
        return False
    return True
