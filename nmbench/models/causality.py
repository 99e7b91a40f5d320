"""The test of a causal language model: the logits of a token do not depend on later tokens.

Masked language models and decoders of diffusion see the tokens that they are asked to predict. The test changes the
tail of a few rows, each from another token on, and compares the logits before the tail. A mixture of experts rounds
differently if other tokens are routed otherwise, and may drop tokens for lack of capacity. So every row has to differ,
or one strongly, as in a prefix whose tokens see each other; and by more than a row whose neighbours in the batch
change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nmbench.errors import NMBenchError

SHARES = (0.2, 0.5, 0.8)  # of a row, before its tail
ROWS = len(SHARES)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the effect of a token on its own logits
TOLERANCE_OF_HALVES = 2e-3
STRONG = 0.02  # of the same effect, in one row alone: more than rounding in any dtype
NOISE = 4.0  # times the effect of the other rows


def check_causal(ref: str, logits: Callable[[Tensor], Tensor], rows: Tensor, before: Tensor) -> None:
    """Raise `NMBenchError` if tokens of the model see later ones.

    `rows`: int64 `[ROWS, n]`, equal; `logits`: such rows -> `[ROWS, n, vocabulary]`; `before`: `logits(rows)`.
    """
    cuts = cuts_of(rows.shape[1])
    if min(cuts) < 1:
        return
    changed = torch.stack([with_other_tail(row, cut) for row, cut in zip(rows, cuts, strict=True)])
    after = logits(changed)
    effects = [difference(a[:cut], b[:cut]) for a, b, cut in zip(before, after, cuts, strict=True)]
    own = [difference(a[cut], b[cut]) for a, b, cut in zip(before, after, cuts, strict=True)]
    tolerance = TOLERANCE.get(before.dtype, TOLERANCE_OF_HALVES)
    everywhere = all(effect > tolerance * most for effect, most in zip(effects, own, strict=True))
    somewhere = any(effect > STRONG * most for effect, most in zip(effects, own, strict=True))
    if not (everywhere or somewhere):
        return
    noise = max(effect_of_neighbours(logits, rows, changed, before, cuts, index) for index in range(ROWS))
    if (min(effects) if everywhere else max(effects)) > NOISE * noise:
        raise NMBenchError(
            f"{ref} is no causal language model: its logits at a token change with later tokens, as those of masked "
            f"language models and of diffusion decoders do, so its perplexity would mean nothing; choose a model that "
            f"predicts the next token."
        )


def effect_of_neighbours(
    logits: Callable[[Tensor], Tensor], rows: Tensor, changed: Tensor, before: Tensor, cuts: list[int], index: int
) -> float:
    """Return the largest difference of the logits of one row, before its tail, if all other rows change."""
    batch = changed.clone()
    batch[index] = rows[index]
    return difference(before[index, : cuts[index]], logits(batch)[index, : cuts[index]])


def cuts_of(length: int) -> list[int]:
    """Return where the tails of the rows begin: at odd places, which are inside any block of an even size."""
    return [min(int(share * length) | 1, length - 1) for share in SHARES]


def with_other_tail(row: Tensor, cut: int) -> Tensor:
    """Return a row of tokens int64 `[n]` in which every token from `cut` on is another one of the row."""
    known = row.unique()  # sorted
    if len(known) == 1:
        known = torch.cat([known, known + 1 if known[0] == 0 else known - 1]).sort().values
    others = known[(torch.searchsorted(known, row) + 1) % len(known)]
    return torch.cat([row[:cut], others[cut:]])


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of logits."""
    return float((a.float() - b.float()).abs().max())
