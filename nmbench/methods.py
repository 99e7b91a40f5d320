"""What a pruning method is, and what it is handed.

Five kinds, by what they see. A `Scorer` rates the weights of one layer and the host keeps the best of every group. A
`Solver` sees one layer and its input statistics, chooses the mask and may repair the weights. A `Refiner` improves a
mask that another method made of the layer. A `MaskLearner` sees the whole model and batches of tokens. A `MaskSource`
brings masks that exist already. All are frozen dataclasses whose fields are their options (`nmbench.option`). A method
is pure: it reads weights and returns masks; the host applies, checks and evaluates them.

The canonical view of a weight is `[out, in]` with groups along `in`, however the model stores it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nmbench.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from nmbench.pattern import Pattern
    from nmbench.pruning.learning import LearnTask


class Stat(enum.Flag):
    """The statistics of a layer's inputs that a method asks for; combine them with `|`."""

    NONE = 0
    INPUT_NORM = enum.auto()
    GRAM = enum.auto()
    DRIFT = enum.auto()
    LAG = enum.auto()


@dataclass(frozen=True)
class LayerStats:
    """Statistics of the inputs X `[tokens, in]` of one layer over the calibration windows; only what was asked for.

    `input_norm`: `[in]` float32, sqrt of the mean over windows of the sum of squares of each input channel.
    `gram`: `[in, in]` float32, (2 / windows) * sum X^T X.
    `drift`: `[in, in]` float32, (2 / windows) * sum (Y - X)^T X, where Y is what the layer is given in the dense model.
    `lag`: `[out, in]` float32, (2 / windows) * sum (T - S)^T X, where S is the residual stream `[tokens, out]` once the
    layer has added to it what its dense weights make of X, and T the same in the dense model. None if the layer does
    not write into the residual stream (`nmbench.calibration.residual_stream`).
    """

    windows: int
    tokens: int
    input_norm: Tensor | None = None
    gram: Tensor | None = None
    drift: Tensor | None = None
    lag: Tensor | None = None


@dataclass(frozen=True)
class Pruned:
    """What a method made of one layer: bool `mask` `[out, in]` (True = kept) and, if it changed them, the weights.

    A `note` (for example "damping raised to 0.1") goes into the record, and so do the means of `figures` over layers.
    """

    mask: Tensor
    weight: Tensor | None = None
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PrunedModel:
    """What a method made of a model: one `Pruned` for every prunable layer, and notes that go into the record."""

    layers: Mapping[str, Pruned]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def masks(self) -> dict[str, Tensor]:
        return {name: pruned.mask for name, pruned in self.layers.items()}

    @property
    def weights_changed(self) -> bool:
        return any(pruned.weight is not None for pruned in self.layers.values())


@dataclass(frozen=True)
class Method:
    """Base of all methods, a frozen dataclass. `presets`: name -> option values, which explicit options override."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def supports(self, pattern: Pattern) -> str | None:
        """Return why `pattern` cannot be done, or None. Called before any model is loaded."""
        return None

    def content(self) -> Mapping[str, str]:
        """What decides the result besides the options, such as the digest of a file that the method reads.

        It is part of what makes two jobs the same. Raises `NMBenchError` if there is no such file.
        """
        return {}


@dataclass(frozen=True)
class Baseline(Method):
    """A one-shot method: one layer at a time, from its weights and the statistics in `needs`."""

    @property
    def needs(self) -> Stat:
        """The statistics that the method reads; a class attribute will do where options do not matter."""
        return Stat.NONE

    @property
    def sequential(self) -> bool:
        """Whether the inputs of a layer are those it has when the layers before it in its block are pruned already.

        Else they are what the dense block makes of the pruned blocks above. An option of this name will do as well.
        """
        return False

    @property
    def skip_tokens(self) -> int:
        """How many tokens at the beginning of every window are left out of the statistics.

        An option of this name will do as well.
        """
        return 0


@dataclass(frozen=True)
class Scorer(Baseline):
    """Rates weights; the host keeps the `keep` highest scores of every group (`Pattern.top`)."""

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Rate `weight` `[out, in]` (larger = keep); returns finite scores of the same shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class Solver(Baseline):
    """Chooses the mask of a layer and may repair the kept weights."""

    mask_only: bool = option(
        False, "apply the mask alone to the dense weights (upstream layers are still walked with repaired weights)"
    )

    def solve(self, weight: Tensor, stats: LayerStats, pattern: Pattern) -> Pruned:
        """Prune `weight` `[out, in]`; the returned weight must be zero wherever the mask is False."""
        raise NotImplementedError


@dataclass(frozen=True)
class Refiner(Baseline):
    """Improves a mask on the dense weights: that of the method named by `init`, found with the same statistics."""

    init: str = option("wanda", "registered scorer or solver whose mask is refined")

    def refine(self, weight: Tensor, stats: LayerStats, mask: Tensor, pattern: Pattern) -> Pruned:
        """Improve the bool `mask` `[out, in]` of `weight` `[out, in]`; the weights stay dense."""
        raise NotImplementedError


@dataclass(frozen=True)
class MaskLearner(Method):
    """Learns the masks of all layers together from the loss of the whole model.

    It starts from the mask of the one-shot method named by `init`, on the dense weights, or from that of another
    learner of the same run. The host computes that mask, evaluates it as a row of its own (`<label>@init`, unless it is
    another learner's) and hands it over as `task.initial`.
    """

    init: str = option(
        "wanda",
        "whose mask, on the dense weights, is the start: a one-shot method, or a label of the same run",
    )

    def bytes_per_weight(self, itemsize: int) -> float | None:
        """What learning holds on the device for every prunable weight, besides the model, whose weights have `itemsize`
        bytes each: dense copies, logits, masks. None: the user is told that it is not known.
        """
        return None

    def learn(self, task: LearnTask) -> Mapping[str, Tensor]:
        """Return one bool mask `[out, in]` for every name in `task.layers`."""
        raise NotImplementedError


@dataclass(frozen=True)
class DenseModel:
    """What a `MaskSource` is shown: the dense weight `[out, in]` of every prunable layer, in host memory and read-only,
    its pattern, and the names of what is left dense with the reason.
    """

    weights: Mapping[str, Tensor]
    patterns: Mapping[str, Pattern]
    skipped: Mapping[str, str]


@dataclass(frozen=True)
class MaskSource(Method):
    """Brings the masks of all layers from elsewhere; reads no tokens."""

    def bring(self, model: DenseModel) -> PrunedModel:
        """Return one `Pruned` for every name in `model.weights`. Raises `NMBenchError` naming a layer that differs."""
        raise NotImplementedError
