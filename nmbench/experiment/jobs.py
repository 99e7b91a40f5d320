"""The jobs of a run in their order: every method at every pattern and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nmbench.experiment.contenders import Contender
from nmbench.methods import MaskLearner, Repair
from nmbench.pattern import Pattern
from nmbench.plain_data import digest
from nmbench.results.address import file_name
from nmbench.spec import DENSE, ResolvedSpec


@dataclass(frozen=True)
class Job:
    """The work of one row: a contender at a pattern and a seed.

    `digest` is of everything that decides the row, `work` of the same without the label.
    """

    contender: Contender
    pattern: Pattern
    seed: int
    digest: str
    work: str

    @property
    def label(self) -> str:
        """The label of the row."""
        return self.contender.label

    @property
    def name(self) -> str:
        """The name of the job's files: `maskpro--2-4--seed0`."""
        return self.files_of(self.label)

    def files_of(self, label: str) -> str:
        """Return the name of the files of another label at the same pattern and seed."""
        return file_name(label, self.pattern, self.seed)

    @property
    def title(self) -> str:
        """The job in words: `maskpro 2:4 seed 0`."""
        return f"{self.label} {self.pattern} seed {self.seed}"

    @property
    def learns(self) -> bool:
        """True for a method that reads the pool, or selection windows alone as a layer repair does."""
        return isinstance(self.contender.method, (MaskLearner, Repair))

    @property
    def start(self) -> str | None:
        """The label of the row that a learner or a repair begins with; None for other methods."""
        return self.contender.init.label if self.learns and self.contender.init else None

    @property
    def repairs(self) -> str | None:
        """The label of the repair as the user gave it, which several rows share; None for other methods."""
        return self.contender.asked if isinstance(self.contender.method, Repair) else None


def dense_digest(protocol: str) -> str:
    """Return the digest of everything that decides the dense row."""
    return digest({"protocol": protocol, "label": DENSE})


def jobs(spec: ResolvedSpec, found: Sequence[Contender], protocol: str) -> Iterator[Job]:
    """Yield every job of `spec`; `protocol` is the protocol digest, and the dense row is not a job."""
    for pattern in spec.patterns:
        for seed in spec.seeds:
            for contender in found:
                content = decides(spec, contender, pattern, seed, protocol)
                yield Job(contender, pattern, seed, digest({"label": contender.label, **content}), digest(content))


def decides(spec: ResolvedSpec, contender: Contender, pattern: Pattern, seed: int, protocol: str) -> dict[str, Any]:
    """Return everything that decides a row, but the label: protocol, method, options, patterns, seed, start."""
    special = [(glob, str(chosen)) for glob, chosen in spec.pattern_for]  # in order: the last match counts
    where = {"protocol": protocol, "pattern": str(pattern), "pattern_for": special, "seed": seed}
    return {"init": None, **content_of(contender), **where}


def content_of(contender: Contender) -> dict[str, Any]:
    """Return method and options of a contender and of its start."""
    content: dict[str, Any] = {"method": contender.name, "options": dict(contender.options)}
    if contender.content:
        content["content"] = dict(contender.content)
    return {**content, "init": content_of(contender.init)} if contender.init else content
