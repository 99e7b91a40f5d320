"""Hypothesis strategies for patterns, weights, scores, masks and input statistics.

Each draws a seed, a kind and small shapes rather than single numbers, so that examples are varied and shrinking is
fast. Kinds cover values that break pruning code: ties, zeros, signed zeros, huge and subnormal values, a coarse grid.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from nmbench.methods import LayerStats
from nmbench.pattern import Pattern
from nmbench.testing.cases import INPUTS, LayerCase
from nmbench.testing.values import KINDS as KINDS
from nmbench.testing.values import statistics as statistics
from nmbench.testing.values import values as values

__all__ = ["KINDS", "cases", "grams", "layers", "logits", "masks", "patterns", "statistics", "tensors", "token_streams"]

__all__ += ["values"]


@st.composite
def patterns(draw: st.DrawFn, max_group: int = 32, units: tuple[int, ...] = (1,)) -> Pattern:
    """Any N:M with 1 <= N < M <= `max_group`; 2:4, 4:8 and 1:4 more often than the others.

    N and M count units, whose weights are one of `units`.
    """
    unit = draw(st.sampled_from(units))
    usual = [pair for pair in ((2, 4), (4, 8), (1, 4)) if pair[1] <= max_group]
    if draw(st.booleans()) and usual:
        keep, group = draw(st.sampled_from(usual))
    else:
        group = draw(st.integers(2, max_group))
        keep = draw(st.integers(1, group - 1))
    return Pattern(unit * keep, unit * group, unit)


@st.composite
def tensors(
    draw: st.DrawFn, pattern: Pattern, kinds: tuple[str, ...] = KINDS, max_rows: int = 6, max_groups: int = 5
) -> Tensor:
    """A finite float32 matrix `[rows, groups * group]`, whose rows hold whole groups of `pattern`."""
    shape = (draw(st.integers(1, max_rows)), pattern.group * draw(st.integers(1, max_groups)))
    return values(draw(st.sampled_from(kinds)), shape, draw(st.integers(0, 2**31)))


@st.composite
def masks(draw: st.DrawFn, pattern: Pattern, max_rows: int = 6, max_groups: int = 5) -> Tensor:
    """A strict bool mask `[rows, groups * group]`, every mask equally likely."""
    return pattern.top(draw(tensors(pattern, ("normal",), max_rows, max_groups)))


@st.composite
def layers(
    draw: st.DrawFn, pattern: Pattern, kinds: tuple[str, ...] = ("normal", "ties", "one outlier")
) -> tuple[Tensor, LayerStats]:
    """A weight `[out, in]` and the statistics of random inputs, some of whose channels may be dead or correlated."""
    weight = draw(tensors(pattern, kinds))
    seed, windows = draw(st.integers(0, 2**31)), draw(st.integers(1, 4))
    inputs = values("normal", (windows * 16, weight.shape[1]), seed)
    if draw(st.booleans()):
        inputs[:, 1:] += 0.7 * inputs[:, :-1]  # correlated neighbours
    if draw(st.booleans()):
        inputs[:, seed % weight.shape[1]] = 0.0  # a dead channel
    return weight, statistics(inputs, windows)


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, max_group: int = 16) -> LayerCase:
    """A layer as in the kit's checks; the `repr` of the case is the line of Python that makes the case again."""
    return LayerCase(
        pattern=str(draw(patterns(max_group))),
        kind=draw(st.sampled_from(kinds)),
        rows=draw(st.integers(1, 6)),
        groups=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**31)),
        inputs=draw(st.sampled_from(INPUTS)),
    )


@st.composite
def grams(draw: st.DrawFn, width: int) -> Tensor:
    """A Gram matrix float32 `[width, width]`, symmetric and positive semi-definite.

    Its inputs may be few, correlated or have a dead channel, so that many of these matrices are singular.
    """
    tokens, windows = draw(st.integers(1, 3 * width)), draw(st.integers(1, 4))
    inputs = values("normal", (tokens, width), draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        inputs[:, 1:] += 0.9 * inputs[:, :-1]
    if draw(st.booleans()):
        inputs[:, draw(st.integers(0, width - 1))] = 0.0
    gram = statistics(inputs, windows).gram
    assert gram is not None
    return gram


@st.composite
def logits(draw: st.DrawFn, pattern: Pattern, max_groups: int = 6) -> Tensor:
    """Logits of a mask policy, float32 `[groups, group]`: flat, moderate, tied, or so far apart that exp overflows."""
    shape = (draw(st.integers(1, max_groups)), pattern.group)
    scale = draw(st.sampled_from([0.0, 1.0, 10.0, 1e3]))
    return scale * values(draw(st.sampled_from(["normal", "ties"])), shape, draw(st.integers(0, 2**31)))


@st.composite
def token_streams(draw: st.DrawFn, vocabulary: int, max_windows: int = 6, max_length: int = 16) -> Tensor:
    """Windows of tokens int64 `[windows, window_tokens]`: random, a repeated token, or a few distinct ones."""
    shape = (draw(st.integers(1, max_windows)), draw(st.integers(2, max_length)))
    distinct = min(vocabulary, draw(st.sampled_from([1, 2, vocabulary])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    first = draw(st.integers(0, vocabulary - distinct))
    return first + torch.randint(distinct, shape, generator=generator)
