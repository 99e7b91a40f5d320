"""Proof that a checkpoint or a mask file of any size is strictly N:M, in one pass, a few rows at a time.

A mask must keep exactly N in every group, and the weights beside it must be zero wherever the mask drops. Weights
without a mask do not show which zeros were kept, so that the requirement is at most N non-zeros in every group; groups
with fewer non-zeros are counted.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nmbench.artifacts.artifact import Artifact, Matrix, Unreadable
from nmbench.artifacts.decoder_scope import Scope, renamed, scope_of, skeleton_of
from nmbench.artifacts.hardware import flags_of
from nmbench.artifacts.layer_report import LayerReport, layer_report
from nmbench.artifacts.pattern_inference import infer
from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern
from nmbench.spec import matches

AT_MOST = "weights without masks: at most N non-zeros in every group"
NONZEROS = "masks that are the non-zeros of a checkpoint: at most N kept in every group"
EXACTLY = "masks: exactly N kept in every group"
BOTH = "masks and weights: exactly N kept in every group, zeros everywhere else"

NO_WEIGHT = "has a mask, but the checkpoint has no matrix of weights for it"


@dataclass(frozen=True)
class Validation:
    """The result of a validation: `layers` that were judged, and `skipped` matrices with the reason.

    `basis` states the requirement. `coverage` is the share of the decoder's parameters in strict layers, None for masks
    alone. `bytes` and `seconds` measure the reading. `flags` are sentences on entries of the configuration on which
    loaders act. `weights_seen`: weights were judged, not masks alone.
    """

    path: str
    form: str
    basis: str
    layers: Sequence[LayerReport]
    skipped: Mapping[str, str] = field(default_factory=dict)
    coverage: float | None = None
    bytes: int = 0
    seconds: float = 0.0
    flags: Sequence[str] = ()
    weights_seen: bool = True

    @property
    def strict(self) -> bool:
        return all(layer.strict for layer in self.layers)

    @property
    def fewer(self) -> int:
        """The number of groups with fewer than N non-zeros."""
        return sum(layer.fewer for layer in self.layers)

    @property
    def first_problem(self) -> LayerReport | None:
        return next((layer for layer in self.layers if not layer.strict), None)


def validate(
    artifact: Artifact, pattern: Pattern | None = None, skip: Sequence[str] = (), like: Artifact | None = None
) -> Validation:
    """Check every layer against `pattern`, else the pattern that the file claims, else the one that its zeros show.

    `skip` names layers that may be dense. `like` is a checkpoint of the same model; it supplies the shapes of masks,
    the size of the decoder and, by its configuration, which weights are stored `[in, out]`. Raises `Unreadable` if the
    file is damaged or has nothing to judge, `NMBenchError` for a `skip` that matches no layer.
    """
    if like and artifact.config is None:
        artifact = replace(artifact, config=like.config)
    skeleton = skeleton_of(artifact.config, len((like or artifact).tensors))
    artifact = renamed(artifact, skeleton)
    scope = scope_of(artifact, skeleton)
    reference = scope_of(like) if like else scope
    masks = dict(shaped(artifact, reference))
    weights, masks, skipped = without(scope, masks, skip)
    judged = {name: (masks.get(name), weights.get(name)) for name in in_order({**weights, **masks})}
    if not judged:
        raise Unreadable(f"{artifact.path} holds no matrix of decoder weights and no mask: there is nothing to judge.")
    start = time.perf_counter()
    claims = {name: artifact.patterns.get(mask.name) for name, mask in masks.items()}
    patterns = {name: pattern or claims.get(name) for name in judged}
    if not all(patterns.values()):
        patterns = guessed(patterns, {name: mask or weight for name, (mask, weight) in judged.items()})
    layers = [
        compared(layer_report(name, *judged[name], patterns[name], artifact.at_most), reference) for name in judged
    ]
    covered = sum(layer.weights for layer in layers if layer.strict)
    return Validation(
        artifact.path,
        artifact.form,
        basis_of(artifact, weights, masks),
        layers,
        skipped,
        covered / reference.decoder_weights if reference.decoder_weights else None,
        sum(matrix.bytes for pair in judged.values() for matrix in pair if matrix),
        time.perf_counter() - start,
        flags_of(artifact.config),
        bool(weights) or artifact.at_most,
    )


def basis_of(artifact: Artifact, weights: Mapping[str, Matrix], masks: Mapping[str, Matrix]) -> str:
    """The requirement on the layers of an artifact, in words."""
    if not masks:
        return AT_MOST
    if artifact.at_most:
        return NONZEROS
    return BOTH if weights else EXACTLY


def in_order(names: Iterable[str]) -> list[str]:
    """Layer names in the order of the model: block 2 before block 10."""

    def key(name: str) -> list[tuple[int, str]]:
        parts = re.split(r"([0-9]+)", name)  # words and numbers alternate; more digits are a larger number
        return [(len(part.lstrip("0")) if i % 2 else 0, part) for i, part in enumerate(parts)]

    return sorted(names, key=key)


def shaped(artifact: Artifact, scope: Scope) -> Iterator[tuple[str, Matrix]]:
    """Every mask with the name and, as far as known, in the shape of its layer in `scope`."""
    shapes = {name: weight.shape for name, weight in scope.weights.items()}
    for name, mask in artifact.masks.items():
        known = scope.names.find(name)
        yield (known if known and artifact.weights else name), mask.shaped(shapes[known]) if known else mask


def compared(layer: LayerReport, reference: Scope) -> LayerReport:
    """The report, with a problem if the layer does not fit the weights of the model in `reference`."""
    if not reference.weights:
        return layer
    known = reference.names.find(layer.name)
    if known is None:
        return replace(layer, problem=NO_WEIGHT)
    shape = reference.weights[known].shape
    return layer if layer.shape == shape else replace(layer, problem=f"has shape {layer.shape}, its weights {shape}")


def without(
    scope: Scope, masks: Mapping[str, Matrix], skip: Sequence[str]
) -> tuple[dict[str, Matrix], dict[str, Matrix], dict[str, str]]:
    """Weights and masks to judge, and the reasons for the rest.

    A layer is skipped by `skip`, or if it has no mask while other layers have one. Raises `NMBenchError` for a glob
    that matches no layer.
    """
    skipped = dict(scope.skipped)
    names = list({**scope.weights, **masks})
    for glob in skip:
        matched = [name for name in names if matches(name, glob)]
        if not matched:
            raise NMBenchError(f"--skip {glob!r} matches no layer; names look like {next(iter(names), 'nothing')!r}.")
        skipped |= dict.fromkeys(matched, f"left out by --skip {glob}")
    if masks:
        skipped |= {name: "has no mask" for name in scope.weights if name not in masks}
    weights = {name: weight for name, weight in scope.weights.items() if name not in skipped}
    return weights, {name: mask for name, mask in masks.items() if name not in skipped}, skipped


def guessed(claimed: Mapping[str, Pattern | None], matrices: Mapping[str, Matrix | None]) -> dict[str, Pattern | None]:
    """A pattern for every layer: claimed, else inferred from its matrix, else the most frequent one of the others.

    None for all layers without one if no layer shows a pattern.
    """
    found = {n: claimed[n] or (infer(matrix) if matrix else None) for n, matrix in matrices.items()}
    usual = Counter(pattern for pattern in found.values() if pattern).most_common(1)
    return {name: pattern or (usual[0][0] if usual else None) for name, pattern in found.items()}
