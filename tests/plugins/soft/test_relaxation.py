"""Laws of the soft mask: what it sums to, its limits, and its gradient, which equals autograd of the plain formula."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.pattern import Pattern
from nmbench.pruning import gumbel, step_keys
from nmbench_plugins.maskpro.policy import log_prob
from nmbench_plugins.soft.relaxation import as_rows, columns, soft_mask, soft_mask_gradient

quick = settings(max_examples=30, deadline=None)
PATTERNS = st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (2, 3), (4, 8), (8, 16)])
TEMPERATURES = st.sampled_from([1.0, 0.3, 0.05])


def plain(keys: torch.Tensor, temperature: float, keep: int) -> torch.Tensor:
    """The formula of the paper, with 1 - mu as the sum of the softmax of all others."""
    group = len(keys)
    mask = torch.zeros_like(keys)
    for _ in range(keep):
        scaled = keys / temperature
        mask = mask + F.softmax(scaled, dim=0)
        others = torch.stack([scaled[[j for j in range(group) if j != i]].logsumexp(dim=0) for i in range(group)])
        keys = keys + others - scaled.logsumexp(dim=0)
    return mask


@st.composite
def drawn(draw):
    """Keys float64 `[group, 5]`, from ties to gaps of 1000, with N and a temperature."""
    keep, group = draw(PATTERNS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1000.0]))
    keys = scale * torch.randn(group, 5, generator=generator, dtype=torch.float64)
    return keys, torch.randn(group, 5, generator=generator, dtype=torch.float64), keep, draw(TEMPERATURES)


@quick
@given(drawn())
def test_the_soft_mask_is_the_plain_formula(case):
    """The mask equals the plain formula, is at least 0, and sums to N."""
    keys, _, keep, temperature = case
    mask = soft_mask(keys, temperature, keep)
    torch.testing.assert_close(mask, plain(keys, temperature, keep), rtol=1e-9, atol=1e-12)
    assert (mask >= 0).all()
    torch.testing.assert_close(mask.sum(dim=0), torch.full((5,), float(keep), dtype=torch.float64))


@quick
@given(drawn())
def test_the_gradient_is_that_of_autograd(case):
    """The gradient that is written out equals autograd of the plain formula, also for extreme keys."""
    keys, slope, keep, temperature = case
    leaf = keys.clone().requires_grad_()
    (slope * plain(leaf, temperature, keep)).sum().backward()
    found = soft_mask_gradient(keys, temperature, keep, slope)
    torch.testing.assert_close(found, leaf.grad, rtol=1e-8, atol=1e-9)


@quick
@given(drawn())
def test_float32_is_close_to_float64(case):
    """In float32 the mask and its gradient are finite, and close to those of float64 where keys are of usual size."""
    keys, slope, keep, temperature = case
    keys = keys.float()
    found = soft_mask(keys, temperature, keep)
    gradient = soft_mask_gradient(keys, temperature, keep, slope.float())
    assert found.isfinite().all() and gradient.isfinite().all()
    if keys.abs().max() < 10:
        torch.testing.assert_close(found.double(), soft_mask(keys.double(), temperature, keep), rtol=0, atol=1e-3)
        exact = soft_mask_gradient(keys.double(), temperature, keep, slope)
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-2, atol=1e-2)


def test_one_of_m_is_gumbel_softmax():
    """With N = 1 the soft mask is the softmax of the keys over the temperature."""
    keys = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(soft_mask(keys, 0.3, 1), F.softmax(keys / 0.3, dim=0))


@quick
@given(drawn())
def test_a_cold_soft_mask_is_the_greedy_mask(case):
    """As the temperature falls to 0, the soft mask becomes the mask of the N largest keys."""
    keys, _, keep, _ = case
    keys = keys + torch.arange(len(keys))[:, None] * 1e-3  # no ties
    order = keys.sort(dim=0).values
    gap, span = float(order.diff(dim=0).amin()), float((order[-1] - order[0]).amax())
    if gap > 1e-6:
        cold = soft_mask(keys, gap / (1 + span) / 100, keep)
        hard = Pattern(keep, len(keys)).top(keys.t()).t()
        torch.testing.assert_close(cold, hard.double(), rtol=0, atol=1e-6)


def test_no_weight_is_chosen_twice():
    """A key that leads by far is chosen once: a bound on mu in place of the exact 1 - mu would choose it twice."""
    keys = torch.tensor([60.0, 20.0, 0.0, 0.0])[:, None]
    assert soft_mask(keys, 0.5, 2)[:, 0].tolist() == pytest.approx([1, 1, 0, 0], abs=1e-6)


def test_columns_and_rows_are_inverse():
    """A layer with groups first, and back."""
    rows = torch.arange(24.0).view(2, 12)
    assert columns(rows, 4)[:, 1].tolist() == [4, 5, 6, 7]
    assert as_rows(columns(rows, 4), rows.shape).equal(rows)


@pytest.mark.parametrize(("keep", "group"), [(1, 4), (2, 4), (3, 4)])
def test_hard_draws_have_the_probabilities_of_maskpro(keep, group):
    """The N largest of logits + noise are a draw without replacement: frequencies of all subsets match MaskPro's."""
    draws = 200_000
    logits = torch.tensor([0.0, 1.0, -0.5, 0.7])
    keys = torch.tensor(step_keys(7, 3), dtype=torch.int32)
    noise = gumbel(keys, 0, 0, torch.Size([draws, group]))
    masks = Pattern(keep, group).top(logits + noise)  # [draws, group]
    for subset in itertools.combinations(range(group), keep):
        mask = torch.zeros(1, group, dtype=torch.bool)
        mask[0, list(subset)] = True
        expected = float(log_prob(logits[None], mask).exp())
        found = float((masks == mask).all(dim=1).double().mean())
        assert abs(found - expected) < 5 * (expected / draws) ** 0.5, subset
