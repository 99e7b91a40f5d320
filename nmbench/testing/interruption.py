"""A learner or a block repair that is interrupted at an event, and started again as by a new process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nmbench.methods import MaskLearner
from nmbench.pruning.repairing import BlockStore, repaired_blocks
from nmbench.repairs import BlockRepair, WeightLearner
from nmbench.results.files import FileCheckpoints, MemoryCheckpoints
from nmbench.runtime.isolation import isolating
from nmbench.testing.cases import Interrupt, LearnCase
from nmbench.testing.observation import Observation, learnt, task_of


def interrupted(observed: Observation, event: int) -> Mapping[str, Any] | None:
    """The result of a learner or a block repair that was interrupted at `event` and then started again."""
    method, case = observed.method, observed.case
    assert isinstance(case, LearnCase)
    with tempfile.TemporaryDirectory() as folder, isolating(), contextlib.redirect_stdout(io.StringIO()):
        if isinstance(method, BlockRepair):
            return interrupted_blocks(method, case, event)
        assert isinstance(method, (MaskLearner, WeightLearner))
        store = FileCheckpoints(Path(folder) / "checkpoint.safetensors", "digest")
        first = task_of(method, case, store)
        with first.interrupted_at(event):
            learnt(method, first)
        return learnt(method, task_of(method, case, store))


def interrupted_blocks(method: BlockRepair, case: LearnCase, event: int) -> Mapping[str, Any]:
    """The weights of a block repair that was interrupted at `event`, and then started again after its last block.

    A new process makes the method again, so that nothing that the first object noted is there.
    """
    stores: dict[int, MemoryCheckpoints] = {}
    count = [0]

    def count_event(*_: Any) -> None:
        count[0] += 1
        if count[0] - 1 == event:
            raise Interrupt

    def repaired(method: BlockRepair, callback: Callable[..., None]) -> Mapping[str, Any]:
        blocks = case.blocks(method)
        blocks.on_progress = callback
        store = BlockStore(lambda index: stores.setdefault(index, MemoryCheckpoints()))
        made = repaired_blocks(blocks, method, "it", store, callback)
        return {name: pruned.weight for name, pruned in made.pruned.layers.items()}

    with contextlib.suppress(Interrupt):
        repaired(dataclasses.replace(method), count_event)
    return repaired(dataclasses.replace(method), lambda *_: None)
