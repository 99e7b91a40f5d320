"""The overlap of two masks, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nmbench.artifacts.artifact import Matrix
from nmbench.artifacts.group_counts import group_counts
from nmbench.artifacts.kept_masks import Kept
from nmbench.artifacts.pattern_inference import infer
from nmbench.artifacts.validation import in_order
from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern


@dataclass(frozen=True)
class Overlap:
    """Counts of two masks, over one layer or all layers.

    `equal` counts the weights that both masks keep or both drop, `both` the weights that both keep, `either` those that
    at least one keeps. `equal_groups` of the `groups` of `pattern` have equal masks.
    """

    name: str
    pattern: str | None
    weights: int = 0
    equal: int = 0
    both: int = 0
    either: int = 0
    groups: int = 0
    equal_groups: int = 0

    @property
    def shares(self) -> dict[str, float | None]:
        """Shares of equal bits and equal groups (None without a pattern), and the Jaccard index of the kept weights."""
        return {
            "bits": self.equal / self.weights,
            "groups": self.equal_groups / self.groups if self.groups else None,
            "jaccard": self.both / self.either if self.either else 1.0,
        }


@dataclass(frozen=True)
class Difference:
    """The comparison of two masks.

    `only_first` and `only_second` name the layers that one mask lacks. `notes` qualify the figures.
    """

    first: str
    second: str
    layers: Sequence[Overlap]
    only_first: Sequence[str]
    only_second: Sequence[str]
    notes: Sequence[str]

    @property
    def total(self) -> Overlap:
        fields = ("weights", "equal", "both", "either", "groups", "equal_groups")
        return Overlap("all", None, *(sum(getattr(layer, field) for layer in self.layers) for field in fields))


def compare(first: Kept, second: Kept, pattern: Pattern | None = None) -> Difference:
    """Compare the layers that both masks have, a slice at a time.

    Without `pattern`, each layer has the pattern that a file claims or the matrix shows. Raises `NMBenchError` if the
    masks have no layer in common, or a layer has two shapes.
    """
    pairs = {name: other for name in in_order(first.matrices) if (other := second.names.find(name))}
    if not pairs:
        names = next(iter(first.matrices)), next(iter(second.matrices))
        raise NMBenchError(
            f"{first.path} and {second.path} have no layer in common: {names[0]!r} in the first, {names[1]!r} in the "
            f"second."
        )
    layers = []
    for name, other in pairs.items():
        one, two = same_shape(first.matrices[name], second.matrices[other], first.path, second.path)
        chosen = pattern or first.patterns.get(name) or second.patterns.get(other) or infer(one) or infer(two)
        layers.append(overlap(name, one, two, chosen if chosen and chosen.divides(one.shape[1]) else None))
    return Difference(
        first.path,
        second.path,
        layers,
        [name for name in first.matrices if name not in pairs],
        [name for name in second.matrices if name not in pairs.values()],
        [f"{side.path} holds non-zeros, not masks: those are compared" for side in (first, second) if side.at_most],
    )


def same_shape(one: Matrix, two: Matrix, first: str, second: str) -> tuple[Matrix, Matrix]:
    """Both matrices in one shape: a flat one takes the shape of the other. Raises `NMBenchError` if shapes differ."""
    one, two = one.shaped(two.shape) if not two.flat else one, two.shaped(one.shape) if not one.flat else two
    if one.shape != two.shape:
        raise NMBenchError(
            f"layer {one.name} has shape {one.shape} in {first} but {two.shape} in {second}; these are of two models."
        )
    return one, two


def overlap(name: str, one: Matrix, two: Matrix, pattern: Pattern | None) -> Overlap:
    """Count equal bits and groups of two masks of one shape, a slice at a time."""
    group = pattern.group if pattern else 1
    equal = both = either = equal_groups = 0
    for (_, _, left), (_, _, right) in zip(one.slices(group), two.slices(group), strict=True):
        a, b = left.numpy(), right.numpy()
        differs = a != b
        equal += differs.size - int(np.count_nonzero(differs))
        both += int(np.count_nonzero(a & b))
        either += int(np.count_nonzero(a | b))
        if pattern:
            counts = group_counts(differs, pattern.group)
            equal_groups += counts.size - int(np.count_nonzero(counts))
    groups = one.weights // group if pattern else 0
    return Overlap(name, str(pattern) if pattern else None, one.weights, equal, both, either, groups, equal_groups)
