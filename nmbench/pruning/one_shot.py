"""One one-shot method on one model: from dense weights to masks, and repaired weights if the method repairs.

Every change of the model is undone. A walk writes pruned weights into the live block, so that the statistics of later
blocks come from pruned inputs, and restores the dense weights when the walk has passed the block. After an exception,
and at the end of the job, the dense weights of the whole model are restored; a hash proves this at the end of the job.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nmbench.calibration.across_ranks import check_same, made_by
from nmbench.calibration.finite import ONE_BY_ONE, Checks, checked_later
from nmbench.calibration.gram import full_float32
from nmbench.calibration.step import FewTokens
from nmbench.calibration.walk import walk
from nmbench.errors import NMBenchError
from nmbench.methods import Baseline, LayerStats, Layerwise, Pruned, PrunedModel, Refiner, Scorer, Solver, Stat
from nmbench.models.applying import applied
from nmbench.models.bundle import Bundle, Layer
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.keeping import Keeping
from nmbench.pattern import Pattern, not_finite
from nmbench.runtime.cost import NOTHING, Cost, Spent
from nmbench.runtime.ranks import ALONE, Ranks
from nmbench.verification.strict import check_masks, check_weight

Report = Callable[[int, int], None]
Make = Callable[[Layer, LayerStats, Checks], Pruned]


class Named(Protocol):
    """A layer or a block."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Walked:
    """The result for every layer, `experts` for the record, and the tokens that were read."""

    layers: Mapping[str, Pruned]
    experts: Mapping[str, Any]
    cost: Cost


@dataclass(frozen=True)
class Made:
    """A pruned model and its cost (None: unknown).

    `earlier`: the time spent in an interrupted process, or on the start.
    """

    pruned: PrunedModel
    cost: Cost | None
    earlier: Spent = NOTHING


def prune_one_shot(
    bundle: Bundle,
    dense: DenseWeights,
    method: Baseline,
    patterns: Mapping[str, Pattern],
    windows: Tensor,
    who: str,
    report: Report = lambda done, total: None,
    init: Baseline | None = None,
    deferred: bool | None = None,
    ranks: Ranks = ALONE,
) -> Made:
    """Return the result of a one-shot method for all layers; `windows` is int64 `[windows, window_tokens]`.

    `ranks` share the work, and all get the result. `init` makes the masks that a `Refiner` starts from. `deferred`:
    whether statistics and scores are checked to be finite after the walk instead of layer by layer, for a scorer that
    needs input norms alone; None: deferred if reading a value back blocks the host.

    Raises `NMBenchError` naming the layer where the method failed.
    """
    needs = method.needs | (init.needs if init else Stat.NONE)

    def make(layer: Layer, stats: LayerStats, checks: Checks) -> Pruned:
        return prune_layer(method, layer, stats, patterns[layer.name], who, init, checks)

    def walked(checks: Checks) -> Made:
        return finished(through_layers(bundle, dense, windows, method, needs, make, report, checks, ranks), method)

    deferred = reading_blocks(bundle) if deferred is None else deferred
    if deferred and isinstance(method, Scorer) and needs is Stat.INPUT_NORM:
        return checked_later(walked, who, ranks)
    return walked(ONE_BY_ONE)


def through_layers(
    bundle: Bundle,
    dense: DenseWeights,
    windows: Tensor,
    method: Layerwise,
    needs: Stat,
    make: Make,
    report: Report,
    checks: Checks = ONE_BY_ONE,
    ranks: Ranks = ALONE,
) -> Walked:
    """Return what `make` makes of every layer and its statistics; later layers see what earlier ones have become.

    Without statistics there is no walk and no token. `ranks` share windows and layers. The dense weights are put back,
    also after an exception.
    """
    if needs is Stat.NONE:
        return Walked(without_statistics(bundle, make, report), {}, Cost())
    few, block_tokens = FewTokens(), 0
    sequential, skip = method.sequential, method.skip_tokens

    def make_now(layer: Layer, stats: LayerStats) -> Pruned:
        return make(layer, stats, checks)

    try:
        with ranks.failing_together(), Keeping(bundle) as keeping:
            for step in walk(bundle, windows, needs, sequential, skip, undo=True, checks=checks, ranks=ranks):
                for layer, pruned in made_by(ranks, step, make_now, costly(method)):
                    layer.write(applied(pruned, layer.read()))
                    keeping.take(layer.name, pruned)
                few.note(step)
                block_tokens += step.block_tokens
                if step.last:
                    report(step.index + 1, len(bundle.blocks))
                del step  # its statistics, before those of the next step are gathered beside them
            layers = keeping.layers()
            check_same(ranks, layers)
    except BaseException:
        dense.put_back()
        raise
    dense.undo_hooks()
    cost = Cost(forward_tokens=block_tokens // len(bundle.blocks), unique_tokens=windows.numel())
    return Walked({name: layers[name] for name in bundle.layers}, few.experts, cost)


def costly(method: Layerwise) -> bool:
    """Return True if one rank should make a layer for all: a score takes no longer than to send the mask."""
    return not isinstance(method, Scorer)


def without_statistics(bundle: Bundle, make: Make, report: Report) -> dict[str, Pruned]:
    """Return what `make` makes of every layer without statistics."""
    with Keeping(bundle) as keeping:
        for index, (name, layer) in enumerate(bundle.layers.items()):
            with bundle.holding(list(bundle.blocks.values())[layer.block], undo=True):
                keeping.take(name, make(layer, LayerStats(windows=0, tokens=0), ONE_BY_ONE))
            report(index + 1, len(bundle.layers))
        return keeping.layers()


def reading_blocks(bundle: Bundle) -> bool:
    """Return True if reading a value back is the only step that blocks the host; streaming blocks does so as well."""
    return bundle.device.type == "cuda" and bundle.streaming is None


def prune_layer(
    method: Baseline,
    layer: Layer,
    stats: LayerStats,
    pattern: Pattern,
    who: str,
    init: Baseline | None = None,
    checks: Checks = ONE_BY_ONE,
) -> Pruned:
    """Return one pruned layer after checking the result, so that no later layer is calibrated on a broken mask.

    The host makes masks from scores; such masks are proven strict together with the weights that are measured.
    Raises `NMBenchError` with the name of the layer.
    """
    mask = prune_layer(init, layer, stats, pattern, f"{who}@init").mask if init else None
    with naming(layer, who):
        pruned = choose(method, own_values(layer), stats, pattern, mask, checks)
        check_pruned(pruned, layer)
    if not isinstance(method, Scorer):
        check_masks({layer.name: pruned.mask}, {layer.name: pattern}, {layer.name: layer.shape}, who)
    if pruned.weight is not None and isinstance(method, Refiner):
        raise NMBenchError(
            f"{who} is a refiner and returned weights for {layer.name}; a refined mask is measured on the dense "
            f"weights: return the mask alone, or make the method a Solver, or a LayerRepair that keeps the mask."
        )
    check_weights(pruned, layer, who)
    return pruned


@contextlib.contextmanager
def naming(layer: Named, who: str) -> Iterator[None]:
    """Turn every exception of a method into one that names the method and the layer or block."""
    try:
        yield
    except NMBenchError as error:
        raise type(error)(f"{who} failed in {layer.name}: {error}") from error
    except Exception as error:
        hint = "; a statistic that its `needs` do not name is None" if "NoneType" in str(error) else ""
        raise NMBenchError(f"{who} failed in {layer.name}: {type(error).__name__}: {error}{hint}") from error


def check_weights(pruned: Pruned, layer: Layer, who: str) -> None:
    """Raise `NMBenchError` for returned weights of another shape, and unless they are zero off the mask."""
    if pruned.weight is not None:
        if pruned.weight.shape != layer.read().shape:
            raise NMBenchError(f"{who} returned weights of shape {tuple(pruned.weight.shape)} for {layer.name}.")
        check_weight(pruned.weight, pruned.mask, layer.name, who)


def check_pruned(pruned: object, layer: Layer) -> None:
    """Raise `NMBenchError` unless a method returned a `Pruned` whose tensors are on the device of the layer."""
    if not isinstance(pruned, Pruned):
        raise NMBenchError(f"it returned {type(pruned).__name__} instead of nmbench.Pruned.")
    for what, tensor in (("mask", pruned.mask), ("weight", pruned.weight)):
        if isinstance(tensor, Tensor):
            check_device(tensor, layer.read(), f"a {what}")


def check_device(returned: Tensor, weight: Tensor, what: str) -> None:
    """Raise `NMBenchError` unless `returned` is on the device of the layer."""
    if returned.device != weight.device:
        raise NMBenchError(f"it returned {what} on {returned.device}, the layer is on {weight.device}.")


@torch.no_grad()
def call(method: Baseline, weight: Tensor, stats: LayerStats, pattern: Pattern, mask: Tensor | None = None) -> Any:
    """Return the result of a one-shot method for one layer: scores of a scorer, else a `Pruned`; a refiner gets `mask`.

    The method runs without gradients, with float32 products in full precision.
    """
    with full_float32():
        if isinstance(method, Scorer):
            return method.score(weight, stats)
        if isinstance(method, Solver):
            return method.solve(weight, stats, pattern)
        if isinstance(method, Refiner):
            assert mask is not None
            return method.refine(weight, stats, mask, pattern)
    raise NMBenchError(f"{type(method).__name__} is neither a Scorer, a Solver nor a Refiner.")


def own_values(layer: Layer) -> Tensor:
    """Return a copy of the weight `[out, in]` in its floating-point dtype."""
    return layer.values() if layer.eight_bit else layer.read().clone()


def choose(
    method: Baseline,
    weight: Tensor,
    stats: LayerStats,
    pattern: Pattern,
    mask: Tensor | None = None,
    checks: Checks = ONE_BY_ONE,
) -> Pruned:
    """Return the pruned layer; scores become a mask. `weight` `[out, in]` is a copy that the method may change."""
    found = call(method, weight, stats, pattern, mask)
    return masked_by(found, weight, pattern, checks, method.unit_power) if isinstance(method, Scorer) else found


def masked_by(score: object, weight: Tensor, pattern: Pattern, checks: Checks, unit_power: int) -> Pruned:
    """Return the mask of the highest scores. Raises `NMBenchError` for scores of another shape, device or type."""
    if not isinstance(score, Tensor):
        raise NMBenchError(f"it returned {type(score).__name__} instead of scores.")
    if score.shape != weight.shape:
        raise NMBenchError(f"scores have shape {tuple(score.shape)} instead of {tuple(weight.shape)}.")
    check_device(score, weight, "scores")
    checks.finite(score, lambda: not_finite(score))
    return Pruned(pattern.top_of_finite(score, unit_power))


def finished(walked: Walked, method: Layerwise) -> Made:
    """Return the pruned model with notes and mean figures, without repaired weights if `mask_only` is set."""
    layers = walked.layers
    layer_notes = {name: pruned.note for name, pruned in layers.items() if pruned.note}
    figures = {}
    for figure in dict.fromkeys(name for pruned in layers.values() for name in pruned.figures):
        values = [pruned.figures[figure] for pruned in layers.values() if figure in pruned.figures]
        figures[figure] = round(sum(values) / len(values), 4)
    if isinstance(method, Solver) and method.mask_only:
        layers = {name: Pruned(pruned.mask) for name, pruned in layers.items()}
    pruned = PrunedModel(layers, layer_notes=layer_notes, figures=figures, experts=walked.experts)
    return Made(pruned, walked.cost)
