"""Laws of scorers: a change that leaves the pruning problem unchanged leaves the kept weights unchanged.

Reordering rows, reordering or flipping input channels, and scaling all weights or all inputs keep the problem the same.
A criterion that depends on anything else, such as a random one, declares the broken law as an expected failure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.methods import LayerStats, Scorer
from nmbench.testing.cases import INPUTS
from nmbench.testing.laws.base import HOLDS, SKIPPED, Broken, Judgement, law, layers
from nmbench.testing.laws.layerwise import Change, score_of
from nmbench.testing.observation import Observation
from nmbench.testing.values import KINDS

FINITE = tuple(
    kind for kind in KINDS if kind != "huge"
)  # a power of 1e30 can overflow; the host then refuses the scores
ordinary = layers(pattern=("2:4", "4:8"), kind=("normal", "ties"), inputs=("plain", "correlated"), rows=(5,))


@law(Scorer, cases=layers(pattern=("2:4", "4:8"), kind=FINITE, inputs=INPUTS))
def scores_are_finite(observed: Observation) -> Judgement:
    """Scores are finite, also for rows of zeros, dead inputs, outliers and subnormal weights."""
    if observed.score is None:
        return SKIPPED
    broken = (~observed.score.isfinite()).nonzero()
    if len(broken):
        where = tuple(broken[0].tolist())
        return Broken(f"{observed.score[where].item()} at {where}", "finite scores; watch divisions by a sum of zeros")
    return HOLDS


@law(Scorer, cases=ordinary)
def row_order_does_not_matter(observed: Observation) -> Judgement:
    """Reordering the output rows of a layer reorders its scores, and nothing else."""
    order = shuffled(observed.case.shape[0])

    def reorder(weight: Tensor, stats: LayerStats) -> tuple[Tensor, LayerStats]:
        return weight[order], changed(stats, lag=lambda lag: lag[order])

    return same_scores(observed, reorder, lambda score: score[order], "method.score(weight[order], stats)")


@law(Scorer, cases=ordinary)
def channel_order_does_not_matter(observed: Observation) -> Judgement:
    """Reordering the input channels, in the weight and in the statistics, reorders the scores, and nothing else."""
    order = shuffled(observed.case.shape[1])

    def reorder(weight: Tensor, stats: LayerStats) -> tuple[Tensor, LayerStats]:
        def square(gram: Tensor) -> Tensor:
            return gram[order][:, order]

        moved = changed(
            stats, input_norm=lambda norm: norm[order], gram=square, drift=square, lag=lambda lag: lag[:, order]
        )
        return weight[:, order], moved

    return same_scores(
        observed, reorder, lambda score: score[:, order], "method.score(weight[:, order], reordered stats)"
    )


@law(Scorer, cases=ordinary)
def channel_signs_do_not_matter(observed: Observation) -> Judgement:
    """Flipping the sign of input channels, in the weight and in the statistics, changes no score."""
    sign = 1.0 - 2.0 * (torch.arange(observed.case.shape[1]) % 3 == 0)

    def flip(weight: Tensor, stats: LayerStats) -> tuple[Tensor, LayerStats]:
        def square(gram: Tensor) -> Tensor:
            return gram * sign[:, None] * sign

        return weight * sign, changed(stats, gram=square, drift=square, lag=lambda lag: lag * sign)

    return same_scores(observed, flip, lambda score: score, "method.score(weight * sign, stats of inputs * sign)")


@law(Scorer, cases=ordinary)
def scale_does_not_matter(observed: Observation) -> Judgement:
    """Scaling all weights, or all inputs, of a layer by a power of two changes no mask, up to rounding."""
    for weights, inputs in ((8.0, 1.0), (0.125, 1.0), (1.0, 4.0)):

        def scale(
            weight: Tensor, stats: LayerStats, weights: float = weights, inputs: float = inputs
        ) -> tuple[Tensor, LayerStats]:
            def square(gram: Tensor) -> Tensor:
                return gram * inputs**2

            scaled = changed(
                stats,
                input_norm=lambda norm: norm * inputs,
                gram=square,
                drift=square,
                lag=lambda lag: lag * inputs**2 * weights,
            )
            return weight * weights, scaled

        score, other = observed.score, score_of(observed, scale)
        if score is None or other is None or not score.isfinite().all():
            return SKIPPED
        if relative_loss(observed, score, other) > 1e-4:
            return Broken(
                "a mask that drops weights with clearly higher scores",
                "the same mask, up to rounding",
                f"method.score({weights:g} * weight, stats of {inputs:g} * inputs)",
            )
    return HOLDS


def shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


def changed(stats: LayerStats, **changes: Callable[[Tensor], Tensor]) -> LayerStats:
    """The statistics with `changes` applied to those that are not None."""
    present = {name: getattr(stats, name) for name in changes}
    new: dict[str, Any] = {name: changes[name](value) for name, value in present.items() if value is not None}
    return dataclasses.replace(stats, **new)


def same_scores(observed: Observation, change: Change, expect: Callable[[Tensor], Tensor], how: str) -> Judgement:
    """Judge whether the scores of the changed layer are the expected ones, up to rounding."""
    if observed.score is None or not observed.score.isfinite().all():
        return SKIPPED
    other = score_of(observed, change)
    if other is None:
        return SKIPPED
    wanted = expect(observed.score).double()
    scale = float(wanted.abs().max())
    apart = (other.double() - wanted).abs() > 1e-3 * wanted.abs() + 1e-6 * scale
    if apart.any():
        where = tuple(apart.nonzero()[0].tolist())
        return Broken(f"{other[where].item():g} at {where}", f"{wanted[where].item():g}", how)
    return HOLDS


def relative_loss(observed: Observation, score: Tensor, other: Tensor) -> float:
    """The score that the mask of `other` loses in the worst group, relative to the group's largest score."""
    try:
        own, others = observed.case.nm.top(score), observed.case.nm.top(other)
    except NMBenchError:
        return 1.0
    kept, alternative = (observed.case.nm.groups(score.double() * mask).sum(-1) for mask in (own, others))
    largest = observed.case.nm.groups(score.double().abs()).amax(-1).clamp_min(1e-30)
    return float(((kept - alternative) / largest).max())
