"""Count of the distinct tokens in the minibatches of a learner, over windows of any length."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nmbench.data import tokens_digest

POOL = "pool"


def cut_windows(pool: Tensor, window_tokens: int) -> Tensor:
    """Return the pool int64 `[windows, length]` as windows int64 `[n, window_tokens]`, pieces of the pool windows."""
    per_window = pool.shape[1] // window_tokens
    return pool[:, : per_window * window_tokens].reshape(-1, window_tokens)  # [windows * per_window, window_tokens]


class UniqueTokens:
    """Marks of the windows used so far, by source and window length.

    The source of windows is the pool, if the windows are the first of the pool, else the digest of the windows.
    """

    def __init__(self, pool: Tensor) -> None:
        self.pool = pool
        self._marks: dict[str, Tensor] = {}  # "source length" -> bool [windows]

    def marks(self, windows: Tensor) -> Tensor:
        """Return the marks bool `[n or more]` of `windows` int64 `[n, length]`; the caller marks used windows."""
        length = windows.shape[1]
        of_pool = self._of_pool(windows)
        source, size = (POOL, of_pool) if of_pool else (tokens_digest(windows), len(windows))
        empty = torch.zeros(size, dtype=torch.bool, device=windows.device)
        return self._marks.setdefault(f"{source} {length}", empty)

    def _of_pool(self, windows: Tensor) -> int:
        """Return the number of windows of this length in the pool if `windows` are the first of the pool, else 0."""
        if windows.shape[1] > self.pool.shape[1]:
            return 0
        known = cut_windows(self.pool, windows.shape[1])
        same = len(windows) <= len(known) and torch.equal(windows, known[: len(windows)])
        return len(known) if same else 0

    def count(self) -> int:
        """Return the number of distinct tokens used: positions of the pool, and of other windows."""
        of_pool = torch.zeros(self.pool.shape, dtype=torch.bool, device=self.pool.device)  # [windows, length]
        others = 0
        for key, marks in self._marks.items():
            source, length = key.split()
            if source == POOL:
                self._mark_positions(of_pool, marks, int(length))
            else:
                others += int(marks.sum()) * int(length)
        return int(of_pool.sum()) + others

    @staticmethod
    def _mark_positions(of_pool: Tensor, marks: Tensor, length: int) -> None:
        per_window = of_pool.shape[1] // length
        used = marks.nonzero().flatten().to(of_pool.device)
        for piece in range(per_window):
            rows = used[used % per_window == piece] // per_window
            of_pool[rows, piece * length : (piece + 1) * length] = True

    def state(self) -> dict[str, Tensor]:
        """Return the marks by source and length, for a checkpoint."""
        return dict(self._marks)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Replace the marks by those of a checkpoint."""
        self._marks = {key: marks.to(self.pool.device) for key, marks in state.items()}
