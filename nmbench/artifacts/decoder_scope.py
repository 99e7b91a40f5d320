"""The matrices of a checkpoint that have to be N:M: the linear layers of the decoder blocks.

The model, built from `config.json` without weights, shows its decoder blocks, which modules are linear, which weights
are stored `[in, out]`, and which stored name is which parameter. Without a `config.json`, tensor names alone identify
the decoder stack: `model.layers.3.mlp.up_proj.weight` lies in block 3 of `model.layers`, and every matrix of a block is
taken for a linear layer stored `[out, in]`.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmbench.artifacts.artifact import Artifact, Matrix, layer_name, stack_size
from nmbench.artifacts.folder import read_json

if TYPE_CHECKING:
    from nmbench.models.stored_names import StoredNames

BLOCK = re.compile(r"(?:^|(?<=\.))(\d+)\.")


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    `shapes` holds the shape `[out, in]` of each linear layer, `transposed` the names of layers that are stored
    `[in, out]`, `skipped` the other matrices with the reason why they are not pruned, `blocks` the names of the decoder
    blocks. `names` maps names in checkpoint files to names of parameters.
    """

    shapes: Mapping[str, tuple[int, int]]
    transposed: frozenset[str]
    skipped: Mapping[str, str]
    blocks: tuple[str, ...] = ()
    names: StoredNames | None = None

    def inside(self, stored: str) -> bool:
        """True if a stored tensor is in a decoder block."""
        target = self.names.target(stored)[0] if self.names else stored
        return target.startswith(tuple(f"{block}." for block in self.blocks))

    @cached_property
    def layers(self) -> Names:
        return Names(self.shapes)

    @cached_property
    def others(self) -> Names:
        return Names(self.skipped)


@dataclass(frozen=True)
class Scope:
    """The part of a checkpoint that has to be N:M.

    `weights` are in the canonical view `[out, in]`; `skipped` holds the reason for every other matrix;
    `decoder_weights` counts the parameters of all decoder blocks, None for masks alone.
    """

    weights: Mapping[str, Matrix]
    skipped: Mapping[str, str] = field(default_factory=dict)
    decoder_weights: int | None = None

    @cached_property
    def names(self) -> Names:
        return Names(self.weights)


def scope_of(artifact: Artifact, skeleton: Skeleton | None = None) -> Scope:
    """The decoder layers of a checkpoint; an artifact of masks alone has none.

    `skeleton` is the model of the checkpoint, by default the one that its `config.json` describes. Layers have the
    names of the model's modules.
    """
    skeleton = skeleton or skeleton_of(artifact.config, len(artifact.tensors))
    artifact = renamed(artifact, skeleton)
    inside = inner_tensors(artifact.tensors, skeleton)
    weights: dict[str, Matrix] = {}
    skipped: dict[str, str] = {}
    for stored, shape in artifact.tensors.items():
        if not artifact.weights or len(shape) < 2:
            continue
        found = matrices_of(stored, artifact, skeleton)
        if stored not in inside:
            skipped[stored] = "outside the decoder blocks"
        elif not found:
            skipped[stored] = f"not a matrix of weights {shape}"
        elif skeleton and not skeleton.layers.find(next(iter(found))) and (other := skeleton.others.find(stored)):
            skipped[stored] = skeleton.skipped[other]
        else:
            weights.update(found)
    total = sum(math.prod(artifact.tensors[stored]) for stored in inside) if artifact.weights else None
    return Scope(weights, skipped, total)


def matrices_of(stored: str, artifact: Artifact, skeleton: Skeleton | None) -> dict[str, Matrix]:
    """The weights in one stored tensor, in the canonical view `[out, in]`.

    A matrix holds one weight. A 3-D tensor holds one weight for each of its matrices that `skeleton` has as a fused
    expert, and none without a skeleton.
    """
    name = layer_name(stored)
    if name in artifact.weights:
        found = {name: artifact.weights[name]}
    else:
        names = (f"{stored}[{expert}]" for expert in range(stack_size(artifact.tensors[stored])))
        stack = {n: artifact.stacked[n] for n in names if n in artifact.stacked}
        found = {n: m for n, m in stack.items() if skeleton and skeleton.layers.find(n)}
    if skeleton is None:
        return found
    return {n: m.transposed() if skeleton.layers.find(n) in skeleton.transposed else m for n, m in found.items()}


def renamed(artifact: Artifact, skeleton: Skeleton | None) -> Artifact:
    """The artifact with names of parameters, where the file has names of its own for them."""
    if skeleton is None or skeleton.names is None:
        return artifact
    stored = (*artifact.tensors, *(f"{name}.weight" for name in (*artifact.weights, *artifact.masks)))
    names = {name: skeleton.names.parameter(name) for name in stored}
    layers = {layer_name(old): layer_name(new) for old, new in names.items()}

    def by_layer(matrices: Mapping[str, Matrix]) -> dict[str, Matrix]:
        return {layers[name]: replace(matrix, name=layers[name]) for name, matrix in matrices.items()}

    stacked = (
        (f"{names[name.rpartition('[')[0]]}[{name.rpartition('[')[2]}", m) for name, m in artifact.stacked.items()
    )
    return replace(
        artifact,
        weights=by_layer(artifact.weights),
        masks=by_layer(artifact.masks),
        stacked={name: replace(matrix, name=name) for name, matrix in stacked},
        tensors={names[name]: shape for name, shape in artifact.tensors.items()},
        patterns={layers[name]: pattern for name, pattern in artifact.patterns.items()},
    )


def inner_tensors(tensors: Mapping[str, tuple[int, ...]], skeleton: Skeleton | None = None) -> set[str]:
    """Names of the tensors inside the decoder blocks of `skeleton`.

    Without a skeleton, or if the tensors have other names than its parameters, the decoder is the outermost numbered
    stack that holds the most weights in matrices. Without numbered names there is no stack, and all tensors are
    returned.
    """
    if skeleton and (inside := set(filter(skeleton.inside, tensors))):
        return inside
    sizes: dict[str, int] = {}
    for name, shape in tensors.items():
        if (stack := stack_of(name)) is not None:
            sizes[stack] = sizes.get(stack, 0) + (math.prod(shape) if len(shape) > 1 else 0)
    if not sizes:
        return set(tensors)
    best = max(sizes, key=lambda stack: sizes[stack])
    return {name for name in tensors if stack_of(name) == best}


def stack_of(name: str) -> str | None:
    """The part of a dotted name before its first number, None if no number stands in the name."""
    match = BLOCK.search(name)
    return name[: match.start()] if match else None


class Names:
    """Names of layers, for lookup by a name with one leading word more or less, such as `model.`."""

    def __init__(self, known: Iterable[str]) -> None:
        self.known = set(known)
        self.longer: dict[str, str | None] = {}
        for name in self.known:
            rest = name.partition(".")[2]
            self.longer[rest] = None if rest in self.longer else name  # None: ambiguous

    def find(self, name: str) -> str | None:
        """The known name of the layer that `name` stands for, or None."""
        if name in self.known:
            return name
        shorter = name.partition(".")[2]
        return shorter if shorter in self.known else self.longer.get(name)


def skeleton_of(config: Path | None, tensors: int) -> Skeleton | None:
    """The model that a `config.json` describes, or None without a `config.json` or if transformers cannot build it.

    No code of the folder runs. A configuration with more blocks than `tensors`, the number of stored tensors, is not
    built.
    """
    if config is None or not isinstance(read_json(config), dict):
        return None
    import torch
    from transformers import AutoConfig

    from nmbench.models.auto_class import auto_class
    from nmbench.models.bundle import Bundle
    from nmbench.models.stored_names import StoredNames

    try:
        with silencing():
            settings = AutoConfig.from_pretrained(config.parent, trust_remote_code=False, local_files_only=True)
            if blocks_of(settings) > tensors:
                return None
            with torch.device("meta"):
                model = auto_class(settings, str(config.parent)).from_config(settings, trust_remote_code=False)
        bundle = Bundle.of(str(config.parent), model, None)
    except Exception:  # a faulty configuration can make transformers raise anything; tensor names are used then
        return None
    return Skeleton(
        {name: layer.shape for name, layer in bundle.layers.items()},
        frozenset(name for name, layer in bundle.layers.items() if layer.transposed),
        bundle.skipped,
        tuple(bundle.blocks),
        StoredNames.of(model),
    )


def blocks_of(settings: Any) -> int:
    """The number of blocks in a configuration."""
    count = getattr(settings.get_text_config(), "num_hidden_layers", 0)
    return count if isinstance(count, int) else 0


@contextmanager
def silencing() -> Iterator[None]:
    """Suppress messages of transformers, which would warn about a configuration that the user has not written."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
