"""One method on one bundle: from dense weights to masks (and perhaps repaired weights).

Nothing here changes the bundle for good: a walk writes pruned weights into the live blocks so that the blocks below see
them, and puts the dense ones back as soon as it has passed a block; if something is raised, the whole model is put
back. At the end of the job the whole model is put back in any case, and that is proven by hash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nmbench.calibration.finite import ONE_BY_ONE, Checks
from nmbench.calibration.gram import full_float32
from nmbench.calibration.step import FewTokens
from nmbench.calibration.walk import walk
from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.methods import Baseline, LayerStats, Pruned, PrunedModel, Refiner, Scorer, Solver, Stat
from nmbench.models.bundle import Bundle, Layer
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern, not_finite, top_of_finite
from nmbench.runtime.cost import Cost
from nmbench.verification.strict import check_masks, check_weight

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
    init: Baseline | None = None,
) -> PrunedModel:
    """Run a one-shot method over all layers; `windows` is int64 `[windows, window_tokens]`.

    `init` is the method whose masks a `Refiner` starts from. Raises `NMBenchError` naming the layer where the method
    failed.
    """
    needs = method.needs | (init.needs if init else Stat.NONE)
    if needs is Stat.NONE:
        return prune_layers(bundle, method, patterns, who, report, init)

    def walked(checks: Checks) -> PrunedModel:
        layers: dict[str, Pruned] = {}
        few = FewTokens()
        block_tokens = 0
        try:
            for step in walk(bundle, windows, needs, method.sequential, method.skip_tokens, undo=True, checks=checks):
                for layer in step.layers:
                    stats = step.stats[layer.name]
                    pruned = prune_layer(method, layer, stats, patterns[layer.name], who, init, checks)
                    layer.write(applied(pruned, layer.read()))
                    layers[layer.name] = kept(pruned, bundle.host)
                few.note(step)
                block_tokens += step.block_tokens
                if step.last:
                    report(step.index + 1, len(bundle.blocks))
        except BaseException:
            dense.put_back()
            raise
        dense.undo_hooks()
        cost.forward_tokens += block_tokens // len(bundle.blocks)
        cost.unique_tokens += windows.numel()
        whole = finished({name: layers[name] for name in bundle.layers}, method)
        return PrunedModel(whole.layers, {**whole.notes, **few.notes})

    if isinstance(method, Scorer) and needs is Stat.INPUT_NORM and looks_wait(bundle):
        return checked_later(walked, who)
    return walked(ONE_BY_ONE)


def looks_wait(bundle: Bundle) -> bool:
    """Whether to look at a number takes more than that; what is streamed is waited for in any case."""
    return bundle.device.type == "cuda" and bundle.streaming is None


def checked_later(walked: Callable[[Checks], PrunedModel], who: str) -> PrunedModel:
    """What a walk returns that is checked when it is through.

    If something was not finite, the walk is done again and stops there. Raises `NumericalFailure` if it does not.
    """
    checks = Checks(later=True)
    try:
        pruned = walked(checks)
    except Exception:
        if not has_failed(checks):
            raise
    else:
        if not checks.failed():
            return pruned
    walked(ONE_BY_ONE)
    raise NumericalFailure(
        f"{who} met NaN or infinite inputs or scores, and did not when it was repeated; nothing it does on this device "
        f"can be relied on."
    )


def has_failed(checks: Checks) -> bool:
    """Whether something is not finite, as far as the device can still tell after an error."""
    try:
        return checks.failed()
    except RuntimeError:
        return False


def prune_layers(
    bundle: Bundle,
    method: Baseline,
    patterns: Mapping[str, Pattern],
    who: str,
    report: Report,
    init: Baseline | None = None,
) -> PrunedModel:
    """Run a method that needs no statistics: no walk, no tokens."""
    layers = {}
    for index, (name, layer) in enumerate(bundle.layers.items()):
        with bundle.holding(list(bundle.blocks.values())[layer.block]):
            pruned = prune_layer(method, layer, LayerStats(windows=0, tokens=0), patterns[name], who, init)
        layers[name] = kept(pruned, bundle.host)
        report(index + 1, len(bundle.layers))
    return finished(layers, method)


def kept(pruned: Pruned, host: torch.device) -> Pruned:
    """A pruned layer where the model waits."""
    weight = None if pruned.weight is None else pruned.weight.to(host)
    return dataclasses.replace(pruned, mask=pruned.mask.to(host), weight=weight)


def prune_layer(
    method: Baseline,
    layer: Layer,
    stats: LayerStats,
    pattern: Pattern,
    who: str,
    init: Baseline | None = None,
    checks: Checks = ONE_BY_ONE,
) -> Pruned:
    """Prune one layer and check what came back, so that a broken mask never reaches the layers below.

    Masks from scores are our own work; their strictness is proven with that of the weights that are measured.
    """
    mask = prune_layer(init, layer, stats, pattern, f"{who}@init").mask if init else None
    try:
        with full_float32():
            pruned = choose(method, layer.read().clone(), stats, pattern, mask, checks)
            check_pruned(pruned, layer)
    except NMBenchError as error:
        raise type(error)(f"{who} failed in {layer.name}: {error}") from error
    except Exception as error:
        hint = "; a statistic that its `needs` do not name is None" if "NoneType" in str(error) else ""
        raise NMBenchError(f"{who} failed in {layer.name}: {type(error).__name__}: {error}{hint}") from error
    if not isinstance(method, Scorer):
        check_masks({layer.name: pruned.mask}, {layer.name: pattern}, {layer.name: layer.shape}, who)
    if pruned.weight is not None:
        if pruned.weight.shape != layer.read().shape:
            raise NMBenchError(f"{who} returned weights of shape {tuple(pruned.weight.shape)} for {layer.name}.")
        check_weight(pruned.weight, pruned.mask, layer.name, who)
    return pruned


def check_pruned(pruned: object, layer: Layer) -> None:
    """Raise `NMBenchError` unless a method returned a `Pruned` whose tensors are where the layer is."""
    if not isinstance(pruned, Pruned):
        raise NMBenchError(f"it returned {type(pruned).__name__} instead of nmbench.Pruned.")
    for what, tensor in (("mask", pruned.mask), ("weight", pruned.weight)):
        if isinstance(tensor, Tensor):
            check_device(tensor, layer.read(), f"a {what}")


def check_device(returned: Tensor, weight: Tensor, what: str) -> None:
    if returned.device != weight.device:
        raise NMBenchError(f"it returned {what} on {returned.device}, the layer is on {weight.device}.")


@torch.no_grad()
def choose(
    method: Baseline,
    weight: Tensor,
    stats: LayerStats,
    pattern: Pattern,
    mask: Tensor | None = None,
    checks: Checks = ONE_BY_ONE,
) -> Pruned:
    """Scores become a mask here; a solver brings its own, a refiner is given one. The method gets copies."""
    if isinstance(method, Scorer):
        score = method.score(weight, stats)
        if not isinstance(score, Tensor):
            raise NMBenchError(f"it returned {type(score).__name__} instead of scores.")
        if score.shape != weight.shape:
            raise NMBenchError(f"scores have shape {tuple(score.shape)} instead of {tuple(weight.shape)}.")
        check_device(score, weight, "scores")
        checks.finite(score, lambda: not_finite(score))
        return Pruned(top_of_finite(pattern, score))
    if isinstance(method, Solver):
        return method.solve(weight, stats, pattern)
    if isinstance(method, Refiner):
        assert mask is not None
        return method.refine(weight, stats, mask, pattern)
    raise NMBenchError(f"{type(method).__name__} is neither a Scorer, a Solver nor a Refiner.")


def finished(layers: Mapping[str, Pruned], method: Baseline) -> PrunedModel:
    """Drop the repaired weights where only the mask is wanted, and collect notes and mean figures."""
    notes: dict[str, Any] = {name: pruned.note for name, pruned in layers.items() if pruned.note}
    for figure in dict.fromkeys(name for pruned in layers.values() for name in pruned.figures):
        values = [pruned.figures[figure] for pruned in layers.values() if figure in pruned.figures]
        notes[figure] = round(sum(values) / len(values), 4)
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
        dense = layer.read()
        layer.write(applied(kept(pruned.layers[name], dense.device), dense))
