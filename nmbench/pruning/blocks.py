"""Block-local learning as a service: every decoder block in turn, with its inputs on the pruned and the dense path.

Where the model is streamed, one block is on the device; passes wait on the host, unless the device has room for them.
The passes are those of the model itself, paused at the entry of every block (`nmbench.calibration.paused_forward`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nmbench.calibration.block_visit import Rules
from nmbench.calibration.finite import ONE_BY_ONE
from nmbench.calibration.paused_forward import PausedForward, go_on
from nmbench.calibration.statistics import Skip
from nmbench.calibration.walk import passes
from nmbench.methods import PrunedModel, Stat
from nmbench.models.applying import applied, moved
from nmbench.models.bundle import Bundle
from nmbench.pattern import Pattern
from nmbench.pruning.block_parts import BlockTask, Tally, others_of
from nmbench.pruning.parameters import parameters_kept
from nmbench.runtime.cost import Cost

NEXT_BLOCK = 2**31 - 1  # added to the seed of a block for that of the next


@dataclass
class Blocks:
    """The blocks of `bundle`, which is dense, to be learnt one after the other from `start` on.

    `windows`: int64 `[windows, window_tokens]`, `minibatch` of which make a batch. `dense_path`: the dense model runs
    beside the pruned one. `seed`: of the generators, one for each block.
    """

    bundle: Bundle
    start: PrunedModel
    pattern: Mapping[str, Pattern]
    windows: Tensor
    minibatch: int
    dense_path: bool = True
    seed: int = 0
    on_progress: Callable[[int, int, int], None] = lambda block, done, total: None  # block, steps done, steps
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        self.tally = Tally(sum(layer.read().numel() for layer in self.bundle.layers.values()))

    def cost(self) -> Cost:
        """Return the tokens so far; tokens of a part of the model count as its share."""
        return Cost(round(self.tally.forward), round(self.tally.backward), self.windows.numel())

    @torch.no_grad()
    def visit(
        self,
        learn: Callable[[BlockTask], Mapping[str, Tensor]],
        finished: Callable[[int], Mapping[str, Tensor] | None] = lambda index: None,
    ) -> Iterator[tuple[BlockTask, Mapping[str, Tensor]]]:
        """Yield every block after `learn` and the tensors that it returned; later blocks see these tensors.

        `finished(index)` gives the tensors of a block that was learnt before, which is not learnt again. The dense
        weights of a block are put back when the walk has passed it. `learn` runs with gradients enabled.
        """
        bundle, tokens = self.bundle, self.minibatch * self.windows.shape[1]
        rules = Rules(
            Stat.DRIFT if self.dense_path else Stat.NONE,
            len(self.windows),
            False,
            Skip(0, self.windows.shape[1]),
            None,
            ONE_BY_ONE,
        )
        with passes(bundle, self.windows, rules, tokens) as (live, dense):
            for index, block in enumerate(bundle.blocks.values()):
                with bundle.holding(block, undo=True), parameters_kept(block):
                    task = self.task(index, live, dense)
                    start = {**task.weights, **self.start_others(task)}
                    task.write(start)
                    known = finished(index)
                    with torch.enable_grad():
                        tensors = learn(task) if known is None else known
                    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
                    task.write({**start, **tensors})  # also what `learn` wrote and did not return
                    if index + 1 < len(bundle.blocks):
                        if known is None:  # the tally of a block that was learnt before has its passes
                            self.count_passes(task, dense)
                        go_on(bundle, live)
                        go_on(bundle, dense, task.dense_module)
                    yield task, tensors

    def task(self, index: int, live: list[PausedForward], dense: list[PausedForward]) -> BlockTask:
        """Return the task of a block, at whose entry the passes wait; the block is dense."""
        bundle = self.bundle
        name, block = list(bundle.blocks.items())[index]
        layers = {layer.name: layer for layer in bundle.block_layers(index)}
        start = {name: self.start.layers[name] for name in layers}
        originals = {name: layer.read().clone() for name, layer in layers.items()}
        return BlockTask(
            name,
            block,
            copy.deepcopy(block),
            layers,
            live,
            dense,
            self.tally,
            bundle.host,
            index=index,
            blocks=len(bundle.blocks),
            pattern={name: self.pattern[name] for name in layers},
            masks={name: pruned.mask.to(bundle.device) for name, pruned in start.items()},
            dense=originals,
            weights={
                name: applied(moved(start[name], original.device), original) for name, original in originals.items()
            },
            others=others_of(bundle, index),
            generator=torch.Generator(bundle.device).manual_seed((self.seed + index * NEXT_BLOCK) % 2**63),
            on_progress=lambda done, total: self.on_progress(index, done, total),
        )

    def count_passes(self, task: BlockTask, dense: list[PausedForward]) -> None:
        """Add the tokens that go on through a block: on the pruned path, and on the dense path if it is not known."""
        again = sum(forward.batch.numel() for forward in dense if not forward.kept)
        self.tally.forward += (self.windows.numel() + again) * task.share

    def start_others(self, task: BlockTask) -> dict[str, Tensor]:
        """Return the other parameters of a block that the start trained."""
        return {name: tensor for name, tensor in self.start.others.items() if name in task.others}
