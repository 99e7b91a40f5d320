"""The strict N:M check, which the host makes of every method before any number; no plugin can bypass it.

Strict means two things: the mask keeps exactly N weights in every group (N whole units, where the pattern has units),
and the weight is zero wherever the mask is False. A kept weight may be zero too; the proof counts these extra zeros
apart from the pruned weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from nmbench.errors import NMBenchError, NotStrict
from nmbench.pattern import Pattern, all_finite


class Proof(TypedDict):
    """The proof of a row: counts of layers, groups, weights and zeros, and the digest of the masks.

    `extra_zeros` counts kept weights that are zero.
    """

    layers: int
    groups: int
    weights: int
    zeros: int
    extra_zeros: int
    masks_digest: str


def check_masks(
    masks: Mapping[str, Tensor], patterns: Mapping[str, Pattern], shapes: Mapping[str, tuple[int, int]], who: str
) -> None:
    """Raise `NotStrict` unless `masks` has one strict bool mask of the right shape for every layer in `shapes`.

    `who` names the method in the error.
    """
    if not isinstance(masks, Mapping):
        raise NotStrict(f"{who} returned {type(masks).__name__} instead of a mask for every layer, by name.")
    check_names(masks, shapes, who)
    for name, shape in shapes.items():
        mask = masks[name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise NotStrict(f"{who} returned a mask of {kind} instead of torch.bool for {name}.")
        if tuple(mask.shape) != tuple(shape):
            raise NotStrict(f"{who} returned a mask of shape {tuple(mask.shape)} instead of {tuple(shape)} for {name}.")
        check_groups(mask, patterns[name], name, who)


def check_names(masks: Mapping[str, Tensor], expected: Mapping[str, Any], who: str) -> None:
    """Raise `NotStrict` unless `masks` has exactly the names in `expected`."""
    if missing := [name for name in expected if name not in masks]:
        raise NotStrict(f"{who} returned no mask for {len(missing)} of {len(expected)} layers; first: {missing[0]}.")
    if extra := [name for name in masks if name not in expected]:
        raise NotStrict(f"{who} returned a mask for {extra[0]}, which is not a prunable layer.")


def check_groups(mask: Tensor, pattern: Pattern, name: str, who: str) -> None:
    """Raise `NotStrict` naming the first group of `mask` that does not keep exactly `pattern.keep`, in whole units."""
    wrong = pattern.broken(mask)  # [out, in/group]
    broken = wrong.nonzero()
    if len(broken):
        row, group = broken[0].tolist()
        first, kept = group * pattern.group, int(pattern.kept(mask)[row, group])
        wanted = f"instead of {pattern.keep}" if kept != pattern.keep else f"not in whole units of {pattern.unit}"
        raise NotStrict(
            f"{who} broke {pattern} in {name}: {len(broken)} of {wrong.numel()} groups; first: row {row}, columns "
            f"{first}..{first + pattern.group - 1} keep {kept} {wanted}."
        )


def check_weight(weight: Tensor, mask: Tensor, name: str, who: str) -> dict[str, int]:
    """Return the numbers of zeros off and on the `mask`, for the proof.

    Raises `NotStrict` if `weight` `[out, in]` is not finite, or not (positive) zero somewhere off the mask.
    """
    dropped = weight.masked_select(~mask)
    if not all_finite(weight):
        raise NotStrict(f"{who} left NaN or infinite weights in {name}.")
    if dropped.count_nonzero():
        row, column = ((weight != 0) & ~mask).nonzero()[0].tolist()
        raise NotStrict(
            f"{who} left {int(dropped.count_nonzero())} non-zero weights off the mask in {name}; first: row {row}, "
            f"column {column} is {weight[row, column].item():g} instead of 0."
        )
    if negative := int(dropped.signbit().sum()):
        raise NotStrict(f"{who} left {negative} negative zeros off the mask in {name}; zeros must be positive.")
    return {"zeros": dropped.numel(), "extra_zeros": int((weight == 0).sum()) - dropped.numel()}


def check_strict(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    patterns: Mapping[str, Pattern],
    who: str,
    done: Callable[[Tensor], None] = lambda tensor: None,
) -> Proof:
    """Check masks and the evaluated weights, `[out, in]` each; return the proof for the record.

    `done` is called with every weight and mask that was read.
    Raises `NotStrict` with layer, row, columns and counts of the first violation.
    """
    check_masks(masks, patterns, {name: (w.shape[0], w.shape[1]) for name, w in weights.items()}, who)
    counts = []
    for name, weight in weights.items():
        counts.append(check_weight(weight, masks[name], name, who))
        done(weight)
    return {
        "layers": len(weights),
        "groups": sum(masks[name].numel() // patterns[name].group for name in weights),
        "weights": sum(weight.numel() for weight in weights.values()),
        "zeros": sum(count["zeros"] for count in counts),
        "extra_zeros": sum(count["extra_zeros"] for count in counts),
        "masks_digest": masks_digest(masks, done),
    }


def check_divides(patterns: Mapping[str, Pattern], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `NMBenchError` naming the first layer whose rows do not fall into whole groups."""
    broken = [name for name, (_, inputs) in shapes.items() if not patterns[name].divides(inputs)]
    if broken:
        name, others = broken[0], f" ({len(broken)} of {len(shapes)} layers)" if len(broken) > 1 else ""
        raise NMBenchError(
            f"layer {name} has {shapes[name][1]} inputs, not a multiple of {patterns[name].group}{others}; exclude it "
            f"with --skip {name.rpartition('.')[2]!r} or choose another pattern."
        )


def masks_digest(masks: Mapping[str, Tensor], done: Callable[[Tensor], None] = lambda mask: None) -> str:
    """Return the SHA-256, 16 hex digits, over the names and bits of masks; `done` is called with each of them."""
    total = hashlib.sha256()
    for name in sorted(masks):
        total.update(f"{name} {tuple(masks[name].shape)};".encode())
        total.update(masks[name].cpu().contiguous().numpy().tobytes())
        done(masks[name])
    return total.hexdigest()[:16]
