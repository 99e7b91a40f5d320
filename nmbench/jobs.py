"""The jobs of a run, in the order in which they are done: dense, then every method at every pattern and seed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nmbench.code import code_of
from nmbench.errors import NMBenchError
from nmbench.methods import Baseline, MaskLearner, Method, Refiner, Solver
from nmbench.options import PRESET, build, resolved, typed
from nmbench.pattern import Pattern
from nmbench.plugins import Plugins
from nmbench.spec import DENSE, RunSpec, digest


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
    """Look up and build every method of `spec`, a learner's initial one, which has its own row, before the learner.

    Raises `NMBenchError` for an unknown method, option or initial method; no model is needed.
    """
    found = []
    for asked in spec.methods:
        cls = plugins.lookup(plugins.registries.methods, asked.name)
        method = build(cls, asked.options, asked.label)
        options = resolved(method)
        if PRESET in asked.options:
            options = {PRESET: asked.options[PRESET], **options}
        init = initial(method, asked.label, plugins)
        found += [init] if init and isinstance(method, MaskLearner) else []
        found.append(Contender(asked.label, asked.name, method, options, init, {**method.content(), **code_of(cls)}))
    return found


def initial(method: Method, label: str, plugins: Plugins) -> Contender | None:
    """The one-shot method whose mask a learner or a refiner starts from, as the contender `<label>@init`.

    Raises `NMBenchError` if `init` names a mask learner or, for a refiner, a refiner.
    """
    if not isinstance(method, (MaskLearner, Refiner)):
        return None
    cls = plugins.lookup(plugins.registries.methods, method.init)
    if not issubclass(cls, Baseline):
        raise NMBenchError(f"option {label}.init must name a one-shot method; {method.init!r} is none.")
    if isinstance(method, Refiner) and issubclass(cls, Refiner):
        raise NMBenchError(f"option {label}.init must name a scorer or a solver; {method.init!r} is a refiner itself.")
    start = build(cls, {"mask_only": True} if issubclass(cls, Solver) else {}, f"{label}@init")
    below = initial(start, f"{label}@init", plugins)
    return Contender(f"{label}@init", method.init, start, resolved(start), below, {**start.content(), **code_of(cls)})


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
