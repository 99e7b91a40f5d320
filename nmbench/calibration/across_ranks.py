"""Where the ranks of torchrun meet in a walk; with one process nothing is exchanged.

1. Every rank has the whole model, and walks its share of the windows: neighbouring ones (`Ranks.part`).
2. When all batches have gone through a block, counts become those of all ranks (`pooled`): the tokens that reached each
   layer, and the layers with the same inputs. The statistics are added up (`added_up`), float32 as ever, so that every
   rank has the same bits, those of all windows. They differ from those of one process by the order of the sum alone.
3. Where the layers are costly to make, each is made by one rank, and its mask and weights go to all others (`made_by`).
4. At the end the ranks compare checksums of all masks (`check_same`).

What is found out with a first batch (stages, taps) is found out by rank 0 (`found_by_first`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from nmbench.calibration.shared_inputs import CommonInputs
from nmbench.calibration.statistics import Gatherer
from nmbench.calibration.step import Step
from nmbench.methods import LayerStats, Pruned
from nmbench.models.bundle import Layer
from nmbench.models.hashing import masks_checksum
from nmbench.runtime.ranks import Ranks

Found = TypeVar("Found")


def found_by_first(ranks: Ranks, find: Callable[[], Found]) -> Found:
    """Return what rank 0 finds; the others do not look."""
    found: Found = ranks.decided(find() if ranks.leads else None)
    return found


def pooled(ranks: Ranks, gatherers: Collection[Gatherer], common: CommonInputs | None, tokens: int) -> int:
    """Return the sum of `tokens` over ranks, and make the counts of gatherers and of common inputs sums as well."""
    if ranks.size == 1:
        return tokens
    counts = common.counts if common else None
    found = ranks.said((tokens, [gatherer.tokens for gatherer in gatherers], counts))
    for gatherer, reached in zip(gatherers, zip(*(reached for _, reached, _ in found), strict=True), strict=True):
        gatherer.tokens = sum(reached)
    if common:
        common.pool([counts for _, _, counts in found])
    return sum(own for own, _, _ in found)


def added_up(ranks: Ranks, gatherers: Collection[Gatherer]) -> None:
    """Make the statistics of every gatherer their sums over ranks."""
    ranks.add_up([values for gatherer in gatherers for values in gatherer.sums])


class Form(NamedTuple):
    """A made layer but for its numbers: the dtype of its weights, None if it has none, its note and figures."""

    dtype: torch.dtype | None
    note: str
    figures: Mapping[str, float]

    @classmethod
    def of(cls, made: Pruned) -> Form:
        return cls(None if made.weight is None else made.weight.dtype, made.note, dict(made.figures))


def made_by(
    ranks: Ranks, step: Step, make: Callable[[Layer, LayerStats], Pruned], dealt: bool
) -> Iterator[tuple[Layer, Pruned]]:
    """Yield the layers of a step and what `make` makes of them: if `dealt` each on one rank, otherwise on every rank.

    An error of `make` on one rank is an error on all, in the context `Ranks.failing_together`.
    """
    if ranks.size == 1 or not dealt:
        for layer in step.layers:
            yield layer, make(layer, step.stats[layer.name])
        return
    owners = dealt_out(step.layers, ranks.size)
    own = {la.name: make(la, step.stats[la.name]) for la in step.layers if owners[la.name] == ranks.rank}
    yield from zip(step.layers, exchanged(ranks, step.layers, owners, own), strict=True)


def dealt_out(layers: Sequence[Layer], size: int) -> dict[str, int]:
    """Return the rank that makes each layer: the largest first, each for the rank with the least to do.

    The time of a layer `[out, in]` is taken to grow as in^2 (in + out), as that of a factorisation and a sweep does.
    """
    times = {layer.name: layer.shape[1] ** 2 * sum(layer.shape) for layer in layers}
    owners, loads = {}, [0] * size
    for name in sorted(times, key=lambda name: -times[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += times[name]
    return owners


def exchanged(
    ranks: Ranks, layers: Sequence[Layer], owners: Mapping[str, int], own: Mapping[str, Pruned]
) -> list[Pruned]:
    """Return all layers, bit by bit as their owners made them; `own`: those of this rank."""
    known = {name: Form.of(made) for name, made in own.items()}
    forms = {name: form for said in ranks.said(known) for name, form in said.items()}
    with ranks.losing():
        return [received(ranks, layer, owners[layer.name], own.get(layer.name), forms[layer.name]) for layer in layers]


def received(ranks: Ranks, layer: Layer, owner: int, own: Pruned | None, form: Form) -> Pruned:
    """Return one layer as rank `owner` made it, which is this rank if there is an `own`."""
    mask = sent(ranks, layer, owner, own.mask if own else None, torch.bool)
    if form.dtype is None:
        return Pruned(mask, None, form.note, form.figures)
    return Pruned(mask, sent(ranks, layer, owner, own.weight if own else None, form.dtype), form.note, form.figures)


def sent(ranks: Ranks, layer: Layer, owner: int, own: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a tensor `[out, in]` of rank `owner`."""
    if own is None:
        own = torch.empty(layer.shape, dtype=dtype, device=layer.read().device)
    own = own.contiguous()
    ranks.broadcast(own, owner)
    return own


def check_same(ranks: Ranks, layers: Mapping[str, Pruned]) -> None:
    """Raise `NMBenchError` if ranks hold different masks."""
    if ranks.size > 1:
        ranks.check_same(masks_checksum({name: pruned.mask for name, pruned in layers.items()}), "masks")
