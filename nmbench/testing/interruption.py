"""A learner or a block repair that is interrupted at an event, and started again as by a new process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmbench.methods import BlockRepair, MaskLearner, WeightLearner
from nmbench.pruning.repairing import BlockStore, repaired_blocks
from nmbench.results.files import FileCheckpoints, MemoryCheckpoints
from nmbench.runtime.isolation import isolating
from nmbench.testing.cases import FunctionStore, Interrupt, LearnCase
from nmbench.testing.observation import Observation, learnt, task_of


def interrupted(observed: Observation, *events: int) -> Mapping[str, Any] | None:
    """The result of a learner or a block repair that was interrupted at each of `events`, and each time started again.

    Events are counted from the first start on, without those that are repeated after a checkpoint.
    """
    method, case = observed.method, observed.case
    assert isinstance(case, LearnCase)
    with tempfile.TemporaryDirectory() as folder, isolating(), contextlib.redirect_stdout(io.StringIO()):
        if isinstance(method, BlockRepair):
            return interrupted_blocks(method, case, *events)
        assert isinstance(method, (MaskLearner, WeightLearner))
        store, before = FileCheckpoints(Path(folder) / "checkpoint.safetensors", "digest"), 0
        for event in events:
            task = task_of(method, case, store)
            with task.interrupted_at(event, before) as count:
                learnt(method, task)
            before = count[1]
        return learnt(method, task_of(method, case, store))


def interrupted_blocks(method: BlockRepair, case: LearnCase, *events: int) -> Mapping[str, Any]:
    """The weights of a block repair that was interrupted at each of `events`, and started again after its last block.

    A new process makes the method again, so that nothing that the first object noted is there.
    """
    stores: dict[int, FunctionStore] = {}
    count = [0, 0]  # events so far, and those of them before the end of the last block

    def store_of(index: int) -> FunctionStore:
        return stores.setdefault(index, noting(MemoryCheckpoints(), count))

    def repaired(method: BlockRepair, event: int | None) -> Mapping[str, Any]:
        def count_event(*_: Any) -> None:
            count[0] += 1
            if count[0] - 1 == event:
                raise Interrupt

        count[0] = count[1]
        blocks = case.blocks(method)
        blocks.on_progress = count_event
        made = repaired_blocks(blocks, method, "it", BlockStore(store_of), count_event)
        return {name: pruned.weight for name, pruned in made.pruned.layers.items()}

    for event in events:
        with contextlib.suppress(Interrupt):
            repaired(dataclasses.replace(method), event)
    return repaired(dataclasses.replace(method), None)


def noting(store: MemoryCheckpoints, count: list[int]) -> FunctionStore:
    """The store, which notes the number of events `count[0]` at a save as `count[1]`."""

    def save(state: Mapping[str, Any]) -> None:
        store.save(state)
        count[1] = count[0]

    return FunctionStore(save, store.load)
