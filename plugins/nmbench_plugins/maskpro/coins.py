"""Fair coins that are functions of the seed and the step: nothing has to be stored to toss them again.

Random words are those of Philox4x32, as in `kernels`, with the counter (place, step, stream 3); streams 0 to 2 draw and
round there. One word is 32 coins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmbench_plugins.maskpro.kernels import ROUNDS
from nmbench_plugins.maskpro.philox import counters, philox

STREAM = 3
COINS = 128  # of one counter


def toss(seed: int, step: Tensor, windows: int, rows: int) -> Tensor:
    """Coins bool `[windows, rows]` of a step, int64 `[1]`, on its device; True stands for mask A.

    Nothing waits for the device. The coins of a window do not depend on how many windows come after it.
    """
    per_window = -(-rows // COINS)
    counter = counters(0, windows * per_window, step, STREAM, step.device)
    words = philox(counter, seed, ROUNDS).to(torch.int32)  # [counters, 4]
    parts = words.view(torch.uint8)[..., None]  # [counters, 16, 1]
    bits = torch.arange(8, dtype=torch.uint8, device=step.device)
    coins = (parts >> bits & 1).view(torch.bool).view(windows, -1)  # [windows, per_window * COINS]
    return coins[:, :rows]
