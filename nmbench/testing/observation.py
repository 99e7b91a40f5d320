"""One call of a method, with everything that the checks judge: its result and its side effects."""

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
from nmbench.pruning.one_shot import call
from nmbench.results.files import FileCheckpoints
from nmbench.runtime.isolation import isolating
from nmbench.testing.cases import LayerCase, LearnCase, RecordingTask


@dataclass
class Observation:
    """One call of a method. `output` is its result, or None if the method raised `error`.

    `changed` names the inputs that the method changed in place, `random_moved` the global random states that it drew
    from or set, `settings_changed` the global settings that it left changed. `stdout` is the text that it printed.
    `events` counts the reports and checkpoints of a learner.
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

    def again(self) -> Observation:
        """The same call once more, after numbers were drawn from the global random generators."""
        with isolating():
            random.random()
            np.random.random()
            torch.rand(1)
            return observe(self.method, self.case)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The well-formed masks of the result by layer: tensors of the right shape that hold values."""
        return {name: mask for name, mask in self.returned_masks.items() if self.well_formed(name, mask)}

    @property
    def returned_masks(self) -> dict[str, Any]:
        """The result's masks by layer, well-formed or not; a scorer returns no masks."""
        if isinstance(self.output, Mapping):
            return dict(self.output)
        return {"layer": self.output.mask} if isinstance(self.output, Pruned) else {}

    def well_formed(self, name: str, mask: Any) -> bool:
        """True if `mask` is a tensor of the layer's shape that holds values, which a meta tensor does not."""
        return isinstance(mask, Tensor) and tuple(mask.shape) == self.shapes.get(name) and mask.device.type != "meta"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of every layer of the case."""
        if isinstance(self.case, LayerCase):
            return {"layer": self.case.shape}
        return dict(self.task.layers) if self.task else {}

    @property
    def score(self) -> Tensor | None:
        """The scores of the result, None unless they are floating-point numbers of the right shape."""
        well_formed = isinstance(self.output, Tensor) and self.well_formed("layer", self.output)
        return self.output if well_formed and self.output.is_floating_point() else None

    @property
    def repaired(self) -> Tensor | None:
        """The repaired weight of the result, None unless it has the right shape."""
        weight = self.output.weight if isinstance(self.output, Pruned) else None
        return weight if weight is not None and self.well_formed("layer", weight) else None


def observe(method: Method, case: Any) -> Observation:
    """Call `method` on `case` and return the observation; global state is restored afterwards."""
    observed = Observation(method, case)
    with isolating(), noting_side_effects(observed):
        if isinstance(case, LayerCase):
            observe_layer(observed, method, case)
        elif isinstance(case, LearnCase):
            observe_learner(observed, method, case)
    return observed


def observe_layer(observed: Observation, method: Method, case: LayerCase) -> None:
    assert isinstance(method, (Scorer, Solver, Refiner))
    weight, mask = case.weight(), case.mask()
    with catching(observed):
        stats = case.stats(method.needs)
        inputs = {"weight": weight, "mask": mask, **tensors_of(stats)}
        with noting_changes(observed, inputs):
            observed.output = copied(call(method, weight, stats, case.nm, mask))


def observe_learner(observed: Observation, method: Method, case: LearnCase) -> None:
    assert isinstance(method, MaskLearner)
    task = observed.task = case.task(who=type(method).__name__)
    inputs = {
        "pool": task.pool,
        "selection": task._selection,
        **{f"dense[{name!r}]": weight for name, weight in task.dense.items()},
        **{f"initial[{name!r}]": mask for name, mask in task.initial.items()},
        **{f"live {name}": tensor for name, tensor in task.bundle.tensors().items()},
    }
    with noting_changes(observed, inputs), task.interrupted_at(None) as events, catching(observed):
        observed.output = copied(method.learn(task))
    observed.events = events[0]


def interrupted(observed: Observation, event: int) -> Mapping[str, Any] | None:
    """The masks of a learner that was interrupted at `event` and then started again from its checkpoint."""
    assert isinstance(observed.method, MaskLearner) and isinstance(observed.case, LearnCase)
    with tempfile.TemporaryDirectory() as folder, isolating(), contextlib.redirect_stdout(io.StringIO()):
        store = FileCheckpoints(Path(folder) / "checkpoint.safetensors", "digest")
        first = observed.case.task(store)
        with first.interrupted_at(event):
            observed.method.learn(first)
        return observed.method.learn(observed.case.task(store))


def copied(output: Any) -> Any:
    """The output with copied tensors, so that later calls cannot change them."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        return {name: copied(value) for name, value in output.items()}
    if isinstance(output, Pruned):
        return dataclasses.replace(output, mask=copied(output.mask), weight=copied(output.weight))
    return output


def tensors_of(stats: LayerStats) -> dict[str, Tensor]:
    every = {f"stats.{f.name}": getattr(stats, f.name) for f in dataclasses.fields(stats)}
    return {name: value for name, value in every.items() if isinstance(value, Tensor)}


@contextlib.contextmanager
def catching(observed: Observation) -> Iterator[None]:
    """Store an exception of the method as `observed.error`."""
    try:
        yield
    except (Exception, SystemExit) as error:
        observed.error = error


@contextlib.contextmanager
def noting_changes(observed: Observation, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Add the names of `inputs` whose bits change to `observed.changed`."""
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    yield
    observed.changed += [name for name, tensor in inputs.items() if not same_bits(tensor, before[name])]


@contextlib.contextmanager
def noting_side_effects(observed: Observation) -> Iterator[None]:
    """Store printed text, moved random states and changed settings in `observed`."""
    printed, states, settings = io.StringIO(), random_states(), process_settings()
    with contextlib.redirect_stdout(printed):
        yield
    observed.stdout = printed.getvalue()
    observed.random_moved = [name for name, state in random_states().items() if state != states[name]]
    observed.settings_changed = [
        f"{name}: {settings[name]} -> {value}" for name, value in process_settings().items() if value != settings[name]
    ]


def random_states() -> dict[str, Any]:
    """The state of every global random generator, in a form that `==` compares."""
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
