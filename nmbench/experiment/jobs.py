"""The jobs of a run, in the order in which they are done: every method at every pattern and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nmbench.experiment.plan import Contender
from nmbench.methods import MaskLearner
from nmbench.pattern import Pattern
from nmbench.spec import DENSE, ResolvedSpec, digest


@dataclass(frozen=True)
class Job:
    """One row to be: a contender at a pattern and a seed.

    `digest` names everything that decides the row, `work` everything but its label.
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
        """The name of the files of another label at the same pattern and seed."""
        return f"{label}--{self.pattern.keep}-{self.pattern.group}--seed{self.seed}"

    @property
    def title(self) -> str:
        """The job as people name it: `maskpro 2:4 seed 0`."""
        return f"{self.label} {self.pattern} seed {self.seed}"

    @property
    def learns(self) -> bool:
        """True for a mask learner, which reads the whole pool."""
        return isinstance(self.contender.method, MaskLearner)

    @property
    def start(self) -> str | None:
        """The label of the row that a learner begins with."""
        return self.contender.init.label if self.learns and self.contender.init else None


def dense_digest(protocol: str) -> str:
    """Digest of everything that decides the dense row."""
    return digest({"protocol": protocol, "label": DENSE})


def jobs(spec: ResolvedSpec, found: Sequence[Contender], protocol: str) -> Iterator[Job]:
    """Every job of `spec` but the dense row; `protocol` digests what its numbers depend on."""
    for pattern in spec.patterns:
        for seed in spec.seeds:
            for contender in found:
                content = decides(spec, contender, pattern, seed, protocol)
                yield Job(contender, pattern, seed, digest({"label": contender.label, **content}), digest(content))


def decides(spec: ResolvedSpec, contender: Contender, pattern: Pattern, seed: int, protocol: str) -> dict[str, Any]:
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
