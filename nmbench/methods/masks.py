"""Base classes of pruning methods, and the types of their arguments and results.

The five kinds differ in their inputs. A `Scorer` rates the weights of one layer, and the host keeps the best of every
group. A `Solver` reads one layer and its input statistics, chooses the mask and may repair the weights. A `Refiner`
improves the mask of another method on one layer. A `MaskLearner` reads the whole model and batches of tokens. A
`MaskSource` returns existing masks. All are frozen dataclasses whose fields are their options (`nmbench.option`). A
method is pure: it reads weights and returns masks; the host applies, checks and evaluates them.

The canonical view of a weight is `[out, in]` with groups along `in`, however the model stores it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nmbench.options import option
from nmbench.spec import START

if TYPE_CHECKING:
    from torch import Tensor

    from nmbench.pattern import Pattern
    from nmbench.pruning.learning import LearnTask


class Stat(enum.Flag):
    """The statistics of layer inputs that a method needs; combine them with `|`."""

    NONE = 0
    INPUT_NORM = enum.auto()
    GRAM = enum.auto()
    DRIFT = enum.auto()
    LAG = enum.auto()


@dataclass(frozen=True)
class LayerStats:
    """Statistics of the inputs X `[tokens, in]` of one layer over the calibration windows; None if not needed.

    `input_norm`: `[in]` float32, sqrt of the mean over windows of the sum of squares of each input channel.
    `gram`: `[in, in]` float32, (2 / windows) * sum X^T X.
    `drift`: `[in, in]` float32, (2 / windows) * sum (Y - X)^T X, where Y are the inputs of the layer in the dense
    model.
    `lag`: `[out, in]` float32, (2 / windows) * sum (T - S)^T X, where S is the residual stream `[tokens, out]` plus the
    outputs of the dense weights for X, and T is the same stream in the dense model. None if the layer does not write
    into the residual stream (`nmbench.calibration.residual_stream`).
    """

    windows: int
    tokens: int
    input_norm: Tensor | None = None
    gram: Tensor | None = None
    drift: Tensor | None = None
    lag: Tensor | None = None


@dataclass(frozen=True)
class Pruned:
    """The result of a method for one layer: bool `mask` `[out, in]` (True = kept) and the weights, if changed.

    The record holds the `note` (for example "damping raised to 0.1") and the means of `figures` over layers.
    """

    mask: Tensor
    weight: Tensor | None = None
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PrunedModel:
    """The result of a method for a model: one `Pruned` for every prunable layer, and entries for the record.

    `notes`: JSON values of the method's choice. `layer_notes`: layer -> note. `figures`: name -> mean over layers.
    `experts`: under `never_reached`, the names of fused experts without routed calibration tokens; under
    `under_calibrated`, name -> tokens of fused experts with fewer tokens than inputs. `origin`: the record of the row
    that imported masks come from, whose cost is theirs; without it the cost of imported masks is unknown. `curve`: the
    figures that a learner reported, by `step`. `others`: parameters of the decoder blocks that a repair trained besides
    the prunable weights, such as norms and biases: parameter name -> tensor.
    """

    layers: Mapping[str, Pruned]
    notes: Mapping[str, Any] = field(default_factory=dict)
    layer_notes: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    experts: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] | None = None
    curve: Sequence[Mapping[str, float | None]] = ()
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def masks(self) -> dict[str, Tensor]:
        return {name: pruned.mask for name, pruned in self.layers.items()}

    @property
    def weights_changed(self) -> bool:
        return bool(self.others) or any(pruned.weight is not None for pruned in self.layers.values())


@dataclass(frozen=True)
class Method:
    """Base of all methods, a frozen dataclass.

    `presets`: name -> option values, which explicit options override. `method_kind` is the kind as people name it,
    `work_method` the name of the method that a class must implement.
    """

    method_kind: ClassVar[str]
    work_method: ClassVar[str]

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @property
    def data_parallel(self) -> bool:
        """True if the ranks of torchrun may share the work, as a walk, and a learner of the whole model that knows how.

        The losses and gradients of such a learner come from `task.shared`, or from the `Training` of
        `task.gradients()`, and every decision from these, from the seed, or from `task.ranks.decided`. Otherwise one
        process does the work.
        """
        return False

    @property
    def eight_bit(self) -> bool:
        """True if the method also works on weights that the model stores in 8 bits (`--weights int8`).

        Such a method returns masks alone. A learner changes live weights by `apply` and `apply_dense` only, reads dense
        ones by `original` or `stored`, and computes no gradients of weights.
        """
        return False

    def supports(self, pattern: Pattern) -> str | None:
        """Return the reason why the method cannot do `pattern`, or None. Called before any model is loaded."""
        return None

    def content(self) -> Mapping[str, str]:
        """Return what decides the result besides the options, such as the digest of a file that the method reads.

        Two jobs are the same only if their contents are equal. Raises `NMBenchError` if the file does not exist.
        """
        return {}


@dataclass(frozen=True)
class Layerwise(Method):
    """A method that works on one layer at a time, from its weights and the statistics in `needs`."""

    @property
    def data_parallel(self) -> bool:
        """True if there is a walk, whose windows the ranks of torchrun share."""
        return self.needs is not Stat.NONE

    @property
    def needs(self) -> Stat:
        """The statistics that the method reads. A class attribute may replace this property if no option matters."""
        return Stat.NONE

    @property
    def sequential(self) -> bool:
        """True if the inputs of a layer are gathered after the earlier layers of its block have been pruned.

        Otherwise the block is dense and only the blocks before it are pruned. An option of this name may replace this
        property.
        """
        return False

    @property
    def skip_tokens(self) -> int:
        """The number of tokens at the beginning of every window that the statistics leave out.

        An option of this name may replace this property.
        """
        return 0


@dataclass(frozen=True)
class Baseline(Layerwise):
    """A one-shot method: it chooses the mask of one layer at a time."""


@dataclass(frozen=True)
class Scorer(Baseline):
    """Scores for weights; the host keeps the `keep` highest scores of every group (`Pattern.top`).

    A unit of several weights (pattern N:MxU) scores the sum of their scores to the `unit_power`: 1 if scores add up, as
    squared errors do; 2 if they are roots of what adds up, such as |w|, and not negative.
    """

    method_kind: ClassVar[str] = "scorer"
    work_method: ClassVar[str] = "score"
    unit_power: ClassVar[int] = 1
    eight_bit = True

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """Return finite scores of the shape of `weight` `[out, in]`; larger = keep."""
        raise NotImplementedError


@dataclass(frozen=True)
class Solver(Baseline):
    """Mask and, if repaired, kept weights of one layer."""

    method_kind: ClassVar[str] = "solver"
    work_method: ClassVar[str] = "solve"

    mask_only: bool = option(
        False, "apply the mask alone to the dense weights (statistics still come from repaired weights upstream)"
    )

    def solve(self, weight: Tensor, stats: LayerStats, pattern: Pattern) -> Pruned:
        """Return mask and weight for `weight` `[out, in]`; the returned weight is zero wherever the mask is False."""
        raise NotImplementedError


@dataclass(frozen=True)
class Refiner(Baseline):
    """Improvement of a mask on the dense weights: the mask of the method named by `init`, from the same statistics."""

    method_kind: ClassVar[str] = "refiner"
    work_method: ClassVar[str] = "refine"
    eight_bit = True

    init: str = option(START, "registered scorer or solver whose mask is refined")

    def refine(self, weight: Tensor, stats: LayerStats, mask: Tensor, pattern: Pattern) -> Pruned:
        """Return a better mask than the bool `mask` `[out, in]` for `weight` `[out, in]`; the weights stay dense."""
        raise NotImplementedError


@dataclass(frozen=True)
class MaskLearner(Method):
    """Learner of the masks of all layers together from the loss of the whole model.

    The start is the mask of the one-shot method named by `init`, on the dense weights, or the mask of another learner
    of the same run. The host computes that mask, passes it as `task.initial`, and evaluates it as a row of its own
    (`<label>@init`) unless another learner made it.
    """

    method_kind: ClassVar[str] = "mask learner"
    work_method: ClassVar[str] = "learn"

    init: str = option(
        START,
        "whose mask, on the dense weights, is the start: a one-shot method, or a label of the same run",
    )

    @property
    def blockwise(self) -> bool:
        """True if the learner needs one block on the device at a time, so that the model may be larger than the device.

        It learns by `task.learn_blocks`, and uses the whole model for losses without gradients only.
        """
        return False

    def bytes_per_weight(self, itemsize: int) -> float | None:
        """Return the device memory of learning per prunable weight, in bytes: dense copies, logits, masks.

        The model itself, of `itemsize` bytes per weight, is not included. None if unknown; the estimate then says so.
        If the learner is `blockwise`, the weights are those of one block.
        """
        return None

    def bytes_at(self, pattern: Pattern, itemsize: int) -> float | None:
        """Return the same at one pattern; a learner overrides this method instead if its memory depends on it."""
        return self.bytes_per_weight(itemsize)

    def learn(self, task: LearnTask) -> Mapping[str, Tensor]:
        """Return one bool mask `[out, in]` for every name in `task.layers`."""
        raise NotImplementedError


@dataclass(frozen=True)
class DenseModel:
    """The argument of a `MaskSource`: dense weight `[out, in]` of every prunable layer, in host memory and read-only,
    and its pattern. `skipped`: parameters left dense -> reason. `parameter_of` gives the name of the parameter that a
    checkpoint file stores under a name of its own, and every other name back.
    """

    weights: Mapping[str, Tensor]
    patterns: Mapping[str, Pattern]
    skipped: Mapping[str, str]
    parameter_of: Callable[[str], str] = str


@dataclass(frozen=True)
class MaskSource(Method):
    """Source of existing masks for all layers; reads no tokens."""

    method_kind: ClassVar[str] = "mask source"
    work_method: ClassVar[str] = "bring"
    eight_bit = True

    def bring(self, model: DenseModel) -> PrunedModel:
        """Return one `Pruned` for every name in `model.weights`. Raises `NMBenchError` naming a layer that differs."""
        raise NotImplementedError
