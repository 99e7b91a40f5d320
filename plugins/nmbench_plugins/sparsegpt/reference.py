"""The sweep of one block of columns in plain torch, slow and readable, for every pattern and device."""

from __future__ import annotations

import torch
from torch import Tensor

import nmbench


def sweep_block(weight: Tensor, mask: Tensor, spread: Tensor, pivots: Tensor, pattern: nmbench.Pattern) -> None:
    """Prune one block of columns in place: `weight` `[out, columns]`, and `mask` bool `[out, columns]`, which is set.

    `spread`: U_BB `[columns, columns]`; `pivots`: the diagonal of R_BB `[columns]`; see `sweep`. Groups are chosen by
    |w| R_cc, the root of the paper's score w^2 / U_cc^2. Raises `NumericalFailure` if a score is not finite.
    """
    for column in range(weight.shape[1]):
        if column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            mask[:, group] = pattern.top(weight[:, group].abs() * pivots[group])
        drop(column, weight, mask, spread, pivots)


def repair_block(weight: Tensor, mask: Tensor, spread: Tensor, pivots: Tensor, pattern: nmbench.Pattern) -> None:
    """Drop what `mask` does not keep in one block of columns, `weight` in place; arguments as of `sweep_block`."""
    for column in range(weight.shape[1]):
        drop(column, weight, mask, spread, pivots)


def drop(column: int, weight: Tensor, mask: Tensor, spread: Tensor, pivots: Tensor) -> None:
    """Set the dropped weights of a column to zero; the columns to its right compensate for them."""
    kept = weight[:, column].masked_fill(~mask[:, column], 0.0)
    error = (weight[:, column] - kept) * pivots[column]
    weight[:, column] = kept
    weight[:, column + 1 :] -= torch.outer(error, spread[column, column + 1 :])
