"""The sweep of one block of columns in plain torch, slow and readable, for every pattern and device."""

from __future__ import annotations

import torch
from torch import Tensor

import nmbench


def sweep_block(weight: Tensor, mask: Tensor, spread: Tensor, pivots: Tensor, pattern: nmbench.Pattern) -> None:
    """Prune one block of columns in place: `weight` `[out, columns]`, and `mask` bool `[out, columns]`, which is set.

    `spread`: U_BB `[columns, columns]`; `pivots`: the diagonal of R_BB `[columns]`; see `sweep`. Groups are chosen by
    the errors of dropping one unit (`unit_errors`). Raises `NumericalFailure` if a score is not finite.
    """
    for column in range(weight.shape[1]):
        if column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            errors = unit_errors(weight[:, group], spread[group, group], pivots[group], pattern.unit)
            mask[:, group] = pattern.top(errors.abs(), unit_power=2)
        drop(column, weight, mask, spread, pivots)


def unit_errors(weight: Tensor, spread: Tensor, pivots: Tensor, unit: int) -> Tensor:
    """Return the errors of each unit if that unit alone is dropped and all columns to its right compensate.

    `weight` `[out, group]`, `spread` `[group, group]`, `pivots` `[group]`; the result is `[out, group]`. For one weight
    this is w R_cc, the root of the paper's score w^2 / U_cc^2. For a unit of columns S, whose errors e_S satisfy
    w_S = e_S U_SS, the sum of squares is the joint error w_S ([H^-1]_SS)^-1 w_S^T over the columns from S on.
    """
    if unit == 1:
        return weight * pivots
    first = torch.arange(0, len(spread), unit, device=spread.device)
    columns = first[:, None] + torch.arange(unit, device=spread.device)  # [units, unit]
    own = spread[columns[:, :, None], columns[:, None, :]]  # [units, unit, unit], U_SS
    of_units = weight.unflatten(1, (-1, unit)).transpose(0, 1)  # [units, out, unit]
    errors = torch.linalg.solve_triangular(own, of_units, upper=True, left=False)  # [units, out, unit]
    return errors.transpose(0, 1).flatten(1)


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
