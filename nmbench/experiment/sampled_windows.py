"""Which sampled windows a pool keeps: those that repeat no other text, and the share that repeat themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from nmbench.data import SHINGLE, among, shingles

LOOP = 8  # tokens of a run that a window repeats; fewer than half of its runs are distinct where it loops
EARLIER = "earlier samples"


class Sieve:
    """Keeps windows int64 `[n, length]` that share no run of `SHINGLE` tokens with `others` or with an earlier sample.

    `others`: name -> tokens int64 of one or two dimensions, such as the test text. The first `skip` tokens of a window,
    BOS, are no text. `left_out` counts the windows that were not kept, by the name of the text that they repeat.
    """

    def __init__(self, length: int, skip: int, others: Mapping[str, Tensor]) -> None:
        self.skip = skip
        self.width = min(SHINGLE, length - skip)
        widths = {name: min(self.width, tokens.shape[-1]) for name, tokens in others.items() if tokens.numel()}
        self.others = {name: (width, shingles(others[name], width).unique()) for name, width in widths.items()}
        self.seen = torch.empty(0, dtype=torch.int64)
        self.kept = torch.empty(0, length, dtype=torch.int64)
        self.left_out: Counter[str] = Counter()

    def add(self, windows: Tensor) -> None:
        """Keep those of `windows` that repeat nothing."""
        text = windows[:, self.skip :]
        runs = shingles(text, self.width)  # [n, runs]
        fresh = torch.ones(len(windows), dtype=torch.bool)
        found = {name: among(shingles(text, width), known) for name, (width, known) in self.others.items()}
        for name, shared in {**found, EARLIER: among(runs, self.seen) | repeated(runs)}.items():
            repeats = shared.any(dim=1) & fresh
            self.left_out[name] += int(repeats.sum())
            fresh &= ~repeats
        self.kept = torch.cat([self.kept, windows[fresh]])
        self.seen = torch.cat([self.seen, runs[fresh].flatten()]).unique()


def repeated(runs: Tensor) -> Tensor:
    """Return for each hashed run `[n, runs]` whether a window above has it: bool of the same shape."""
    values, places = runs.unique(return_inverse=True)
    rows = torch.arange(len(runs))[:, None].expand_as(places)  # [n, runs]
    first = torch.full((len(values),), len(runs)).scatter_reduce(0, places.flatten(), rows.flatten(), "amin")
    return first[places] < rows


def looping(windows: Tensor) -> float:
    """Return the share of windows `[n, length]` in which fewer than half of the runs of `LOOP` tokens are distinct."""
    if not len(windows):
        return 0.0
    runs = shingles(windows, min(LOOP, windows.shape[1])).sort(dim=1).values  # [n, runs]
    distinct = 1 + (runs[:, 1:] != runs[:, :-1]).sum(dim=1)
    return float((2 * distinct < runs.shape[1]).float().mean())
