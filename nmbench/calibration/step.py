"""One step of a walk: layers to prune now, with their statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nmbench.methods import LayerStats
from nmbench.models.bundle import Layer


@dataclass(frozen=True)
class Step:
    """Layers of one block to prune now, and their statistics by layer name.

    `last`: no more layers of this block follow. `block_tokens`: the tokens that went through the block for this step,
    on all ranks together; the last step of a block counts the tokens that will go through the pruned block, unless it
    is the last block.
    `fallbacks`: experts without tokens, whose statistics are those of other tokens.
    """

    index: int
    layers: Sequence[Layer]
    stats: Mapping[str, LayerStats]
    last: bool
    block_tokens: int
    fallbacks: Sequence[str] = ()


class FewTokens:
    """Lists for the record: the experts that too few calibration tokens were routed to.

    `never_reached`: pruned by the statistics of all tokens of their block. `under_calibrated`: pruned by those of fewer
    tokens than a weight has inputs, whose Gram matrix is singular; the number of tokens.
    """

    def __init__(self) -> None:
        self.never_reached: list[str] = []
        self.under_calibrated: dict[str, int] = {}

    def note(self, step: Step) -> None:
        """Note the experts of one step; an expert that is visited again counts once."""
        self.never_reached += [name for name in step.fallbacks if name not in self.never_reached]
        for layer in step.layers:
            tokens = step.stats[layer.name].tokens
            if (layer.fused or layer.listed) and layer.name not in step.fallbacks and tokens < layer.shape[1]:
                self.under_calibrated[layer.name] = tokens

    @property
    def experts(self) -> dict[str, Any]:
        """The two lists by name, for the record; an empty list is left out."""
        content = {"never_reached": self.never_reached, "under_calibrated": self.under_calibrated}
        return {name: value for name, value in content.items() if value}
