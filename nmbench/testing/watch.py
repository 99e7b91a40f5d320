"""Calls a method once and writes down everything that the checks judge: what it returned, and what else it did."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmbench.methods import LayerStats, MaskLearner, Method, Pruned, Refiner, Scorer, Solver
from nmbench.models.bit_equality import same_bits
from nmbench.pruning.learning import CheckpointStore
from nmbench.results.files import FileCheckpoints
from nmbench.runtime.isolation import fenced
from nmbench.testing.cases import LayerCase, LearnCase, RecordingTask, call


@dataclass
class Seen:
    """One call of a method. `output` is what it returned, or None if it raised `error`.

    `changed`: names of what it was handed and changed; `random_moved`: global random states that it moved;
    `settings_changed`: global settings that it left changed; `stdout`: what it printed.
    """

    method: Method
    case: Any
    output: Any = None
    error: BaseException | None = None
    changed: list[str] = field(default_factory=list)
    random_moved: list[str] = field(default_factory=list)
    settings_changed: list[str] = field(default_factory=list)
    stdout: str = ""
    task: RecordingTask | None = None
    events: int = 0

    def again(self) -> Seen:
        """The same call once more, after other random numbers have been drawn."""
        with fenced():
            random.random()
            np.random.random()
            torch.rand(1)
            return watch(self.method, self.case)

    @property
    def masks(self) -> dict[str, Tensor]:
        """What was returned as a mask, by layer, as far as it can be read as one: bool, right shape, with values."""
        return {name: mask for name, mask in self.returned_masks.items() if self.legible(name, mask)}

    @property
    def returned_masks(self) -> dict[str, Any]:
        """Whatever was returned as a mask, by layer; a scorer returns none."""
        if isinstance(self.output, Mapping):
            return dict(self.output)
        return {"layer": self.output.mask} if isinstance(self.output, Pruned) else {}

    def legible(self, name: str, mask: Any) -> bool:
        return isinstance(mask, Tensor) and tuple(mask.shape) == self.shapes.get(name) and mask.device.type != "meta"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of every layer of the case."""
        if isinstance(self.case, LayerCase):
            return {"layer": self.case.shape}
        return dict(self.task.layers) if self.task else {}

    @property
    def score(self) -> Tensor | None:
        """The scores that a scorer returned, if they are numbers of the right shape."""
        legible = isinstance(self.output, Tensor) and self.legible("layer", self.output)
        return self.output if legible and self.output.is_floating_point() else None

    @property
    def repaired(self) -> Tensor | None:
        """The weight that a solver returned, if it is one of the right shape."""
        weight = self.output.weight if isinstance(self.output, Pruned) else None
        return weight if weight is not None and self.legible("layer", weight) else None


def watch(method: Method, case: Any) -> Seen:
    """Call `method` on `case` and note what it does; global state is put back afterwards."""
    seen = Seen(method, case)
    with fenced(), noting(seen):
        if isinstance(case, LayerCase):
            watch_layer(seen, method, case)
        elif isinstance(case, LearnCase):
            watch_learner(seen, method, case)
    return seen


def watch_layer(seen: Seen, method: Method, case: LayerCase) -> None:
    assert isinstance(method, (Scorer, Solver, Refiner))
    weight, mask = case.weight(), case.mask()
    with catching(seen):
        stats = case.stats(method.needs)
        handed = {"weight": weight, "mask": mask, **tensors_of(stats)}
        with unchanged(seen, handed):
            seen.output = own(call(method, weight, stats, mask, case.nm))


def watch_learner(seen: Seen, method: Method, case: LearnCase, store: CheckpointStore | None = None) -> None:
    assert isinstance(method, MaskLearner)
    task = seen.task = case.task(store, type(method).__name__)
    handed = {
        "pool": task.pool,
        "selection": task._selection,
        **{f"dense[{name!r}]": weight for name, weight in task.dense.items()},
        **{f"initial[{name!r}]": mask for name, mask in task.initial.items()},
        **{f"live {name}": tensor for name, tensor in task.bundle.tensors().items()},
    }
    with unchanged(seen, handed), task.interrupted_at(None) as events, catching(seen):
        seen.output = own(method.learn(task))
    seen.events = events[0]


def interrupted(seen: Seen, event: int) -> Mapping[str, Any] | None:
    """The masks of a learner that was interrupted at `event` and then started again from its checkpoint."""
    assert isinstance(seen.method, MaskLearner) and isinstance(seen.case, LearnCase)
    with tempfile.TemporaryDirectory() as folder, fenced(), contextlib.redirect_stdout(io.StringIO()):
        store = FileCheckpoints(Path(folder) / "checkpoint.safetensors", "digest")
        first = seen.case.task(store)
        with first.interrupted_at(event):
            seen.method.learn(first)
        return seen.method.learn(seen.case.task(store))


def own(output: Any) -> Any:
    """The output, its tensors copied, so that nothing done later changes them."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        return {name: own(value) for name, value in output.items()}
    if isinstance(output, Pruned):
        return dataclasses.replace(output, mask=own(output.mask), weight=own(output.weight))
    return output


def tensors_of(stats: LayerStats) -> dict[str, Tensor]:
    every = {f"stats.{f.name}": getattr(stats, f.name) for f in dataclasses.fields(stats)}
    return {name: value for name, value in every.items() if isinstance(value, Tensor)}


@contextlib.contextmanager
def catching(seen: Seen) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        seen.error = error


@contextlib.contextmanager
def unchanged(seen: Seen, handed: Mapping[str, Tensor]) -> Iterator[None]:
    """Note which of the tensors `handed` over are no longer what they were."""
    before = {name: tensor.clone() for name, tensor in handed.items()}
    yield
    seen.changed += [name for name, tensor in handed.items() if not same_bits(tensor, before[name])]


@contextlib.contextmanager
def noting(seen: Seen) -> Iterator[None]:
    """Note printing, moved random states and changed settings."""
    printed, states, settings = io.StringIO(), random_states(), process_settings()
    with contextlib.redirect_stdout(printed):
        yield
    seen.stdout = printed.getvalue()
    seen.random_moved = [name for name, state in random_states().items() if state != states[name]]
    seen.settings_changed = [
        f"{name}: {settings[name]} -> {value}" for name, value in process_settings().items() if value != settings[name]
    ]


def random_states() -> dict[str, Any]:
    """The state of every global random generator, comparable."""
    states: dict[str, Any] = {"random": random.getstate()}
    states["numpy.random"] = [
        part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()
    ]
    states["torch"] = torch.get_rng_state().numpy().tobytes()
    if torch.cuda.is_available():
        states["torch.cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return states


SETTINGS: Mapping[str, Callable[[], Any]] = {
    "default dtype": torch.get_default_dtype,
    "gradients enabled": torch.is_grad_enabled,
    "float32 matmul precision": torch.get_float32_matmul_precision,
    "threads": torch.get_num_threads,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "default device": torch.get_default_device,
}


def process_settings() -> dict[str, Any]:
    """The global settings of torch that other methods' numbers depend on."""
    return {name: get() for name, get in SETTINGS.items()}
