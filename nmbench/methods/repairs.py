"""Base classes of repairs: methods that train the weights which a mask keeps, while the mask stays.

The three kinds differ in their range. A `LayerRepair` reads one layer and the statistics of its inputs. A `BlockRepair`
reads one decoder block: its inputs, its outputs in the dense model, and its gradients. A `WeightLearner` reads the
whole model and batches of tokens. Each begins with a row of the run, mask and weights; the host proves that the mask is
still the row's, compares the result with the row on unseen selection windows, and returns to the row's weights if the
result is worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nmbench.methods.masks import Layerwise, Method, Pruned
from nmbench.options import option
from nmbench.spec import START

if TYPE_CHECKING:
    from torch import Tensor

    from nmbench.methods.masks import LayerStats
    from nmbench.pattern import Pattern
    from nmbench.pruning.block_parts import BlockTask
    from nmbench.pruning.weights_task import WeightTask

SCOPES = ("block", "module", "layer")  # of training: the whole block, its attention and its MLP, each layer


@dataclass(frozen=True)
class Repair(Method):
    """Base of all repairs. `init` names the rows that are repaired; each of several makes a row of its own."""

    init: str = option(
        START,
        "whose mask and weights are repaired: one-shot methods, or labels of the same run; a comma between several",
    )

    @property
    def chooses(self) -> bool:
        """True if the repair may change the mask as well; the host then checks that the new mask is strict."""
        return False


@dataclass(frozen=True)
class LayerRepair(Layerwise, Repair):
    """Repair layer by layer in the walk of the host; the inputs of later layers come from repaired weights."""

    method_kind: ClassVar[str] = "layer repair"
    work_method: ClassVar[str] = "repair"

    def repair(self, weight: Tensor, stats: LayerStats, start: Pruned, pattern: Pattern) -> Pruned:
        """Return the mask of `start` with repaired weights, which are zero wherever the mask is False.

        `weight` `[out, in]` is dense. `start` holds the mask and the weights `[out, in]` of the row that is repaired.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class BlockRepair(Repair):
    """Repair block by block: the kept weights of one decoder block are trained together."""

    method_kind: ClassVar[str] = "block repair"
    work_method: ClassVar[str] = "repair_block"

    @property
    def windows(self) -> int | None:
        """The number of pool windows that go through the blocks; None: all. An option of this name may replace it."""
        return None

    @property
    def windows_read(self) -> int | None:
        """The number of pool windows to bring through the blocks, None: all; fewer if the updates are few."""
        return self.windows

    @property
    def minibatch(self) -> int:
        """The number of windows of one batch of the block task. An option of this name may replace this property."""
        return 8

    @property
    def dense_path(self) -> bool:
        """True if the repair asks for inputs and outputs on the dense path. An option may replace this property."""
        return True

    def repair_block(self, block: BlockTask) -> Mapping[str, Tensor]:
        """Return trained tensors: layer name -> weight `[out, in]`, zero wherever the mask is False.

        A layer that is left out keeps its weights. Names in `block.others`, norms and biases, may be returned as well.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class WeightLearner(Repair):
    """Repair of the whole model: the kept weights of all layers are trained together."""

    method_kind: ClassVar[str] = "weight learner"
    work_method: ClassVar[str] = "learn"

    def bytes_per_weight(self, itemsize: int) -> float | None:
        """Return the device memory of training per prunable weight, in bytes: master weights, gradients, moments.

        The model itself, of `itemsize` bytes per weight, is not included. None if unknown; the estimate then says so.
        """
        return None

    def learn(self, task: WeightTask) -> Mapping[str, Pruned]:
        """Return mask and weights for every name in `task.layers`."""
        raise NotImplementedError
