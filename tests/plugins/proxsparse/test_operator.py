"""Laws of the proximal operator: it is the minimum, 0 changes nothing, and infinity leaves exactly the top N."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench_plugins.proxsparse.operator import best_of_supports, objective, prox_, settled, sweep

quick = settings(max_examples=10, deadline=None)
PATTERNS = st.sampled_from([(1, 2), (1, 4), (2, 3), (2, 4), (3, 4), (2, 5), (4, 6)])
LARGE = st.sampled_from([(4, 8), (3, 8)])


def prox(z: Tensor, lam: float, keep: int, at_once: int = 5) -> Tensor:
    """The prox of `z` `[group, groups]`, a copy."""
    return prox_(z.t().clone(), lam, keep, at_once).t()


def plain_objective(w: Tensor, z: Tensor, lam: float, keep: int) -> Tensor:
    """The formula, product by product: `[group, groups]` -> `[groups]`."""
    products = [w[list(some)].abs().prod(dim=0) for some in itertools.combinations(range(len(w)), keep + 1)]
    return 0.5 * (w - z).square().sum(dim=0) + lam * torch.stack(products).sum(dim=0)


def least(z: Tensor, lam: float, keep: int) -> Tensor:
    """The lowest objective that descent from 200 points of the box [0, z] finds for one group, `z` `[group]`."""
    generator = torch.Generator().manual_seed(0)
    w = z.abs()[:, None] * torch.rand(len(z), 200, generator=generator, dtype=z.dtype)
    target = z.abs()[:, None].expand_as(w)
    for _ in range(100):
        for i in range(len(z)):
            others = torch.cat([w[:i], w[i + 1 :]])
            slope = torch.stack(
                [others[list(some)].prod(dim=0) for some in itertools.combinations(range(len(z) - 1), keep)]
            )
            w[i] = (target[i] - lam * slope.sum(dim=0)).clamp_min(0.0)
    return plain_objective(w, target, lam, keep).min()


@st.composite
def drawn(draw, patterns=PATTERNS, dtype=torch.float64):
    """Weights `[group, groups]` with ties and zeros, lam from weak to strong, and N."""
    keep, group = draw(patterns)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    z = torch.randn(group, draw(st.sampled_from([1, 7])), generator=generator, dtype=dtype)
    if draw(st.booleans()):
        z = (z * 2).round() / 2
    scale = draw(st.sampled_from([1.0, 0.02]))
    return z * scale, 10.0 ** draw(st.floats(-3, 2)) / scale ** (keep - 1), keep


@quick
@given(drawn())
def test_the_prox_is_the_minimum(case):
    """No point that descent from many starts finds has a lower objective."""
    z, lam, keep = case
    z = z[:, :1]
    found = float(plain_objective(prox(z, lam, keep), z, lam, keep))
    assert found <= float(least(z[:, 0], lam, keep)) * (1 + 1e-6) + 1e-12


@quick
@given(drawn(st.one_of(PATTERNS, LARGE), torch.float32))
def test_lam_0_changes_nothing_and_a_huge_one_leaves_the_top(case):
    """With lam 0 the weights stay as they are; with a huge lam the N largest do, of ties the first, and no others."""
    z, _, keep = case
    assert prox(z, 0.0, keep).equal(z + 0.0)  # + 0.0: -0.0 becomes 0.0
    order = z.abs().argsort(dim=0, descending=True, stable=True)[:keep]
    top = torch.zeros_like(z).scatter_(0, order, z.gather(0, order))
    assert prox(z, 1e30, keep).equal(top + 0.0)


def test_large_groups_are_feasible():
    """At 16:32 every kind of group has its prox: lowered, not raised, and N:M where lam is huge."""
    z = torch.randn(32, 20, generator=torch.Generator().manual_seed(0))
    assert (objective(prox(z, 1e-12, 16).abs(), z.abs(), 1e-12, 16) <= objective(z.abs(), z.abs(), 1e-12, 16)).all()
    assert ((prox(z, 1e30, 16) != 0).sum(dim=0) == 16).all()


@quick
@given(drawn(PATTERNS, torch.float32))
def test_signs_and_order_return(case):
    """The prox has the signs of the weights, follows their order, is no larger than they, and has no -0.0."""
    z, lam, keep = case
    found = prox(z, lam, keep)
    assert found.shape == z.shape and (found * z >= 0).all() and (found.abs() <= z.abs()).all()
    assert not found.signbit()[found == 0].any()
    assert prox(-z, lam, keep).equal(-found + 0.0)
    flipped = prox(z.flip(0), lam, keep).flip(0)
    assert objective(flipped.abs(), z.abs(), lam, keep).allclose(objective(found.abs(), z.abs(), lam, keep), rtol=1e-4)


@quick
@given(drawn(PATTERNS))
def test_the_quick_ways_are_the_search_of_all_supports(case):
    """Settled groups keep their top N in the search of all supports, and convex groups have the same minimum there."""
    z, lam, keep = case
    z = z.abs().sort(dim=0, descending=True).values
    searched = best_of_supports(z, lam, keep)
    quiet = settled(z, lam, keep)
    assert searched[:keep, quiet].equal(z[:keep, quiet]) and not searched[keep:, quiet].any()
    assert objective(prox(z, lam, keep), z, lam, keep).allclose(objective(searched, z, lam, keep), rtol=1e-9)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_sweeps_never_raise_the_objective(keep):
    """However far a sweep goes, up to the best value of every weight, the objective falls."""
    z = torch.rand(4, 50, generator=torch.Generator().manual_seed(keep), dtype=torch.float64)
    for pace in (0.5, 1.0):
        w, left, right = torch.zeros_like(z), z.new_zeros(4, keep + 1, 50), z.new_zeros(2, keep + 1, 50)
        for _ in range(5):
            before = objective(w, z, 3.0, keep)
            sweep(w, z, 3.0, pace, left, right)
            assert (objective(w, z, 3.0, keep) <= before + 1e-12).all()


# Weights, lam and the prox that the function `prox_op` of amazon-science/ProxSparse (end-to-end/prox_op.py, revision
# 4a558bc) returned for them in float64.
PUBLISHED = (
    ([0.9, -0.7, 0.5, 0.3], 0.2, [0.836681819818, -0.616416863192, 0.370974705856, 0.089038471827]),
    ([0.9, -0.7, 0.5, 0.3], 0.6, [0.827174377347, -0.599520562026, 0.202455170752, 0.0]),
    ([0.9, -0.7, 0.5, 0.3], 1.5, [0.9, -0.7, 0.0, 0.0]),
    ([-0.2, 1.1, 0.6, -0.8], 0.4, [0.0, 1.0119711818, 0.330288161412, -0.666303159515]),
    ([0.01, -0.03, 0.02, 0.025], 10.0, [0.0, -0.026977332992, 0.014296103603, 0.021143292549]),
    ([0.01, -0.03, 0.02, 0.025], 0.25, [0.009547636194, -0.029772236517, 0.019685787932, 0.02473542571]),
    ([2.0, -0.1, 0.05, 1.0], 0.03, [1.998797487767, -0.040180551452, 0.0, 0.997590616441]),
    ([0.5, 0.0, -0.4, 0.3], 0.7, [0.4544065031, 0.0, -0.338859708132, 0.192213961818]),
)


@pytest.mark.parametrize(("weights", "lam", "expected"), PUBLISHED)
def test_the_prox_of_the_authors(weights, lam, expected):
    """The prox at 2:4 is that of the function that the authors published."""
    z = torch.tensor(weights, dtype=torch.float64)[:, None]
    torch.testing.assert_close(prox(z, lam, 2)[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_the_minimum_is_found_where_full_sweeps_miss_it():
    """Of three nearly equal weights, full sweeps from 0 lower one to 0; all three above 0 are better.

    The published function returns the top 2 here.
    """
    z = torch.tensor([0.99, 0.98, 1.0, 0.05], dtype=torch.float64)[:, None]
    found, top = prox(z, 1.1, 2), z * torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]
    assert (found[:3] > 0.5).all() and found[3] == 0
    assert float(objective(top, z, 1.1, 2) - objective(found, z, 1.1, 2)) == pytest.approx(0.014666, rel=1e-4)
