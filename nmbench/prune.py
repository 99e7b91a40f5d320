"""One method on one bundle: from dense weights to masks (and perhaps repaired weights).

Nothing here changes the bundle for good: a walk writes pruned weights into the live blocks so that the blocks below see
them, and the dense weights are restored when it ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nmbench.calibrate import full_float32, walk
from nmbench.errors import NMBenchError
from nmbench.meter import Cost
from nmbench.methods import Baseline, LayerStats, Pruned, PrunedModel, Scorer, Solver, Stat
from nmbench.models import Bundle, DenseWeights, Layer
from nmbench.pattern import Pattern
from nmbench.validate import check_masks, check_weight

Report = Callable[[int, int], None]


def prune_one_shot(
    bundle: Bundle,
    dense: DenseWeights,
    method: Baseline,
    patterns: Mapping[str, Pattern],
    windows: Tensor,
    who: str,
    cost: Cost,
    report: Report = lambda done, total: None,
) -> PrunedModel:
    """Run a `Scorer` or `Solver` over all layers; `windows` is int64 `[windows, window_tokens]`.

    Raises `NMBenchError` naming the layer where the method failed.
    """
    if method.needs is Stat.NONE:
        return prune_layers(bundle, method, patterns, who, report)
    layers: dict[str, Pruned] = {}
    try:
        for step in walk(bundle, windows, method.needs):
            for layer in step.layers:
                pruned = prune_layer(method, layer, step.stats[layer.name], patterns[layer.name], who)
                layer.write(applied(pruned, layer.read()))
                layers[layer.name] = pruned
            report(step.index + 1, len(bundle.blocks))
    finally:
        dense.restore()
    cost.forward_tokens += 2 * windows.numel()  # to gather, and to go on through the pruned block
    cost.unique_tokens += windows.numel()
    return finished(layers, method)


def prune_layers(
    bundle: Bundle, method: Baseline, patterns: Mapping[str, Pattern], who: str, report: Report
) -> PrunedModel:
    """Run a method that needs no statistics: no walk, no tokens."""
    layers = {}
    for index, (name, layer) in enumerate(bundle.layers.items()):
        layers[name] = prune_layer(method, layer, LayerStats(windows=0, tokens=0), patterns[name], who)
        report(index + 1, len(bundle.layers))
    return finished(layers, method)


def prune_layer(method: Baseline, layer: Layer, stats: LayerStats, pattern: Pattern, who: str) -> Pruned:
    """Prune one layer and check what came back, so that a broken mask never reaches the layers below."""
    try:
        with full_float32():
            pruned = choose(method, layer.read().clone(), stats, pattern)
    except NMBenchError as error:
        raise type(error)(f"{who} failed in {layer.name}: {error}") from error
    check_masks({layer.name: pruned.mask}, {layer.name: pattern}, {layer.name: layer.shape}, who)
    if pruned.weight is not None:
        if pruned.weight.shape != layer.read().shape:
            raise NMBenchError(f"{who} returned weights of shape {tuple(pruned.weight.shape)} for {layer.name}.")
        check_weight(pruned.weight, pruned.mask, layer.name, who)
    return pruned


@torch.no_grad()
def choose(method: Baseline, weight: Tensor, stats: LayerStats, pattern: Pattern) -> Pruned:
    """Scores become a mask here; a solver brings its own. The method gets a copy of the weight."""
    if isinstance(method, Scorer):
        score = method.score(weight, stats)
        if score.shape != weight.shape:
            raise NMBenchError(f"scores have shape {tuple(score.shape)} instead of {tuple(weight.shape)}.")
        return Pruned(pattern.top(score))
    if isinstance(method, Solver):
        return method.solve(weight, stats, pattern)
    raise NMBenchError(f"{type(method).__name__} is neither a Scorer nor a Solver.")


def finished(layers: Mapping[str, Pruned], method: Baseline) -> PrunedModel:
    """Drop the repaired weights where only the mask is wanted, and collect the notes."""
    notes = {name: pruned.note for name, pruned in layers.items() if pruned.note}
    if isinstance(method, Solver) and method.mask_only:
        layers = {name: Pruned(pruned.mask) for name, pruned in layers.items()}
    return PrunedModel(layers, notes)


def applied(pruned: Pruned, dense: Tensor) -> Tensor:
    """The weight to evaluate: kept weights, repaired or dense, and positive zeros elsewhere."""
    weight = dense if pruned.weight is None else pruned.weight.to(dense.dtype)
    return weight.masked_fill(~pruned.mask, 0.0)


def apply(bundle: Bundle, pruned: PrunedModel) -> None:
    """Write a pruned model into the live one."""
    for name, layer in bundle.layers.items():
        layer.write(applied(pruned.layers[name], layer.read()))
