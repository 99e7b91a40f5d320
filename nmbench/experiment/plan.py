"""The plan of a run, checked before anything is loaded: names, options, patterns, and the start of each method."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nmbench.errors import NMBenchError, did_you_mean
from nmbench.experiment.doubts import Doubt
from nmbench.experiment.loading import device_of, dtype_of, source_of
from nmbench.methods import Baseline, MaskLearner, Method, Refiner, Solver
from nmbench.options import PRESET, build, resolved, typed
from nmbench.pattern import Pattern
from nmbench.plugins.loading import Plugins
from nmbench.plugins.registry import Registry
from nmbench.plugins.source_digest import code_of
from nmbench.spec import Defaults, MethodSpec, ResolvedSpec, RunSpec


@dataclass(frozen=True)
class Plan:
    """A checked run: its specification with options as values, and its contenders in the order of their rows."""

    spec: RunSpec
    plugins: Plugins
    contenders: tuple[Contender, ...]

    @property
    def methods(self) -> list[Method]:
        """Every method of the run, also the methods whose masks others start from."""
        return [contender.method for contender in itertools.chain.from_iterable(map(lineage, self.contenders))]

    @property
    def learns(self) -> bool:
        """True if the run has a mask learner, which reads the whole pool."""
        return any(isinstance(method, MaskLearner) for method in self.methods)

    @property
    def doubts(self) -> Iterator[Doubt]:
        """A doubt for every start whose label is also the name of a method: the row of the command is the start."""
        labels = {asked.label: asked for asked in self.spec.methods}
        for contender in self.contenders:
            other = labels.get(getattr(contender.method, "init", ""))
            if (
                other
                and other.label in self.plugins.registries.methods
                and (other.options or other.name != other.label)
            ):
                options = ", ".join(f"{name}={value}" for name, value in other.options.items()) or "default options"
                text = f"{contender.label} begins with the row of this command: {other.name}, {options}"
                yield Doubt(f"init={other.label}", text)

    def resolved(self, defaults: Defaults) -> ResolvedSpec:
        """Return the specification with the defaults of the model source. Raises `NMBenchError` for bad defaults."""
        spec = self.spec.resolved(defaults)
        check_names(spec, self.plugins)
        check_supported(self.contenders, spec.patterns)
        return spec


def checked(spec: RunSpec, plugins: Plugins) -> Plan:
    """Return the plan of `spec` with its methods built. Raises `NMBenchError` for unknown names and bad values."""
    check_names(spec, plugins)
    spec = with_typed_options(spec, plugins)
    found = tuple(contenders(spec, plugins))
    check_supported(found, (*spec.patterns, *(pattern for _, pattern in spec.pattern_for)))
    return Plan(spec, plugins, found)


def check_names(spec: RunSpec, plugins: Plugins) -> None:
    """Raise `NMBenchError` for an unknown or ill-formed model, metric, data set or dtype, before anything is loaded."""
    source_of(spec.model, plugins)
    if spec.calibration:
        look_up(plugins, plugins.registries.datasets, spec.calibration)
    for text in spec.metrics:
        for name in look_up(plugins, plugins.registries.metrics, text).datasets:
            look_up(plugins, plugins.registries.datasets, name)
    for dtype in (spec.dtype, spec.eval_dtype):
        if dtype:
            dtype_of(dtype)
    device_of(spec.device)


def look_up(plugins: Plugins, registry: Registry, text: str) -> Any:
    """Return the data set or metric of the text `name` or `name:argument`."""
    name, _, argument = text.partition(":")
    return plugins.lookup(registry, name)(argument)


def with_typed_options(spec: RunSpec, plugins: Plugins) -> RunSpec:
    """Return `spec` with the options of its methods as values instead of text, so that equal values make equal runs.

    Raises `NMBenchError` for an unknown method or option.
    """
    methods = []
    for asked in spec.methods:
        cls = plugins.lookup(plugins.registries.methods, asked.name)
        methods.append(dataclasses.replace(asked, options=typed(cls, asked.options, asked.label)))
    return dataclasses.replace(spec, methods=tuple(methods))


@dataclass(frozen=True)
class Contender:
    """A method of the run under its label, options resolved; `init` is the method whose mask it starts from."""

    label: str
    name: str
    method: Method
    options: Mapping[str, Any]
    init: Contender | None = None
    content: Mapping[str, str] = field(default_factory=dict)


def contenders(spec: RunSpec, plugins: Plugins) -> list[Contender]:
    """Look up and build every method of `spec`; what a learner starts from has a row of its own, before the learner's.

    Raises `NMBenchError` for an unknown method, option or initial method; no model is needed.
    """
    found: dict[str, Contender] = {}
    for asked in spec.methods:
        add(asked, spec, plugins, found)
    return list(found.values())


def add(
    asked: MethodSpec, spec: RunSpec, plugins: Plugins, found: dict[str, Contender], above: tuple[str, ...] = ()
) -> Contender:
    """The contender of one method; it is put into `found`, behind the row that it starts from, unless it is there."""
    if asked.label in found:
        return found[asked.label]
    if asked.label in above:  # the labels of those that start from it
        circle = " -> ".join((*above, asked.label))
        raise NMBenchError(f"no method can start from its own mask ({circle}); give one of them another init.")
    contender = built(asked.label, asked.name, asked.options, spec, plugins)
    if isinstance(contender.method, MaskLearner):
        start = start_of(contender.method, asked, spec, plugins, found, above)
        contender = dataclasses.replace(contender, init=start)
    found[asked.label] = contender
    return contender


def built(label: str, name: str, given: Mapping[str, Any], spec: RunSpec, plugins: Plugins) -> Contender:
    """A method with the options `given`, and what a refiner starts from, which stays inside its row."""
    cls = plugins.lookup(plugins.registries.methods, name)
    method = build(cls, given, label)
    options = resolved(method)
    if PRESET in given:
        options = {PRESET: given[PRESET], **options}
    init = initial(method, label, spec, plugins) if isinstance(method, Refiner) else None
    return Contender(label, name, method, options, init, {**method.content(), **code_of(cls)})


def start_of(
    learner: MaskLearner,
    asked: MethodSpec,
    spec: RunSpec,
    plugins: Plugins,
    found: dict[str, Contender],
    above: tuple[str, ...],
) -> Contender:
    """The row that a learner begins with, which is put into `found`.

    The start of a one-shot method is the row `<label>@init`: its mask on the dense weights. The start of another kind
    is that method's own row. Raises `NMBenchError` if `init` names neither.
    """
    start = named(learner.init, asked.label, spec, plugins)
    if issubclass(plugins.lookup(plugins.registries.methods, start.name), Baseline):
        row = one_shot(start, f"{asked.label}@init", spec, plugins)
        return found.setdefault(row.label, row)
    if start not in spec.methods:
        raise no_start(learner.init, asked.label, spec, plugins)
    return add(start, spec, plugins, found, (*above, asked.label))


def named(init: str, label: str, spec: RunSpec, plugins: Plugins) -> MethodSpec:
    """The method that the option `init` of the row `label` names.

    The label of another method of this command comes first, with its options there; then a registered method, with its
    default options. Raises `NMBenchError` if `init` names neither.
    """
    for other in spec.methods:
        if other.label == init and init not in (label, label.removesuffix("@init")):
            return other
    if init not in plugins.registries.methods:
        raise no_start(init, label, spec, plugins)
    return MethodSpec(init, init)


def no_start(init: str, label: str, spec: RunSpec, plugins: Plugins) -> NMBenchError:
    """The error for an option `init` that names no possible start."""
    others = [one.label for one in spec.methods if one.label != label]
    near = did_you_mean(init, {*others, *(entry.name for entry in plugins.registries.methods)} - {init})
    return NMBenchError(
        f"option {label}.init must name a one-shot method, or the label of another method in this command "
        f"({', '.join(others) or 'there is none'}); {init!r} is neither.{near}"
    )


def initial(refiner: Refiner, label: str, spec: RunSpec, plugins: Plugins) -> Contender:
    """The one-shot method whose mask a refiner begins with; it stays inside the refiner's row.

    Raises `NMBenchError` if `init` names another kind of method.
    """
    start = named(refiner.init, label, spec, plugins)
    cls = plugins.lookup(plugins.registries.methods, start.name)
    if not issubclass(cls, Baseline):
        raise NMBenchError(f"option {label}.init must name a one-shot method; {refiner.init!r} is none.")
    if issubclass(cls, Refiner):
        raise NMBenchError(f"option {label}.init must name a scorer or a solver; {refiner.init!r} is a refiner itself.")
    return one_shot(start, f"{label}@init", spec, plugins)


def one_shot(start: MethodSpec, label: str, spec: RunSpec, plugins: Plugins) -> Contender:
    """The one-shot method `start` under another label, of which the mask alone counts."""
    solver = issubclass(plugins.lookup(plugins.registries.methods, start.name), Solver)
    options = {**start.options, **({"mask_only": True} if solver else {})}
    return built(label, start.name, options, spec, plugins)


def check_supported(found: Iterable[Contender], patterns: Sequence[Pattern]) -> None:
    """Raise `NMBenchError` if a method cannot do one of the patterns, before anything is computed."""
    for contender in itertools.chain.from_iterable(map(lineage, found)):
        for pattern in patterns:
            if reason := contender.method.supports(pattern):
                raise NMBenchError(f"{contender.label} cannot prune to {pattern}: {reason}")


def lineage(contender: Contender | None) -> Iterator[Contender]:
    """Yield a contender, the contender it starts from, and so on."""
    while contender is not None:
        yield contender
        contender = contender.init
