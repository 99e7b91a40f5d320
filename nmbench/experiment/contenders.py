"""The contenders of a run: every method under its label, and the rows that learners and repairs begin with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nmbench.errors import NMBenchError, did_you_mean
from nmbench.methods import Baseline, MaskLearner, Method, Refiner, Repair, Solver
from nmbench.options import PRESET, build, resolved, typed
from nmbench.plugins.loading import Plugins
from nmbench.plugins.source_digest import code_of
from nmbench.spec import MethodSpec, RunSpec

BESIDE = ","  # between the starts of a repair


@dataclass(frozen=True)
class Contender:
    """A method of the run under its label, options resolved; `init` is the contender that it begins with.

    `asked`: the label that the user gave, which the rows of a repair with several starts share.
    """

    label: str
    name: str
    method: Method
    options: Mapping[str, Any]
    init: Contender | None = None
    content: Mapping[str, str] = field(default_factory=dict)
    asked: str = ""


@dataclass
class Found:
    """The contenders so far, by label, in the order of their rows; `asked`: those of each label of the user."""

    spec: RunSpec
    plugins: Plugins
    rows: dict[str, Contender] = field(default_factory=dict)
    asked: dict[str, list[Contender]] = field(default_factory=dict)


def contenders(spec: RunSpec, plugins: Plugins) -> list[Contender]:
    """Look up and build every method of `spec`; what a learner or a repair begins with has a row of its own, before it.

    Raises `NMBenchError` for an unknown method, option or initial method; no model is needed.
    """
    found = Found(spec, plugins)
    for asked in spec.methods:
        add(asked, found)
    return list(found.rows.values())


def add(asked: MethodSpec, found: Found, above: tuple[str, ...] = ()) -> list[Contender]:
    """Return the contenders of one method, several for a repair of several rows; they are put into `found` once.

    `above`: the labels of the methods that begin with this one.
    """
    if asked.label in found.asked:
        return found.asked[asked.label]
    if asked.label in above:
        circle = " -> ".join((*above, asked.label))
        raise NMBenchError(f"no method can start from its own mask ({circle}); give one of them another init.")
    contender = built(asked.label, asked.name, asked.options, found)
    made = [contender]
    if isinstance(contender.method, MaskLearner):
        made = [dataclasses.replace(contender, init=start_of(contender.method, asked, found, above))]
    elif isinstance(contender.method, Repair):
        made = repairs_of(contender, asked, found, above)
    found.asked[asked.label] = made
    found.rows.update({one.label: one for one in made})
    return made


def repairs_of(contender: Contender, asked: MethodSpec, found: Found, above: tuple[str, ...]) -> list[Contender]:
    """Return one contender for every row that a repair begins with: `label`, or `label@start` of several."""
    starts: dict[str, Contender] = {}
    for name in names_of(contender.method):
        starts.update({start.label: start for start in rows_named(name, asked, found, above)})
    several = len(starts) > 1
    return [
        dataclasses.replace(
            contender,
            label=f"{asked.label}@{label}" if several else asked.label,
            method=dataclasses.replace(contender.method, init=label),  # type: ignore[call-arg]
            options={**contender.options, "init": label},
            init=start,
        )
        for label, start in starts.items()
    ]


def rows_named(name: str, asked: MethodSpec, found: Found, above: tuple[str, ...]) -> list[Contender]:
    """Return the rows that a name in the option `init` of a repair stands for, which are put into `found`.

    A label of this command stands for its rows, weights included, and `label@start` for one of them. A registered
    one-shot method gets a row of its own under its name.
    """
    base = next((m for m in found.spec.methods if m.label == name.partition("@")[0] != name), None)
    if base is not None:
        row = {one.label: one for one in add(base, found, (*above, asked.label))}.get(name)
        if row is None:
            raise no_start(name, asked.label, found)
        return [row]
    start = named(name, asked.label, found)
    one_shot = issubclass(look_up_method(start.name, found.plugins), Baseline)
    if start not in found.spec.methods and not one_shot:
        raise no_start(name, asked.label, found)
    return add(start, found, (*above, asked.label))


def names_of(method: Method) -> list[str]:
    """Return the names in the option `init`: several of a repair, one of a refiner or a learner, else none."""
    text = str(getattr(method, "init", ""))
    parts = text.split(BESIDE) if isinstance(method, Repair) else [text]
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def look_up_method(name: str, plugins: Plugins) -> type[Method]:
    """Return the class of a method. Raises `NMBenchError` for an unknown name."""
    found: type[Method] = plugins.lookup(plugins.registries.methods, name)
    return found


def with_typed_options(spec: RunSpec, plugins: Plugins) -> RunSpec:
    """Return `spec` with the options of its methods as values instead of text, so that equal values make equal runs.

    Raises `NMBenchError` for an unknown method or option.
    """
    methods = []
    for asked in spec.methods:
        cls = look_up_method(asked.name, plugins)
        methods.append(dataclasses.replace(asked, options=typed(cls, asked.options, asked.label)))
    return dataclasses.replace(spec, methods=tuple(methods))


def built(label: str, name: str, given: Mapping[str, Any], found: Found) -> Contender:
    """A method with the options `given`, and what a refiner starts from, which stays inside its row."""
    cls = look_up_method(name, found.plugins)
    method = build(cls, given, label)
    options = resolved(method)
    if PRESET in given:
        options = {PRESET: given[PRESET], **options}
    init = initial(method, label, found) if isinstance(method, Refiner) else None
    return Contender(label, name, method, options, init, {**method.content(), **code_of(cls)}, label)


def start_of(learner: MaskLearner, asked: MethodSpec, found: Found, above: tuple[str, ...]) -> Contender:
    """The row that a learner begins with, which is put into `found`.

    The start of a one-shot method is the row `<label>@init`: its mask on the dense weights. The start of another kind
    is that method's own row. Raises `NMBenchError` if `init` names neither, or a repair of several rows.
    """
    start = named(learner.init, asked.label, found)
    if issubclass(look_up_method(start.name, found.plugins), Baseline):
        row = one_shot(start, f"{asked.label}@init", found)
        return found.rows.setdefault(row.label, row)
    if start not in found.spec.methods:
        raise no_start(learner.init, asked.label, found)
    rows = add(start, found, (*above, asked.label))
    if len(rows) > 1:
        listed = ", ".join(row.label for row in rows)
        raise NMBenchError(f"option {asked.label}.init names {learner.init}, which is several rows ({listed}).")
    return rows[0]


def named(init: str, label: str, found: Found) -> MethodSpec:
    """The method that the option `init` of the row `label` names.

    The label of another method of this command comes first, with its options there; then a registered method, with its
    default options. Raises `NMBenchError` if `init` names neither.
    """
    for other in found.spec.methods:
        if other.label == init and init not in (label, label.removesuffix("@init")):
            return other
    if init not in found.plugins.registries.methods:
        raise no_start(init, label, found)
    return MethodSpec(init, init)


def no_start(init: str, label: str, found: Found) -> NMBenchError:
    """The error for an option `init` that names no possible start."""
    others = [one.label for one in found.spec.methods if one.label != label]
    near = did_you_mean(init, {*others, *(entry.name for entry in found.plugins.registries.methods)} - {init})
    return NMBenchError(
        f"option {label}.init must name a one-shot method, or the label of another method in this command "
        f"({', '.join(others) or 'there is none'}); {init!r} is neither.{near}"
    )


def initial(refiner: Refiner, label: str, found: Found) -> Contender:
    """The one-shot method whose mask a refiner begins with; it stays inside the refiner's row.

    Raises `NMBenchError` if `init` names another kind of method.
    """
    start = named(refiner.init, label, found)
    cls = look_up_method(start.name, found.plugins)
    if not issubclass(cls, Baseline):
        raise NMBenchError(f"option {label}.init must name a one-shot method; {refiner.init!r} is none.")
    if issubclass(cls, Refiner):
        raise NMBenchError(f"option {label}.init must name a scorer or a solver; {refiner.init!r} is a refiner itself.")
    return one_shot(start, f"{label}@init", found)


def one_shot(start: MethodSpec, label: str, found: Found) -> Contender:
    """The one-shot method `start` under another label, of which the mask alone counts."""
    solver = issubclass(look_up_method(start.name, found.plugins), Solver)
    options = {**start.options, **({"mask_only": True} if solver else {})}
    return built(label, start.name, options, found)


def lineage(contender: Contender | None) -> Iterator[Contender]:
    """Yield a contender, the contender it starts from, and so on."""
    while contender is not None:
        yield contender
        contender = contender.init
