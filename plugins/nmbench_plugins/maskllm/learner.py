"""MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models (arXiv 2409.17481).

One gate for each of the C(M, N) patterns of a group. Every step draws Gumbel noise for every gate, and the soft mask of
a group is the mean of its patterns with the weights softmax((scale * gates + noise) / temperature). The loss of the
model with the weights W * soft mask, less a reward of the kept weights, reward * sum of (W * soft mask)^2, gives the
gradient of the gates, and Adam takes the step. While the run goes on the temperature falls, the scale grows, and the
reward fades to 0. The mask has the pattern of the largest gate in every group; weights never change.

Our own, for budgets far below the paper's 2 billion tokens: the start is a mask of another method with a strength that
is a probability (`prior`), the loss may be the divergence from the dense model, annealing may be exponential, and the
mask is chosen on held-out windows, where it must beat the start on windows that were not read before. The paper's decay
of the gates, 0.1 times the step size, and its clipping of gradients are left out. Preset `paper` has its schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import nmbench
from nmbench_plugins.maskllm.candidates import count_of, why_too_many
from nmbench_plugins.maskllm.schedule import ANNEALINGS

if TYPE_CHECKING:
    from torch import Tensor

GATE = 4  # bytes a gate
MOMENTS = {"float32": 8, "bfloat16": 4}  # bytes a gate, of both moments
PAPER = {
    "tokens": 2000 * 256 * 4096,
    "kl": 0.0,
    "learning_rate": 5e-4,
    "leave": 0.17,
    "annealing": "linear",
    "annealed": 1.0,
    "first_temperature": 4.0,
    "last_temperature": 0.05,
    "first_scale": 100.0,
    "last_scale": 500.0,
    "reward": 1e-5,
    "minibatch": 256,
}
ABOVE_0 = ("learning_rate", "first_temperature", "last_temperature", "first_scale", "last_scale")
LEAST = {"passes": 0, "tokens": 0, "minibatch": 1, "window_tokens": 2, "check_every": 1, "checkpoint_every": 1}


@dataclass(frozen=True)
class MaskLLM(nmbench.MaskLearner):
    """Learn a gate for every pattern of every group by gradients through a soft choice; weights stay dense."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}
    data_parallel = True

    init: str = nmbench.option("swaps", "whose mask is the start: a one-shot method, or a label of the same run")
    passes: float = nmbench.option(1.0, "passes over the pool")
    tokens: int | None = nmbench.option(None, "tokens to learn from; none: as many as `passes` say", unit="tokens")
    kl: float = nmbench.option(1.0, "share of the divergence from the dense model; the rest is cross-entropy")
    learning_rate: float = nmbench.option(2e-3, "step size of Adam on the gates, at the first step")
    fall: float = nmbench.option(0.1, "step size at the last step, relative to the first; it falls along a cosine")
    leave: float = nmbench.option(0.35, "probability that a draw of a group leaves the start, at the first step")
    annealing: str = nmbench.option("exponential", "how temperature and scale change", choices=ANNEALINGS)
    annealed: float = nmbench.option(0.75, "share of the steps after which temperature and scale stay as they are")
    first_temperature: float = nmbench.option(1.0, "temperature of the choice at the first step")
    last_temperature: float = nmbench.option(0.05, "temperature after the annealing")
    first_scale: float = nmbench.option(50.0, "factor of the gates beside the noise, at the first step")
    last_scale: float = nmbench.option(500.0, "factor of the gates after the annealing")
    reward: float = nmbench.option(0.0, "reward of the sum of squares of kept weights; it fades linearly to 0")
    moments: str = nmbench.option("float32", "dtype in which the moments of Adam are kept", choices=tuple(MOMENTS))
    minibatch: int = nmbench.option(4, "windows per step", unit="windows")
    window_tokens: int | None = nmbench.option(None, "window length; none: the pool's", unit="tokens")
    compile: bool = nmbench.option(False, "on a GPU, fuse the work between the matrix products of a step")
    check_every: int = nmbench.option(50, "steps between two measurements on selection windows", unit="steps")
    checkpoint_every: int = nmbench.option(100, "steps between two checkpoints", unit="steps")

    def __post_init__(self) -> None:
        nmbench.check_least(self, "maskllm", LEAST)
        for name in ("kl", "fall"):
            if not 0 <= getattr(self, name) <= 1:
                raise impossible(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ABOVE_0:
            if not 0 < getattr(self, name) < float("inf"):
                raise impossible(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 < self.leave < 1:
            raise impossible(f"leave must lie between 0 and 1, not {self.leave}")
        if not 0 < self.annealed <= 1:
            raise impossible(f"annealed must lie in (0, 1], not {self.annealed}")
        if not 0 <= self.reward < float("inf"):
            raise impossible(f"reward must be at least 0, not {self.reward}")

    def supports(self, pattern: nmbench.Pattern) -> str | None:
        return why_too_many(pattern)

    def bytes_per_weight(self, itemsize: int) -> float:
        """Return the bytes at 2:4; `bytes_at` knows the pattern."""
        return self.bytes_at(nmbench.Pattern(2, 4), itemsize)

    def bytes_at(self, pattern: nmbench.Pattern, itemsize: int) -> float:
        """Return the bytes of gates, moments, a gradient of the live weight, and the dense weight."""
        return (GATE + MOMENTS[self.moments]) * count_of(pattern) / pattern.group + 2 * itemsize

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        """Return the learnt mask by layer, or that of the start if it is not better."""
        from nmbench_plugins.maskllm.training import learnt

        return learnt(self, task)


def impossible(what: str) -> nmbench.NMBenchError:
    return nmbench.NMBenchError(f"option maskllm.{what}.")
