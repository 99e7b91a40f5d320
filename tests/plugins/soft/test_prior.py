"""Laws of the prior and of the schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmbench as nm
from nmbench_plugins.maskpro.policy import log_prob
from nmbench_plugins.soft.prior import lead_of, leaving
from nmbench_plugins.soft.schedule import Schedule

quick = settings(max_examples=30, deadline=None)
PATTERNS = st.sampled_from(["1:2", "2:4", "1:4", "3:4", "4:8", "8:16", "2:4x2"]).map(nm.Pattern.parse)


@quick
@given(PATTERNS, st.floats(1e-6, 0.4))
def test_the_lead_gives_the_probability(pattern, leave):
    """The logit lead of a probability gives this probability back."""
    assert leaving(pattern, lead_of(pattern, leave)) == pytest.approx(leave, rel=1e-6)


@quick
@given(PATTERNS, st.floats(0.0, 8.0))
def test_the_probability_is_that_of_the_policy(pattern, lead):
    """The probability to stay is MaskPro's probability of the start under logits `lead` times the start."""
    mask = torch.arange(pattern.units.group)[None] < pattern.units.keep
    stays = float(log_prob(lead * mask.double(), mask).exp())
    assert leaving(pattern, lead) == pytest.approx(1 - stays, rel=1e-5, abs=1e-6)


def test_an_even_draw_needs_no_lead():
    """A group that leaves as often as in an even draw begins with equal logits."""
    assert lead_of(nm.Pattern(1, 2), 0.5) == 0.0
    assert lead_of(nm.Pattern(2, 4), 0.99) == 0.0


def test_the_schedule_is_exponential_and_then_constant():
    """Temperature and noise fall by equal factors over three quarters of the steps; the step size falls linearly."""
    schedule = Schedule(400, (0.02, 0.002), 1e-3, 0.1)
    settings = [schedule.at(step) for step in (0, 150, 300, 399)]
    assert [s.temperature for s in settings] == pytest.approx([1.0, 0.05**0.5, 0.05, 0.05])
    assert [s.noise for s in settings] == pytest.approx([0.02, 0.02 / 10**0.5, 0.002, 0.002])
    assert [s.rate for s in settings] == pytest.approx([1e-3, 1e-3 * (1 - 0.9 * 0.375), 3.25e-4, 1.0225e-4])
