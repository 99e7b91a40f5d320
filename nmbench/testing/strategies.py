"""Hypothesis strategies for patterns, weights, scores, masks and input statistics.

Each draws a seed, a kind and small shapes rather than single numbers, so that examples are varied and shrinking is
fast. Kinds cover what breaks pruning code: ties, zeros, signed zeros, huge and subnormal values, a coarse grid.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from nmbench.methods import LayerStats
from nmbench.pattern import Pattern

KINDS = ("normal", "ties", "zeros", "signed zeros", "huge", "subnormal", "half grid", "one outlier")


@st.composite
def patterns(draw: st.DrawFn, max_group: int = 32) -> Pattern:
    """Any N:M with 1 <= N < M <= `max_group`; 2:4, 4:8 and 1:4 more often than the others."""
    usual = [Pattern(*pair) for pair in ((2, 4), (4, 8), (1, 4)) if pair[1] <= max_group]
    if draw(st.booleans()) and usual:
        return draw(st.sampled_from(usual))
    group = draw(st.integers(2, max_group))
    return Pattern(draw(st.integers(1, group - 1)), group)


def values(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """float32 values of one kind, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=generator).float()
    if kind == "zeros":
        return normal * (torch.rand(shape, generator=generator) < 0.3)
    if kind == "signed zeros":
        return torch.zeros(shape).copysign(normal)
    if kind == "huge":
        return normal * 1e30
    if kind == "subnormal":
        return normal * 1e-41
    if kind == "half grid":
        return normal.half().float()
    if kind == "one outlier":
        normal.view(-1)[int(torch.randint(normal.numel(), (1,), generator=generator))] = 1e4
    return normal


@st.composite
def tensors(
    draw: st.DrawFn, pattern: Pattern, kinds: tuple[str, ...] = KINDS, max_rows: int = 6, max_groups: int = 5
) -> Tensor:
    """A finite float32 matrix `[rows, groups * group]` that falls into groups of `pattern`."""
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


def statistics(inputs: Tensor, windows: int) -> LayerStats:
    """`LayerStats` of inputs `[tokens, in]` from `windows` windows, written out as the definition says it."""
    x = inputs.float()
    return LayerStats(windows, len(x), (x.square().sum(dim=0) / windows).sqrt(), 2.0 / windows * x.T @ x)
