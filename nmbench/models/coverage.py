"""The extent of pruning in a model: weights by kind of layer, and the matrices that stay dense by reason.

Kinds are named for the reader of a table. They follow the words that models use for their modules; nothing is pruned,
or left dense, by them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

KINDS = {  # of two kinds in one name, the first
    "experts": ("expert",),
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "ffn", "feed_forward", "feedforward", "fc1", "fc2", "fc_in", "fc_out"),
}
OTHER = "other"


def kind_of(name: str) -> str:
    """Return the kind of a layer or parameter by its name: attention, mlp, experts or other."""
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), OTHER)


def weights_by_kind(weights: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the numbers of weights by kind, of layer names with their numbers of weights; most first."""
    found: Counter[str] = Counter()
    for name, count in weights:
        found[kind_of(name)] += count
    return dict(found.most_common())


def weights_by_reason(blocks: Mapping[str, nn.Module], skipped: Mapping[str, str]) -> dict[str, int]:
    """Return the numbers of weights in matrices of decoder `blocks` that stay dense, by reason; most first.

    `skipped`: name of a parameter, or of the module that holds it -> reason, with or without a shape at its end.
    """
    found: Counter[str] = Counter()
    for name, block in blocks.items():
        for parameter, value in block.named_parameters(prefix=name):
            reason = skipped.get(parameter) or skipped.get(parameter.removesuffix(".weight"))
            if reason and value.dim() > 1:
                found[reason.partition(" (")[0]] += value.numel()
    return dict(found.most_common())
