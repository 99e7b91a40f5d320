"""Groups with fewer than N non-zeros, filled for engines that need exactly N.

A kept weight may be zero. An engine that finds the kept weights by the non-zeros of a folder sees a group with fewer
than N; some kernels of AMD RDNA4 are known to invent values in such groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nmbench.methods import PrunedModel
from nmbench.models.bundle import Bundle


def kept_zeros(bundle: Bundle, pruned: PrunedModel) -> int:
    """Return the number of weights that the masks keep and that are zero."""
    return sum(int(zeros.sum()) for _, _, zeros in with_kept_zeros(bundle, pruned))


def fill_zeros(bundle: Bundle, pruned: PrunedModel) -> int:
    """Replace every kept zero of the live model by `tiny`, in place; return their number."""
    count = 0
    for name, weight, zeros in with_kept_zeros(bundle, pruned):
        count += int(zeros.sum())
        bundle.layers[name].write(weight.masked_fill(zeros, tiny(weight.dtype)))
    return count


def with_kept_zeros(bundle: Bundle, pruned: PrunedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield every pruned layer: its name, its live weight `[out, in]`, and where that is zero though kept, bool."""
    for name, layer in pruned.layers.items():
        weight = bundle.layers[name].read()
        yield name, weight, (weight == 0) & layer.mask.to(weight.device)


def tiny(dtype: torch.dtype) -> float:
    """Return the value that stands for a kept zero: the smallest that no usual kernel takes for zero.

    That is the smallest normal number, 1.2e-38 in bfloat16 and float32. In float16 it would be 6.1e-5, which is not
    nothing; tensor cores read its subnormals, so that the smallest of those, 6.0e-8, is taken.
    """
    found = torch.finfo(dtype)
    return float(found.smallest_normal * found.eps if dtype == torch.float16 else found.smallest_normal)


def sentence(count: int, dtype: torch.dtype, fills: bool) -> str:
    """Return what was done to `count` kept zeros, and the effect."""
    if not count:
        return "every group has exactly N non-zeros; there was nothing to fill."
    if fills:
        return f"{count} kept weights are zero; the packed form stores them, so that every group has exactly N values."
    return (
        f"{count} kept zeros were set to {tiny(dtype):.1e}, so that every group has exactly N non-zeros; each "
        f"changes an output by {tiny(dtype):.1e} times its input. The figures of the row were measured with the zeros."
    )
