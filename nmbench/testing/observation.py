"""One call of a method, with everything that the checks judge: its result and its side effects."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmbench.methods.masks import LayerStats, MaskLearner, Method, Pruned, PrunedModel, Refiner, Scorer, Solver
from nmbench.methods.repairs import BlockRepair, LayerRepair, WeightLearner
from nmbench.models.bit_equality import same_bits
from nmbench.pruning.block_parts import BlockTask
from nmbench.pruning.one_shot import call
from nmbench.pruning.repairing import call_repair
from nmbench.runtime.isolation import isolating
from nmbench.testing.cases import LayerCase, LearnCase, RecordingTask, RecordingWeightTask
from nmbench.testing.planted import planted_weights


@dataclass
class Observation:
    """One call of a method. `output` is its result, or None if the method raised `error`.

    `changed` names the inputs that the method changed in place, `random_moved` the global random states that it drew
    from or set, `settings_changed` the global settings that it left changed. `stdout` is the text that it printed.
    `events` counts the reports and checkpoints of a learner, or the progress of a block repair and its blocks.
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
        """The result's masks by layer, well-formed or not; a scorer and a block repair return no masks."""
        if isinstance(self.method, BlockRepair):
            return {}
        if isinstance(self.output, Mapping):
            return {name: getattr(value, "mask", value) for name, value in self.output.items()}
        return {"layer": self.output.mask} if isinstance(self.output, Pruned) else {}

    @property
    def returned_weights(self) -> dict[str, Any]:
        """The result's weights by layer, well-formed or not; None where the dense weights stay."""
        if isinstance(self.output, Pruned):
            return {"layer": self.output.weight}
        if not isinstance(self.output, Mapping):
            return {}
        if isinstance(self.method, BlockRepair):
            return {name: weight for name, weight in self.output.items() if name in self.shapes}
        return {name: value.weight for name, value in self.output.items() if isinstance(value, Pruned)}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The well-formed weights of a repair by layer, those of the start where a block repair returns none."""
        start = self.start.layers if isinstance(self.method, BlockRepair) and self.error is None else {}
        kept = {name: pruned.weight for name, pruned in start.items() if pruned.weight is not None}
        returned = self.returned_weights
        own = {name: weight for name, weight in returned.items() if self.well_formed(name, weight)}
        return {**{name: weight for name, weight in kept.items() if name not in returned}, **own}

    @functools.cached_property
    def start(self) -> PrunedModel:
        """The start of a repair: mask and weight of every layer; the method was given another copy."""
        if isinstance(self.case, LayerCase):
            return PrunedModel({"layer": self.case.start()})
        return self.case.start(self.case.bundle()) if isinstance(self.case, LearnCase) else PrunedModel({})

    def well_formed(self, name: str, mask: Any) -> bool:
        """True if `mask` is a tensor of the layer's shape that holds values, which a meta tensor does not."""
        return isinstance(mask, Tensor) and tuple(mask.shape) == self.shapes.get(name) and mask.device.type != "meta"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of every layer of the case."""
        if isinstance(self.case, LayerCase):
            return {"layer": self.case.shape}
        if not isinstance(self.case, LearnCase):
            return {}
        return {name: (weight.shape[0], weight.shape[1]) for name, weight in planted_weights().items()}

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
        elif isinstance(case, LearnCase) and isinstance(method, BlockRepair):
            observe_blocks(observed, method, case)
        elif isinstance(case, LearnCase):
            observe_learner(observed, method, case)
    return observed


def observe_layer(observed: Observation, method: Method, case: LayerCase) -> None:
    assert isinstance(method, (Scorer, Solver, Refiner, LayerRepair))
    weight, start = case.weight(), case.start()
    with catching(observed):
        stats = case.stats(method.needs)
        given = tensors_of(start, "start") if isinstance(method, LayerRepair) else {"mask": start.mask}
        with noting_changes(observed, {"weight": weight, **tensors_of(stats), **given}):
            if isinstance(method, LayerRepair):
                observed.output = copied(call_repair(method, weight, stats, start, case.nm))
            else:
                observed.output = copied(call(method, weight, stats, case.nm, start.mask))


def observe_learner(observed: Observation, method: Method, case: LearnCase) -> None:
    assert isinstance(method, (MaskLearner, WeightLearner))
    task = observed.task = task_of(method, case, who=type(method).__name__)
    inputs = {
        "pool": task.pool,
        "selection": task._selection,
        **named("dense", task.dense),
        **named("initial", task.initial),
        **named("weights", getattr(task, "weights", {})),
        **{f"live {name}": tensor for name, tensor in task.bundle.tensors().items()},
    }
    with noting_changes(observed, inputs), task.interrupted_at(None) as events, catching(observed):
        observed.output = copied(learnt(method, task))
    observed.events = events[0]


def task_of(method: MaskLearner | WeightLearner, case: LearnCase, store: Any = None, who: str = "it") -> RecordingTask:
    return case.weight_task(store, who) if isinstance(method, WeightLearner) else case.task(store, who)


def learnt(method: MaskLearner | WeightLearner, task: RecordingTask) -> Mapping[str, Any]:
    """The result of a learner of masks or of weights on a task of `task_of`."""
    if isinstance(method, WeightLearner):
        assert isinstance(task, RecordingWeightTask)
        return method.learn(task)
    return method.learn(task)


def observe_blocks(observed: Observation, method: BlockRepair, case: LearnCase) -> None:
    """Repair one block after the other; later blocks see the well-formed results of earlier ones."""
    blocks, returned = case.blocks(method), dict[str, Any]()

    def learn(task: BlockTask) -> Mapping[str, Tensor]:
        inputs = {**named("dense", task.dense), **named("masks", task.masks), **named("weights", task.weights)}
        with noting_changes(observed, inputs):
            tensors = method.repair_block(task)
        observed.events += 1
        returned.update(copied(tensors) if isinstance(tensors, Mapping) else {task.name: tensors})
        return {name: tensor for name, tensor in returned.items() if fits(tensor, task.weights.get(name))}

    def count(block: int, done: int, total: int) -> None:
        observed.events += 1

    blocks.on_progress = count
    live = {f"live {name}": tensor for name, tensor in blocks.bundle.tensors().items()}
    with noting_changes(observed, {"windows": blocks.windows, **live}), catching(observed):
        for _ in blocks.visit(learn):
            pass
        observed.output = returned


def fits(tensor: Any, like: Tensor | None) -> bool:
    """True if a returned value is a tensor of the layer's shape that holds values."""
    well_formed = isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.is_floating_point()
    return well_formed and like is not None and tensor.shape == like.shape


def copied(output: Any) -> Any:
    """The output with copied tensors, so that later calls cannot change them."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        return {name: copied(value) for name, value in output.items()}
    if isinstance(output, Pruned):
        return dataclasses.replace(output, mask=copied(output.mask), weight=copied(output.weight))
    return output


def tensors_of(content: LayerStats | Pruned, name: str = "stats") -> dict[str, Tensor]:
    every = {f"{name}.{f.name}": getattr(content, f.name) for f in dataclasses.fields(content)}
    return {name: value for name, value in every.items() if isinstance(value, Tensor)}


def named(what: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by names for a message: `dense['blocks.0.linear']`."""
    return {f"{what}[{name!r}]": tensor for name, tensor in tensors.items()}


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
