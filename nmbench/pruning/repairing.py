"""One repair on one row: layer by layer, block by block, or the whole model; the mask stays that of the start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nmbench.calibration.finite import Checks
from nmbench.calibration.gram import full_float32
from nmbench.errors import NMBenchError
from nmbench.methods import BlockRepair, LayerRepair, LayerStats, Pruned, PrunedModel, WeightLearner
from nmbench.models.applying import applied, moved
from nmbench.models.bundle import Bundle, Layer
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.block_parts import BlockTask, Tally
from nmbench.pruning.blocks import Blocks
from nmbench.pruning.learning import CheckpointStore
from nmbench.pruning.one_shot import Made, Report, check_pruned, check_weights, finished, naming, through_layers
from nmbench.pruning.weights_task import WeightTask
from nmbench.runtime.cost import Spent
from nmbench.runtime.ranks import ALONE, Ranks
from nmbench.verification.strict import check_masks, check_weight


def repaired_layers(
    bundle: Bundle,
    dense: DenseWeights,
    method: LayerRepair,
    patterns: Mapping[str, Pattern],
    windows: Tensor,
    who: str,
    start: PrunedModel,
    report: Report = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> Made:
    """Return the layers of `start` repaired one after the other; `windows` is int64 `[windows, window_tokens]`.

    `ranks` share the work, and all get the result. Raises `NMBenchError` naming the layer where the method failed, or
    whose mask it changed.
    """

    def make(layer: Layer, stats: LayerStats, checks: Checks) -> Pruned:
        return repaired_layer(method, layer, stats, patterns[layer.name], start.layers[layer.name], who)

    walked = through_layers(bundle, dense, windows, method, method.needs, make, report, ranks=ranks)
    made = finished(walked, method)
    return dataclasses.replace(made, pruned=dataclasses.replace(made.pruned, others=start.others))


def repaired_layer(
    method: LayerRepair, layer: Layer, stats: LayerStats, pattern: Pattern, start: Pruned, who: str
) -> Pruned:
    """Return one repaired layer after checking the result."""
    dense = layer.read().clone()
    start = moved(start, dense.device)
    with naming(layer, who):
        pruned = call_repair(method, dense, stats, Pruned(start.mask, applied(start, dense)), pattern)
        check_pruned(pruned, layer)
    check_kept(pruned.mask, start.mask, layer.name, who)
    check_weights(pruned, layer, who)
    return pruned


@torch.no_grad()
def call_repair(method: LayerRepair, weight: Tensor, stats: LayerStats, start: Pruned, pattern: Pattern) -> Any:
    """Return the result of a layer repair, without gradients and with float32 products in full precision."""
    with full_float32():
        return method.repair(weight, stats, start, pattern)


def check_kept(mask: Tensor, start: Tensor, name: str, who: str) -> None:
    """Raise `NMBenchError` unless a repaired layer has the mask of the start."""
    if mask.shape != start.shape or not torch.equal(mask, start.to(mask.device)):
        raise NMBenchError(f"{who} changed the mask of {name}; a repair keeps the mask that it begins with.")


def repaired_blocks(
    blocks: Blocks,
    method: BlockRepair,
    who: str,
    store: BlockStore,
    report: Report = lambda done, total: None,
) -> Made:
    """Return the blocks of a start repaired one after the other; every finished block is kept in `store`.

    Raises `NMBenchError` naming the block where the method failed.
    """

    def learn(task: BlockTask) -> Mapping[str, Tensor]:
        with naming(task, who):
            tensors = method.repair_block(task)
        check_block(tensors, task, who)
        return tensors

    layers = {name: Pruned(pruned.mask, pruned.weight) for name, pruned in blocks.start.layers.items()}
    others, curve = dict(blocks.start.others), []
    for task, tensors in blocks.visit(learn, lambda index: store.load(index, blocks.tally)):
        kept = {name: tensor.to(live_of(name, task).dtype) for name, tensor in tensors.items()}
        store.save(task, kept)
        for name, tensor in kept.items():
            here = tensor.to(blocks.bundle.host)
            if name in layers:
                layers[name] = Pruned(layers[name].mask, here)
            else:
                others[name] = here
        curve.append({"step": task.index + 1, **store.figures[task.index]})
        report(task.index + 1, task.blocks)
    notes = trained_share(blocks.bundle, others) if others else {}
    return Made(PrunedModel(layers, notes=notes, curve=curve, others=others), blocks.cost(), store.earlier)


def live_of(name: str, task: BlockTask) -> Tensor:
    """Return the live tensor of a layer, or of another parameter of the block."""
    return task.layers[name].read() if name in task.layers else task.others[name]


def check_block(tensors: object, task: BlockTask, who: str) -> None:
    """Raise `NMBenchError` unless a block repair returned tensors of the block, finite and zero off the mask."""
    if not isinstance(tensors, Mapping):
        raise NMBenchError(f"{who} returned {type(tensors).__name__} instead of trained tensors for {task.name}.")
    for name, tensor in tensors.items():
        like = task.weights.get(name, task.others.get(name))
        if like is None:
            raise NMBenchError(f"{who} returned {name}, which is no parameter of {task.name}.")
        check_shape(tensor, like, name, who)
        mask = task.masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
        check_weight(tensor, mask.to(tensor.device), name, who)


def check_shape(tensor: Tensor, like: Tensor, name: str, who: str) -> None:
    """Raise `NMBenchError` unless a returned tensor has the shape of the one that it takes the place of."""
    if tensor.shape != like.shape:
        raise NMBenchError(f"{who} returned {name} of shape {tuple(tensor.shape)} instead of {tuple(like.shape)}.")


def trained_share(bundle: Bundle, others: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the note on trained parameters that are no prunable weights: their number, and their share."""
    count = sum(tensor.numel() for tensor in others.values())
    weights = sum(layer.read().numel() for layer in bundle.layers.values())
    return {"other_parameters": count, "share_of_trained": count / (count + weights)}


class BlockStore:
    """The finished blocks of one job in files of their own, so that a killed repair goes on with the next block.

    `figures`: those that the repair reported, by block.
    """

    def __init__(self, checkpoints: Callable[[int], CheckpointStore]) -> None:
        self.checkpoints = checkpoints
        self.figures: dict[int, Mapping[str, float]] = {}
        self.earlier = Spent()
        self._start = Spent.now()
        self._loaded: set[int] = set()

    def load(self, index: int, tally: Tally) -> Mapping[str, Tensor] | None:
        """Return the tensors of a block that was finished before, and set `tally` to the tokens up to it; else None."""
        state = self.checkpoints(index).load()
        if state is None:
            return None
        self.figures[index] = state["figures"]
        self.earlier = Spent(state["seconds"], state.get("cpu_seconds"))
        tally.forward, tally.backward = state["forward"], state["backward"]
        self._start = Spent.now()
        self._loaded.add(index)
        return dict(state["tensors"])

    def save(self, task: BlockTask, tensors: Mapping[str, Tensor]) -> None:
        """Store a block that was finished now; it is durable when this returns."""
        if task.index in self._loaded:
            return
        self.figures[task.index] = task.figures
        spent = self.earlier + Spent.now().since(self._start)
        counted = {"forward": task.tally.forward, "backward": task.tally.backward, **asdict(spent)}
        self.checkpoints(task.index).save({"tensors": dict(tensors), "figures": task.figures, **counted})


def repaired_model(method: WeightLearner, task: WeightTask) -> Made:
    """Return the result of a weight learner; the dense weights are live again.

    Raises `NMBenchError` if a weight is not zero off the mask, or if the mask changed and the method does not choose.
    """
    found = method.learn(task)
    check_masks({name: pruned.mask for name, pruned in found.items()}, task.pattern, task.layers, task.who)
    for name, pruned in found.items():
        if not method.chooses:
            check_kept(pruned.mask, task.initial[name], name, task.who)
        if pruned.weight is not None:
            check_shape(pruned.weight, task.weights[name], name, task.who)
            check_weight(pruned.weight, pruned.mask.to(pruned.weight.device), name, task.who)
    host = task.bundle.host
    layers = {name: moved(pruned, host) for name, pruned in found.items()}
    model = PrunedModel(layers, task.notes, experts=task.experts, curve=task.curve, others=task.start.others)
    return Made(model, task.settle(), task.checkpoints.earlier)
