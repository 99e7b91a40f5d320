"""A run that was checked before anything is loaded: names, options, patterns, and what each method begins with."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nmbench.errors import NMBenchError
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
        """Every method that takes part, also those whose mask another one begins with."""
        return [contender.method for contender in itertools.chain.from_iterable(map(lineage, self.contenders))]

    @property
    def learns(self) -> bool:
        """True if a mask learner takes part, which reads the whole pool."""
        return any(isinstance(method, MaskLearner) for method in self.methods)

    def resolved(self, defaults: Defaults) -> ResolvedSpec:
        """The specification with the defaults of the model source. Raises `NMBenchError` for defaults that fail."""
        spec = self.spec.resolved(defaults)
        check_names(spec, self.plugins)
        check_supported(self.contenders, spec.patterns)
        return spec


def checked(spec: RunSpec, plugins: Plugins) -> Plan:
    """Check `spec` and build its methods. Raises `NMBenchError` for what is unknown or impossible."""
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
    """Make the data set or metric that `name` or `name:argument` names."""
    name, _, argument = text.partition(":")
    return plugins.lookup(registry, name)(argument)


def with_typed_options(spec: RunSpec, plugins: Plugins) -> RunSpec:
    """`spec` with the options of its methods as values, not as the text they were given in: equal values make equal
    runs. Raises `NMBenchError` for an unknown method or option.
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
    contender = built(asked.label, asked.name, asked.options, plugins)
    if isinstance(contender.method, MaskLearner):
        start = start_of(contender.method, asked, spec, plugins, found, above)
        contender = dataclasses.replace(contender, init=start)
    found[asked.label] = contender
    return contender


def built(label: str, name: str, given: Mapping[str, Any], plugins: Plugins) -> Contender:
    """A method with the options `given`, and what a refiner starts from, which stays inside its row."""
    cls = plugins.lookup(plugins.registries.methods, name)
    method = build(cls, given, label)
    options = resolved(method)
    if PRESET in given:
        options = {PRESET: given[PRESET], **options}
    init = initial(method, label, plugins) if isinstance(method, Refiner) else None
    return Contender(label, name, method, options, init, {**method.content(), **code_of(cls)})


def start_of(
    learner: MaskLearner,
    asked: MethodSpec,
    spec: RunSpec,
    plugins: Plugins,
    found: dict[str, Contender],
    above: tuple[str, ...],
) -> Contender:
    """The row that a learner starts from, which is put into `found`.

    `init` names a registered one-shot method, with its default options, or by its label another method of the run,
    with its options there; a label does not hide a registered method. The start is then the row `<label>@init`, the
    mask of a one-shot method on the dense weights, or the other row itself, where that is no one-shot method's. Raises
    `NMBenchError` if `init` names neither.
    """
    methods = plugins.registries.methods
    others = {one.label: one for one in spec.methods if one is not asked}
    other = others.get(learner.init)
    if learner.init in methods and issubclass(methods.get(learner.init), Baseline):
        other = MethodSpec(learner.init, learner.init)
    if other is None:
        raise NMBenchError(
            f"option {asked.label}.init must name a one-shot method, or the label of another method in this command "
            f"({', '.join(others) or 'there is none'}); {learner.init!r} is neither."
        )
    cls = plugins.lookup(methods, other.name)
    if not issubclass(cls, Baseline):
        return add(other, spec, plugins, found, (*above, asked.label))
    row = one_shot(other.name, other.options, f"{asked.label}@init", plugins)
    return found.setdefault(row.label, row)


def initial(refiner: Refiner, label: str, plugins: Plugins) -> Contender:
    """The one-shot method whose mask a refiner starts from; it stays inside the refiner's row.

    Raises `NMBenchError` if `init` names another kind of method.
    """
    cls = plugins.lookup(plugins.registries.methods, refiner.init)
    if not issubclass(cls, Baseline):
        raise NMBenchError(f"option {label}.init must name a one-shot method; {refiner.init!r} is none.")
    if issubclass(cls, Refiner):
        raise NMBenchError(f"option {label}.init must name a scorer or a solver; {refiner.init!r} is a refiner itself.")
    return one_shot(refiner.init, {}, f"{label}@init", plugins)


def one_shot(name: str, given: Mapping[str, Any], label: str, plugins: Plugins) -> Contender:
    """A one-shot method with the options `given`, of which the mask alone counts."""
    solver = issubclass(plugins.lookup(plugins.registries.methods, name), Solver)
    return built(label, name, {**given, **({"mask_only": True} if solver else {})}, plugins)


def check_supported(found: Iterable[Contender], patterns: Sequence[Pattern]) -> None:
    """Raise `NMBenchError` if a method cannot do one of the patterns, before anything is computed."""
    for contender in itertools.chain.from_iterable(map(lineage, found)):
        for pattern in patterns:
            if reason := contender.method.supports(pattern):
                raise NMBenchError(f"{contender.label} cannot prune to {pattern}: {reason}")


def lineage(contender: Contender | None) -> Iterator[Contender]:
    """A contender, the one it starts from, and so on."""
    while contender is not None:
        yield contender
        contender = contender.init
