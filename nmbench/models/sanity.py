"""Checks of a loaded model before anything is pruned: finite, and dense."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.models.bundle import Bundle
from nmbench.pattern import Pattern

MOST_ZEROS = 0.05  # share of the weights of a dense layer; training leaves next to none
COMMON = tuple(Pattern(*pair) for pair in ((1, 4), (2, 8), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (3, 4), (6, 8)))


def check_finite(bundle: Bundle) -> None:
    """Raise `NumericalFailure` naming the first layer, or else the first other parameter, with a NaN or infinity."""
    for name, layer in bundle.layers.items():
        if not layer.read().isfinite().all():
            raise NumericalFailure(f"layer {name} of {bundle.ref} holds NaN or infinite weights; nothing was pruned.")
    for name, parameter in bundle.model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise NumericalFailure(f"{name} of {bundle.ref} holds NaN or infinite values; nothing was pruned.")


def check_dense(bundle: Bundle, allowed: bool = False) -> dict[str, Any]:
    """Return the manifest's entry on layers that are sparse already; empty if all layers are dense.

    Raises `NMBenchError` for a checkpoint with such layers unless `allowed`.
    """
    zeros = {name: share_of_zeros(layer.read()) for name, layer in bundle.layers.items()}
    sparse = [name for name, share in zeros.items() if share > MOST_ZEROS]
    if not sparse:
        return {}
    found = {str(pattern) for name in sparse if (pattern := strictest(bundle.layers[name].read()))}
    if not allowed:
        kind = f" and strictly {' or '.join(sorted(found))}" if found else ""
        raise NMBenchError(
            f"{len(sparse)} of {len(zeros)} layers of {bundle.ref} are sparse already, first {sparse[0]} with "
            f"{zeros[sparse[0]]:.1%} zeros{kind}; prune the dense checkpoint, or go on with --allow-sparse."
        )
    share = sum(zeros[name] * bundle.layers[name].read().numel() for name in sparse)
    total = sum(bundle.layers[name].read().numel() for name in sparse)
    return {"already_sparse": {"layers": len(sparse), "share_of_zeros": share / total, "patterns": sorted(found)}}


def share_of_zeros(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / weight.numel()


def strictest(weight: Tensor) -> Pattern | None:
    """Return the pattern of `COMMON` that a weight `[out, in]` meets: lowest density first, then smallest group."""
    fits = (p for p in COMMON if p.divides(weight.shape[1]) and int(p.kept(weight != 0).max()) <= p.keep)
    return min(fits, key=lambda pattern: (pattern.density, pattern.group), default=None)
