"""Which matrices of a checkpoint have to be N:M: the linear layers of the decoder blocks.

Names alone show the decoder stack: `model.layers.3.mlp.up_proj.weight` lies in block 3 of `model.layers`. What is
linear, and which layers are stored `[in, out]`, is known from the model itself, built from `config.json` without
weights; where there is none, every matrix of a block is taken for a linear layer stored `[out, in]`.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nmbench.artifacts.folder import read_json
from nmbench.artifacts.matrix import Artifact, Matrix, layer_name

BLOCK = re.compile(r"(?:^|(?<=\.))(\d+)\.")


@dataclass(frozen=True)
class Skeleton:
    """A model without weights: shape `[out, in]` of its linear layers, which are stored `[in, out]`, other matrices."""

    shapes: Mapping[str, tuple[int, int]]
    transposed: frozenset[str]
    skipped: Mapping[str, str]
    decoder_weights: int


@dataclass(frozen=True)
class Scope:
    """The weights that are judged, in canonical view; others with the reason why not; all parameters of the blocks."""

    weights: Mapping[str, Matrix]
    skipped: Mapping[str, str] = field(default_factory=dict)
    decoder_weights: int | None = None
    skeleton: Skeleton | None = None


def scope_of(artifact: Artifact) -> Scope:
    """The decoder layers of a checkpoint; of a file of masks alone, none."""
    inside = inner_tensors(artifact.tensors)
    skeleton = skeleton_of(artifact.config, len(artifact.tensors))
    weights: dict[str, Matrix] = {}
    skipped: dict[str, str] = {}
    for stored, shape in artifact.tensors.items():
        if not artifact.weights or len(shape) < 2:
            continue
        name = layer_name(stored)
        known = aligned(name, skeleton.shapes) if skeleton else None
        if stored not in inside:
            skipped[stored] = "outside the decoder blocks"
        elif name not in artifact.weights:
            skipped[stored] = f"not a matrix of weights {shape}"
        elif skeleton and not known and (other := aligned(stored, skeleton.skipped)):
            skipped[stored] = skeleton.skipped[other]
        else:
            turned = skeleton is not None and known in skeleton.transposed
            weights[name] = artifact.weights[name].transposed() if turned else artifact.weights[name]
    total = sum(math.prod(artifact.tensors[stored]) for stored in inside) if artifact.weights else None
    return Scope(weights, skipped, total, skeleton)


def inner_tensors(tensors: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The tensors inside the decoder blocks: of the numbered stack, outermost, that holds the most weights in matrices.

    Where nothing is numbered there is no stack, and everything counts.
    """
    sizes: dict[str, int] = {}
    for name, shape in tensors.items():
        if (stack := stack_of(name)) is not None:
            sizes[stack] = sizes.get(stack, 0) + (math.prod(shape) if len(shape) > 1 else 0)
    if not sizes:
        return set(tensors)
    best = max(sizes, key=lambda stack: sizes[stack])
    return {name for name in tensors if stack_of(name) == best}


def stack_of(name: str) -> str | None:
    """What comes before the first number in a dotted name."""
    match = BLOCK.search(name)
    return name[: match.start()] if match else None


def aligned(name: str, known: Iterable[str]) -> str | None:
    """The name in `known` that means the same, though one of the two may begin one word earlier (`model.`)."""
    table = set(known)
    if name in table:
        return name
    if (shorter := name.partition(".")[2]) in table:
        return shorter
    longer = [other for other in table if other.partition(".")[2] == name]
    return longer[0] if len(longer) == 1 else None


def skeleton_of(config: Path | None, tensors: int) -> Skeleton | None:
    """The model of a `config.json` without weights, or None if there is none or transformers cannot build it.

    No code of the folder runs. A configuration with more blocks than there are tensors is not built.
    """
    if config is None or not isinstance(read_json(config), dict):
        return None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nmbench.models import Bundle

    try:
        with quiet():
            settings = AutoConfig.from_pretrained(config.parent, trust_remote_code=False, local_files_only=True)
            if blocks_of(settings) > tensors:
                return None
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
        bundle = Bundle.of(str(config.parent), model, None)
    except Exception:  # whatever a configuration makes transformers raise, names will have to do
        return None
    return Skeleton(
        {name: layer.shape for name, layer in bundle.layers.items()},
        frozenset(name for name, layer in bundle.layers.items() if layer.transposed),
        bundle.skipped,
        sum(p.numel() for block in bundle.blocks.values() for p in block.parameters()),
    )


def blocks_of(settings: Any) -> int:
    """How many blocks a configuration asks for."""
    count = getattr(settings.get_text_config(), "num_hidden_layers", 0)
    return count if isinstance(count, int) else 0


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says of a configuration: it is not the user's at hand."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
