"""Registries of named classes: one each for methods, models, data sets, metrics and reporters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nmbench.errors import NMBenchError, unknown

FILE = "file "  # begins the displayed name of a plugin file


@dataclass(frozen=True)
class Entry:
    """One registered object and the displayed name of its plugin: `nmbench-acme 1.0 [acme]`.

    `shadowed` is the entry of an installed plugin that a plugin file of the user replaces.
    """

    name: str
    obj: Any
    origin: str
    shadowed: Entry | None = None

    @property
    def from_file(self) -> bool:
        """True for a plugin file that the user named."""
        return self.origin.startswith(FILE)


@dataclass
class Registry:
    """Registered objects of one `kind` by lower-case name."""

    kind: str
    entries: dict[str, Entry] = field(default_factory=dict)

    def register(self, name: str, obj: Any, origin: str) -> None:
        """Add one entry; a plugin file that the user named replaces an installed plugin.

        Raises `NMBenchError` for an illegal name and for a name that is taken.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_.+-]*", name):
            raise NMBenchError(
                f"{self.kind} name {name!r} of {origin} is not legal: lower-case letters, digits and _.+- only."
            )
        known = self.entries.get(name)
        entry = Entry(name, obj, origin, known)
        if known is not None and (known.from_file or not entry.from_file):
            raise NMBenchError(f"{self.kind} {name!r} of {origin} is already provided by {known.origin}; rename yours.")
        self.entries[name] = entry

    def forget(self, origin: str) -> None:
        """Remove all entries of one plugin; an entry that it replaced is back."""
        left = {name: entry.shadowed if entry.origin == origin else entry for name, entry in self.entries.items()}
        self.entries = {name: entry for name, entry in left.items() if entry is not None}

    @property
    def replaced(self) -> list[str]:
        """One line for every installed entry that a plugin file replaces."""
        return [
            f"{self.kind} {entry.name!r} of {entry.origin} replaces that of {entry.shadowed.origin}"
            for entry in self
            if entry.shadowed
        ]

    def get(self, name: str) -> Any:
        """Return the object registered as `name`. Raises `UnknownName` with the nearest name."""
        if name not in self.entries:
            raise unknown(self.kind, name, self.entries)
        return self.entries[name].obj

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self.entries.values(), key=lambda entry: entry.name))


@dataclass
class Registries:
    """All registries of one process; baselines and mask learners share `methods`, so their names are unique."""

    methods: Registry = field(default_factory=lambda: Registry("method"))
    models: Registry = field(default_factory=lambda: Registry("model"))
    datasets: Registry = field(default_factory=lambda: Registry("data set"))
    metrics: Registry = field(default_factory=lambda: Registry("metric"))
    reporters: Registry = field(default_factory=lambda: Registry("reporter"))

    def by_hook(self) -> Mapping[str, Registry]:
        """Return hook name -> the registry that this announcing hook fills."""
        return {
            "nmbench_register_baselines": self.methods,
            "nmbench_register_mask_learners": self.methods,
            "nmbench_register_repairs": self.methods,
            "nmbench_register_models": self.models,
            "nmbench_register_datasets": self.datasets,
            "nmbench_register_metrics": self.metrics,
            "nmbench_register_reporters": self.reporters,
        }

    def forget(self, origin: str) -> None:
        """Remove all entries of one plugin from all registries."""
        for registry in self.all():
            registry.forget(origin)

    def all(self) -> tuple[Registry, ...]:
        """Every registry."""
        return (self.methods, self.models, self.datasets, self.metrics, self.reporters)


Register = Callable[[str, Any], None]
