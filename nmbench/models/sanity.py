"""Checks of a loaded model before anything is pruned: finite, and dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.models.bundle import Bundle, Layer
from nmbench.pattern import Pattern, all_finite

FEW_ZEROS = 0.05  # share of the weights of a layer that is worth a word; training leaves next to none
MOST_ZEROS = 0.3  # share that rounding explains: a model in 4 bits has up to a fifth
MOST_OF_QUANTISED = 0.5  # the same of a model that is known to come from few bits, such as three values a weight
WHOLE = "whole rows or columns"
COMMON = tuple(Pattern(*pair) for pair in ((1, 4), (2, 8), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (3, 4), (6, 8)))


def check_finite(bundle: Bundle) -> None:
    """Raise `NumericalFailure` naming the first layer, or else the first other parameter, with a NaN or infinity."""
    for name, layer in bundle.layers.items():
        if not all_finite(layer.read()):
            raise NumericalFailure(f"layer {name} of {bundle.ref} holds NaN or infinite weights; nothing was pruned.")
        bundle.release(layer.read())
    for name, parameter in bundle.model.named_parameters():
        if parameter.is_floating_point() and not all_finite(parameter):
            raise NumericalFailure(f"{name} of {bundle.ref} holds NaN or infinite values; nothing was pruned.")
        bundle.release(parameter.data)


def check_dense(bundle: Bundle, allowed: bool = False) -> dict[str, Any]:
    """Return the manifest's entries on zeros in the prunable layers; empty if all layers are dense.

    Zeros that rounding to few bits left are no pruning: such layers are listed as `rounded_zeros`. Raises
    `NMBenchError` for a checkpoint with pruned layers (`pruning_of`) unless `allowed`.
    """
    zeros = {name: share_in(bundle, layer) for name, layer in bundle.layers.items()}
    zeros = {name: share for name, share in zeros.items() if share > FEW_ZEROS}
    most = MOST_OF_QUANTISED if "dequantised_from" in bundle.provenance else MOST_ZEROS
    sparse = {n: found for n, share in zeros.items() if (found := pruning_of(bundle.layers[n].read(), share, most))}
    if sparse and not allowed:
        refuse(bundle, sparse, zeros)
    rounded = {name: share for name, share in zeros.items() if name not in sparse}
    about: dict[str, Any] = {}
    if sparse:
        share = weighted({name: zeros[name] for name in sparse}, bundle)
        patterns = sorted({found for found in sparse.values() if found[0].isdigit()})
        about["already_sparse"] = {"layers": len(sparse), "share_of_zeros": share, "patterns": patterns}
    if rounded:
        about["rounded_zeros"] = {"layers": len(rounded), "share_of_zeros": weighted(rounded, bundle)}
    return about


def refuse(bundle: Bundle, sparse: Mapping[str, str], zeros: Mapping[str, float]) -> None:
    """Raise `NMBenchError` with the number of pruned layers, the first of them, and the kinds of their zeros."""
    first = next(iter(sparse))
    strict = sorted({kind for kind in sparse.values() if kind[0].isdigit()})
    kind = f" and strictly {' or '.join(strict)}" if strict else f" in {WHOLE}" if sparse[first] == WHOLE else ""
    raise NMBenchError(
        f"{len(sparse)} of {len(bundle.layers)} layers of {bundle.ref} are sparse already, first {first} with "
        f"{zeros[first]:.1%} zeros{kind}; prune the dense checkpoint, or go on with --allow-sparse."
    )


def pruning_of(weight: Tensor, share: float, most: float) -> str | None:
    """Return how a weight `[out, in]` with this share of zeros was pruned; None if rounding explains the zeros.

    Zeros of rounding are scattered and few: at most the share `most`. A strict pattern in every group, or zeros that
    fill whole rows or columns, are pruning at any share.
    """
    if pattern := strictest(weight):
        return str(pattern)
    kept = weight != 0
    whole = (~kept.any(dim=0)).sum() * len(weight) + (~kept.any(dim=1)).sum() * weight.shape[1]
    if int(whole) > share * weight.numel() / 2:
        return WHOLE
    return f"more than {most:.0%}" if share > most else None


def weighted(shares: Mapping[str, float], bundle: Bundle) -> float:
    """Return the share of zeros in all weights of the layers of `shares`."""
    sizes = {name: bundle.layers[name].read().numel() for name in shares}
    return sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values())


def share_in(bundle: Bundle, layer: Layer) -> float:
    """Return the share of zeros in a layer; memory of weights on disk is given back."""
    share = share_of_zeros(layer.read())
    bundle.release(layer.read())
    return share


def share_of_zeros(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / weight.numel()


def strictest(weight: Tensor) -> Pattern | None:
    """Return the pattern of `COMMON` that a weight `[out, in]` meets: lowest density first, then smallest group."""
    fits = (p for p in COMMON if p.divides(weight.shape[1]) and int(p.kept(weight != 0).max()) <= p.keep)
    return min(fits, key=lambda pattern: (pattern.density, pattern.group), default=None)
