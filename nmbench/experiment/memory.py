"""Estimates of the device memory that a walk needs at most and a mask learner at least, made before the run.

The estimate of a walk counts weights, hidden states, the statistics of one block, and the memory for running and for
pruning the largest layer. Memory of attention is assumed not to grow with the square of the window length. The estimate
of a learner counts only memory held during the whole learning: the weights of the model, and the learner's own bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nmbench.calibration.waiting import hidden_bytes, room_for
from nmbench.calibration.walk import batch_tokens
from nmbench.methods import Layerwise, MaskLearner, Method, Refiner, Scorer, Stat, WeightLearner
from nmbench.models.bundle import Bundle, Layer, hidden_width
from nmbench.models.keeping import block_weights
from nmbench.pattern import Pattern
from nmbench.runtime.ranks import Launch
from nmbench.spec import ResolvedSpec

FLOAT = 4  # bytes of a float32
HIDDEN = 5  # hidden states of the batch at work: held by its pass twice, lent to the block, residual stream, norm
LEARNT = (
    4  # copies of the block at work of a learner, besides the live one: two dense ones, the start, the one put back
)
RANKING = 3  # float32 copies of a weight while scores are ranked
FACTORING = (3, 2)  # float32 copies of the Gram matrix and of the weight while the former is factorised
SWEEPING = (1, 5)  # the same while the weight is swept
REFINING = (2, 15)  # the same while a mask is refined towards the dense model
GIBIBYTE = 2**30


@dataclass(frozen=True)
class Learning:
    """Bytes that a learner always holds: `weights` of the model, its `own` (None: not known), and `hidden` states.

    `blockwise`: it learns one block at a time; weights and own bytes are those while it learns the largest block.
    """

    name: str
    weights: int
    own: int | None
    hidden: int = 0
    blockwise: bool = False

    @property
    def least(self) -> int:
        """All bytes that are known."""
        return self.weights + self.hidden + (self.own or 0)

    def __str__(self) -> str:
        own = "" if self.own is None else f", its own {self.own / GIBIBYTE:.1f}"
        hidden = f", hidden {self.hidden / GIBIBYTE:.1f}" if self.blockwise else ""
        known = f"weights {self.weights / GIBIBYTE:.1f}{own}{hidden}"
        missing = "activations" if self.own is not None else "what it holds itself, and activations,"
        how = "; it learns one block at a time" if self.blockwise else ""
        return f"{self.name}: at least about {self.least / GIBIBYTE:.1f} GiB ({known}), {missing} not included{how}"


@dataclass(frozen=True)
class Estimate:
    """Bytes that a walk needs on `device` at most, by purpose; `streamed`: blocks are copied from the host one by one.

    `learning` holds the estimates of mask learners, which are not part of the others.
    """

    device: str
    streamed: bool
    weights: int
    hidden: int
    statistics: int
    working: int
    learning: tuple[Learning, ...] = ()

    @property
    def peak(self) -> int:
        """The bytes of a walk at its peak."""
        return self.weights + self.hidden + self.statistics + self.working

    @property
    def most(self) -> int:
        """The bytes of a walk, or of a learner that works block by block, whichever needs more."""
        return max(self.peak, *(it.least for it in self.learning if it.blockwise), 0)

    def __str__(self) -> str:
        parts = ("weights", "hidden", "statistics", "working")
        listed = ", ".join(f"{name} {getattr(self, name) / GIBIBYTE:.1f}" for name in parts)
        how = "blocks come from the host one by one" if self.streamed else "the whole model is there"
        walk = f"{self.device}: at most about {self.peak / GIBIBYTE:.1f} GiB for one-shot pruning ({listed}); {how}"
        return "; ".join([walk, *map(str, self.learning)])


def estimate(
    bundle: Bundle,
    needs: Stat,
    windows: int,
    window_tokens: int,
    device: str,
    streamed: bool,
    batch_tokens: int,
    learners: Sequence[MaskLearner | WeightLearner] = (),
    sequential: bool = False,
    pool_tokens: int = 0,
    patterns: Sequence[Pattern] = (),
    room: int = 0,
    returns_weights: bool = False,
) -> Estimate:
    """Return the estimate for mask learners and for a walk over `windows` windows, `batch_tokens` tokens at a time.

    `sequential`: whether all methods prune the layers of a block one after the other. `pool_tokens`: those that
    learners read. Of several `patterns`, a learner is estimated for the one that needs most. `room`: bytes that
    passes of a streamed model may take on the device while they wait; if they need more, they wait on the host.
    `returns_weights`: whether results of the walk hold weights besides masks.
    """
    beside = bool(needs & (Stat.DRIFT | Stat.LAG))
    width, size = hidden_width(bundle), bundle.dtype.itemsize
    tokens = windows * window_tokens
    largest = largest_block(bundle)
    at_once = min(max(batch_tokens // window_tokens, 1) * window_tokens, tokens)  # whole windows
    block_layers = [bundle.block_layers(index) for index in range(len(bundle.blocks))]
    floats = converted(needs, converting=device == "cpu" or size == FLOAT)
    run = at_once * max(running(layers, width, size, floats) for layers in block_layers)
    run += (Stat.LAG in needs) * max(map(probing, bundle.blocks.values())) * at_once * width * size
    solve = max((solving(layer, needs) for layer in bundle.layers.values()), default=0)
    result = (1 + FLOAT * returns_weights) * max(math.prod(layer.shape) for layer in bundle.layers.values())
    # results of a streamed model on their way to the host, and the one that is made; or dense weights to be put back
    kept = max(max(block_weights(bundle)), result) + result if streamed else largest
    return Estimate(
        device,
        streamed,
        weights=live_bytes(bundle, streamed) + beside * largest,
        hidden=0
        if streamed and hidden_bytes(bundle, tokens, 1 + beside) > room
        else tokens * width * size * (2 * (1 + beside) + 1),  # arguments of paused passes: as much again
        statistics=max(together(layers, needs, sequential) for layers in block_layers),
        working=max(run, solve) + kept,
        learning=tuple(dict.fromkeys(learning(it, bundle, patterns, streamed, pool_tokens, room) for it in learners)),
    )


def learning(
    method: MaskLearner | WeightLearner,
    bundle: Bundle,
    patterns: Sequence[Pattern],
    streamed: bool,
    pool_tokens: int,
    room: int,
) -> Learning:
    """Return the estimate for one learner: of the whole model, or of its largest block if it learns block by block."""
    stored = max(layer.read().element_size() for layer in bundle.layers.values())
    each = bytes_each(method, patterns, stored)
    counts = block_weights(bundle)
    name = type(method).__name__
    if learns_whole(method):
        return Learning(name, bytes_of(bundle.model), None if each is None else round(each * sum(counts)))
    weights = live_bytes(bundle, streamed) + LEARNT * largest_block(bundle)
    hidden = hidden_bytes(bundle, pool_tokens, paths=2)
    own = None if each is None else round(each * max(counts))
    return Learning(name, weights, own, 0 if streamed and hidden > room else hidden, blockwise=True)


def bytes_each(method: MaskLearner | WeightLearner, patterns: Sequence[Pattern], itemsize: int) -> float | None:
    """Return the bytes of a learner for a prunable weight, at the pattern that needs most; None if not known."""
    of_patterns = [method.bytes_at(it, itemsize) for it in patterns] if isinstance(method, MaskLearner) else []
    each = of_patterns or [method.bytes_per_weight(itemsize)]
    known = [value for value in each if value is not None]
    return max(known) if len(known) == len(each) else None


def learns_whole(method: Method) -> bool:
    """Return True for a learner that needs the whole model on the device."""
    return isinstance(method, WeightLearner) or (isinstance(method, MaskLearner) and not method.blockwise)


def live_bytes(bundle: Bundle, streamed: bool) -> int:
    """Return the bytes of the weights on the device: of the whole model; if streamed, of one block and all outside."""
    away = sum(map(bytes_of, bundle.blocks.values())) - largest_block(bundle)
    return bytes_of(bundle.model) - streamed * away


def largest_block(bundle: Bundle) -> int:
    """Return the bytes of the largest block."""
    return max(map(bytes_of, bundle.blocks.values()))


def bytes_of(module: nn.Module) -> int:
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def together(layers: list[Layer], needs: Stat, sequential: bool) -> int:
    """Return the bytes of the statistics that are there at once: of a block, or of layers that may have one input."""
    sums: Counter[int] = Counter()
    for layer in layers:
        sums[layer.shape[1] if sequential else 0] += statistics(layer, needs)
    return max(sums.values(), default=0)


def statistics(layer: Layer, needs: Stat) -> int:
    """Return the bytes of the statistics of one layer."""
    outputs, inputs = layer.shape
    squares = (Stat.GRAM in needs) + (Stat.DRIFT in needs)
    return FLOAT * (inputs * inputs * squares + inputs + outputs * inputs * (Stat.LAG in needs))


def converted(needs: Stat, converting: bool) -> int:
    """Return how many float32 copies of the inputs of a layer are made for its statistics.

    `converting`: inputs are converted and squared for norms and Gram matrices, as they are unless a GPU multiplies
    halves. Differences from the dense model are always made in float32.
    """
    return 4 if needs & (Stat.DRIFT | Stat.LAG) else 2 * converting


def running(layers: list[Layer], width: int, size: int, floats: int) -> int:
    """Return the bytes of one token in a block: hidden states, the outputs of all layers, the largest input of a layer,
    and its `floats` copies in float32.
    """
    shapes = [layer.shape for layer in layers if not layer.fused or layer.where.expert == 0]
    largest = max((inputs for _, inputs in shapes), default=0)
    return size * (HIDDEN * width + sum(outputs for outputs, _ in shapes) + largest) + FLOAT * floats * largest


def probing(block: nn.Module) -> int:
    """Return the number of copies of the hidden states in the probe for taps: two of every module, ten to compare."""
    return 2 * sum(1 for _ in block.modules()) + 10


def solving(layer: Layer, needs: Stat) -> int:
    """Return the bytes that a method needs to prune one layer: a scorer, or a solver or refiner with Gram matrices.

    The method is given a copy of the weight.
    """
    outputs, inputs = layer.shape
    copy = outputs * inputs * layer.dtype.itemsize
    if not needs & (Stat.GRAM | Stat.DRIFT):
        return copy + FLOAT * RANKING * outputs * inputs
    phases = [FACTORING, SWEEPING] + [REFINING] * bool(needs & (Stat.DRIFT | Stat.LAG))
    return copy + FLOAT * max(inputs * (grams * inputs + copies * outputs) for grams, copies in phases)


def changes_weights(method: Method) -> bool:
    """Return True if the results of a method hold weights besides masks."""
    return isinstance(method, Layerwise) and not isinstance(method, (Scorer, Refiner))


def planned(
    bundle: Bundle, spec: ResolvedSpec, methods: Sequence[Method], device: torch.device, streamed: bool
) -> Estimate:
    """Return the estimate of the device memory that `methods` need."""
    needs = Stat.NONE
    walked = [method for method in methods if isinstance(method, Layerwise) and method.needs is not Stat.NONE]
    for method in walked:
        needs |= method.needs
    learners = [method for method in methods if isinstance(method, (MaskLearner, WeightLearner))]
    at_once = batch_tokens(bundle, device)
    in_turn = all(method.sequential for method in walked)
    room = room_for(bundle, device, taken=0 if bundle.streaming else live_bytes(bundle, streamed=True))
    launch = Launch.of()
    windows = -(-spec.windows // launch.size) if launch else spec.windows  # of a rank
    walk = needs, windows, spec.window_tokens, device.type, streamed, at_once
    returned = any(map(changes_weights, methods))
    return estimate(bundle, *walk, learners, in_turn, spec.pool_tokens, spec.patterns, room, returned)
