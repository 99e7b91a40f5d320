"""The jobs of a run, in the order in which they are done: dense, then every method at every pattern and seed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nmbench.errors import NMBenchError
from nmbench.methods import Baseline, MaskLearner, Method, Refiner, Solver
from nmbench.options import PRESET, build, resolved, typed
from nmbench.pattern import Pattern
from nmbench.plugins.loading import Plugins
from nmbench.plugins.source_digest import code_of
from nmbench.spec import DENSE, MethodSpec, RunSpec, digest


@dataclass(frozen=True)
class Contender:
    """A method of the run under its label, options resolved; `init` is the method whose mask it starts from."""

    label: str
    name: str
    method: Method
    options: Mapping[str, Any]
    init: Contender | None = None
    content: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One row to be: a contender at a pattern and a seed, or the dense reference (no contender).

    `digest` names everything that decides the row, `work` everything but its label.
    """

    contender: Contender | None
    pattern: Pattern | None
    seed: int | None
    digest: str
    work: str

    @property
    def label(self) -> str:
        return self.contender.label if self.contender else DENSE

    @property
    def name(self) -> str:
        """Names the job's files: `maskpro--2-4--seed0`."""
        return self.files_of(self.label)

    def files_of(self, label: str) -> str:
        """Names the files of the job of that label, pattern and seed being the same."""
        if self.pattern is None:
            return label
        return f"{label}--{self.pattern.keep}-{self.pattern.group}--seed{self.seed}"

    @property
    def title(self) -> str:
        """Names the job to people: `maskpro 2:4 seed 0`."""
        return self.label if self.pattern is None else f"{self.label} {self.pattern} seed {self.seed}"


def with_typed_options(spec: RunSpec, plugins: Plugins) -> RunSpec:
    """`spec` with the options of its methods as values, not as the text they were given in: equal values make equal
    runs. Raises `NMBenchError` for an unknown method or option.
    """
    methods = []
    for asked in spec.methods:
        cls = plugins.lookup(plugins.registries.methods, asked.name)
        methods.append(dataclasses.replace(asked, options=typed(cls, asked.options, asked.label)))
    return dataclasses.replace(spec, methods=tuple(methods))


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


def check_supported(found: Sequence[Contender], spec: RunSpec) -> None:
    """Raise `NMBenchError` if a method cannot do one of the patterns named in `spec`, before anything is computed."""
    for contender in itertools.chain.from_iterable(map(lineage, found)):
        for pattern in (*spec.patterns, *(pattern for _, pattern in spec.pattern_for)):
            if reason := contender.method.supports(pattern):
                raise NMBenchError(f"{contender.label} cannot prune to {pattern}: {reason}")


def lineage(contender: Contender | None) -> Iterator[Contender]:
    """A contender, the one it starts from, and so on."""
    while contender is not None:
        yield contender
        contender = contender.init


def jobs(spec: RunSpec, found: Sequence[Contender], protocol: str) -> Iterator[Job]:
    """Every job of a resolved spec; `protocol` digests what its numbers depend on."""
    dense = digest({"protocol": protocol, "label": DENSE})
    yield Job(None, None, None, dense, dense)
    for pattern in spec.patterns:
        for seed in spec.seeds:
            for contender in found:
                content = decides(spec, contender, pattern, seed, protocol)
                yield Job(contender, pattern, seed, digest({"label": contender.label, **content}), digest(content))


def decides(spec: RunSpec, contender: Contender, pattern: Pattern, seed: int, protocol: str) -> dict[str, Any]:
    """Everything that decides a row, whatever its label: protocol, method, options, patterns, seed."""
    special = [(glob, str(chosen)) for glob, chosen in spec.pattern_for]  # in order: the last match counts
    where = {"protocol": protocol, "pattern": str(pattern), "pattern_for": special, "seed": seed}
    return {"init": None, **content_of(contender), **where}


def content_of(contender: Contender) -> dict[str, Any]:
    """Method and options of a contender and of what it starts from."""
    content: dict[str, Any] = {"method": contender.name, "options": dict(contender.options)}
    if contender.content:
        content["content"] = dict(contender.content)
    return {**content, "init": content_of(contender.init)} if contender.init else content
