"""Masks learnt block by block: one pass of a mask learner over the blocks, checked, counted and resumed by the host.

Later blocks see the masks of earlier ones, on dense weights. A finished block is in the checkpoint of the learner, so
that a killed run goes on with the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from nmbench.errors import NotStrict
from nmbench.methods import Pruned
from nmbench.models.applying import applied
from nmbench.pattern import Pattern
from nmbench.pruning.block_parts import BlockTask
from nmbench.pruning.blocks import Blocks
from nmbench.pruning.one_shot import naming
from nmbench.results.files import pack, unpack
from nmbench.runtime.cost import Cost
from nmbench.verification.strict import check_masks

LearnBlock = Callable[[BlockTask], Mapping[str, Tensor]]  # -> layer name: bool mask [out, in]


class Store(Protocol):
    """The checkpoints of the learner, which hold its cost as well."""

    def save(self, state: Mapping[str, Any]) -> None: ...

    def load(self) -> dict[str, Any] | None: ...


class Learner(Protocol):
    """The task that masks are learnt for."""

    who: str
    layers: dict[str, tuple[int, int]]
    pattern: dict[str, Pattern]
    initial: dict[str, Tensor]
    dense: Mapping[str, Tensor]
    cost: Cost

    @property
    def checkpoints(self) -> Store: ...

    def report(
        self, step: int, *, total: int | None = None, masks: Mapping[str, Tensor] | None = None, **values: float
    ) -> None: ...


class BlockMasks:
    """The masks of `task` so far, in host memory: those of its start in the blocks that are still to come."""

    def __init__(self, task: Learner, blocks: Blocks, learn: LearnBlock) -> None:
        self.task, self.blocks, self.learn = task, blocks, learn
        self.masks = dict(task.initial)
        self.finished = 0
        self.counted = (0, 0)  # tokens of the blocks that are in the cost of the task

    def result(self) -> dict[str, Tensor]:
        """Return the masks of all layers. Raises `NMBenchError` naming the block where the learner failed."""
        self._resume()
        known = self.finished
        if known == len(self.blocks.bundle.blocks):
            return self.masks
        for block, _ in self.blocks.visit(self._learnt, lambda index: self._tensors(index) if index < known else None):
            if block.index >= known:
                self._finish(block)
        return self.masks

    def _learnt(self, block: BlockTask) -> dict[str, Tensor]:
        """Learn the masks of one block; return the masked weights by layer name."""
        with naming(block, self.task.who):
            found = self.learn(block)
        check_block(found, block, self.task)
        self.masks.update({name: mask.cpu() for name, mask in found.items()})
        return {name: kept(block.dense[name], mask) for name, mask in found.items()}

    def _tensors(self, index: int) -> dict[str, Tensor]:
        """Return the masked weights of a block that was finished before."""
        names = [layer.name for layer in self.blocks.bundle.block_layers(index)]
        return {name: kept(self.task.dense[name], self.masks[name]) for name in names}

    def _finish(self, block: BlockTask) -> None:
        """Count and report a block that was learnt now, and store it; it is durable when this returns."""
        self.finished = block.index + 1
        self._count()
        self.task.report(self.finished, total=block.blocks, masks=None, **block.figures)
        tally = self.blocks.tally
        done = [layer.name for index in range(self.finished) for layer in self.blocks.bundle.block_layers(index)]
        packed = {name: pack(self.masks[name]) for name in done}
        counted = {"forward": tally.forward, "backward": tally.backward}
        self.task.checkpoints.save({"finished": self.finished, "block masks": packed, **counted})

    def _resume(self) -> None:
        state = self.task.checkpoints.load()
        if state is None:
            return
        self.finished = state["finished"]
        shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        self.masks.update({name: unpack(bits, shapes[name]) for name, bits in state["block masks"].items()})
        self.blocks.tally.forward, self.blocks.tally.backward = state["forward"], state["backward"]
        self.counted = self._tokens()

    def _count(self) -> None:
        """Add the tokens since the last block to the cost of the task."""
        forward, backward = self._tokens()
        self.task.cost.forward_tokens += forward - self.counted[0]
        self.task.cost.backward_tokens += backward - self.counted[1]
        self.counted = (forward, backward)

    def _tokens(self) -> tuple[int, int]:
        """Return the tokens forward and backward so far; those of a block count as its share of the model."""
        cost = self.blocks.cost()
        return cost.forward_tokens, cost.backward_tokens


def kept(dense: Tensor, mask: Tensor) -> Tensor:
    """Return dense weights under a mask, where the weights are."""
    return applied(Pruned(mask.to(dense.device)), dense)


def check_block(masks: object, block: BlockTask, task: Learner) -> None:
    """Raise `NotStrict` unless `masks` are strict masks of layers of the block."""
    if not isinstance(masks, Mapping):
        raise NotStrict(f"{task.who} returned {type(masks).__name__} instead of masks by layer name for {block.name}.")
    shapes = {name: task.layers[name] for name in block.layers if name in masks}
    check_masks(masks, task.pattern, shapes, task.who)
