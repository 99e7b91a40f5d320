"""The plan of a run, checked before anything is loaded: names, options, patterns, and the start of each method."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nmbench.errors import NMBenchError
from nmbench.experiment.contenders import Contender, contenders, lineage, names_of, with_typed_options
from nmbench.experiment.doubts import Doubt
from nmbench.experiment.loading import device_of, dtype_of, source_of
from nmbench.methods import MaskLearner, Method, Repair
from nmbench.pattern import Pattern
from nmbench.plugins.loading import Plugins
from nmbench.plugins.registry import Registry
from nmbench.spec import CALIBRATION, INT8, Defaults, ResolvedSpec, RunSpec


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
        """True if the run has a mask learner or a repair, which read the pool and selection windows."""
        return any(isinstance(method, (MaskLearner, Repair)) for method in self.methods)

    @property
    def repaired(self) -> frozenset[str]:
        """The labels of the rows that repairs begin with, whose weights are kept if they are not dense."""
        inits = (contender.init for contender in self.contenders if isinstance(contender.method, Repair))
        return frozenset(init.label for init in inits if init)

    @property
    def doubts(self) -> Iterator[Doubt]:
        """A doubt for every start whose label is also the name of a method: the row of the command is the start."""
        labels = {asked.label: asked for asked in self.spec.methods}
        for contender in self.contenders:
            for other in filter(None, map(labels.get, names_of(contender.method))):
                known = other.label in self.plugins.registries.methods
                if known and (other.options or other.name != other.label):
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
    spec = with_typed_calibration(with_typed_options(spec, plugins), plugins)
    found = tuple(contenders(spec, plugins))
    if spec.weights:
        check_eight_bit(found)
    check_supported(found, (*spec.patterns, *(pattern for _, pattern in spec.pattern_for)))
    return Plan(spec, plugins, found)


def check_names(spec: RunSpec, plugins: Plugins) -> None:
    """Raise `NMBenchError` for an unknown or ill-formed model, metric, data set or dtype, before anything is loaded."""
    source_of(spec.model, plugins)
    if spec.calibration:
        check_calibration(spec.calibration, plugins)
    for text in spec.metrics:
        for name in look_up(plugins, plugins.registries.metrics, text).datasets:
            look_up(plugins, plugins.registries.datasets, name)
    for dtype in (spec.dtype, spec.eval_dtype):
        if dtype:
            dtype_of(dtype)
    device_of(spec.device)


def check_calibration(name: str, plugins: Plugins) -> None:
    """Raise `NMBenchError` for an unknown data set, and for prompts from text that is sampled itself."""
    sampling = look_up(plugins, plugins.registries.datasets, name).sampling
    if sampling and look_up(plugins, plugins.registries.datasets, sampling.source).sampling:
        raise NMBenchError(
            f"--calibration {name} takes its prompts from text that is sampled itself; name real text, for example "
            f"{CALIBRATION}."
        )


def look_up(plugins: Plugins, registry: Registry, text: str) -> Any:
    """Return the data set or metric of the text `name` or `name:argument`."""
    name, _, argument = text.partition(":")
    return plugins.lookup(registry, name)(argument)


def with_typed_calibration(spec: RunSpec, plugins: Plugins) -> RunSpec:
    """Return `spec` with the options of sampled calibration text in one form, so that equal values make equal runs."""
    if not spec.calibration:
        return spec
    sampling = look_up(plugins, plugins.registries.datasets, spec.calibration).sampling
    name = f"{spec.calibration.partition(':')[0]}:{sampling}" if sampling else spec.calibration
    return dataclasses.replace(spec, calibration=name)


def check_eight_bit(found: Iterable[Contender]) -> None:
    """Raise `NMBenchError` for a method that does not work on weights in 8 bits."""
    for contender in itertools.chain.from_iterable(map(lineage, found)):
        if not contender.method.eight_bit:
            learner = isinstance(contender.method, MaskLearner)
            why = "needs float weights or gradients of weights" if learner else "writes new weights, which are floats"
            raise NMBenchError(
                f"{contender.label} {why}, and --weights {INT8} stores them in 8 bits; leave out --weights, or choose "
                f"a method that finds masks by forward passes alone, as wanda, swaps, maskpro and flips do."
            )


def check_supported(found: Iterable[Contender], patterns: Sequence[Pattern]) -> None:
    """Raise `NMBenchError` if a method cannot do one of the patterns, before anything is computed."""
    for contender in itertools.chain.from_iterable(map(lineage, found)):
        for pattern in patterns:
            if reason := contender.method.supports(pattern):
                raise NMBenchError(f"{contender.label} cannot prune to {pattern}: {reason}")
