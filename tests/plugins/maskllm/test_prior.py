"""Laws of the prior and of the schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmbench as nm
from nmbench_plugins.maskllm.candidates import candidates
from nmbench_plugins.maskllm.prior import lead_of, leaving
from nmbench_plugins.maskllm.schedule import Schedule

quick = settings(max_examples=30, deadline=None)
PATTERNS = st.sampled_from(["1:2", "2:4", "1:4", "3:4", "4:8", "5:10", "2:4x2"]).map(nm.Pattern.parse)


@quick
@given(PATTERNS, st.floats(1e-6, 0.4))
def test_the_lead_gives_the_probability(pattern, leave):
    """The lead of a probability gives this probability back."""
    assert leaving(pattern, lead_of(pattern, leave)) == pytest.approx(leave, rel=1e-6)


@quick
@given(PATTERNS, st.floats(0.0, 8.0))
def test_the_probability_is_that_of_the_gates(pattern, lead):
    """The probability to stay is the softmax, at the start, of gates that count the weights shared with the start."""
    patterns = candidates(pattern).double()
    shared = patterns @ patterns[-1] / pattern.unit
    assert leaving(pattern, lead) == pytest.approx(1 - float(torch.softmax(lead * shared, dim=0)[-1]), abs=1e-12)


def test_an_even_draw_needs_no_lead():
    """A group that leaves as often as in an even draw begins with equal gates."""
    assert lead_of(nm.Pattern(1, 2), 0.5) == 0.0
    assert lead_of(nm.Pattern(2, 4), 0.99) == 0.0


def test_the_published_start_leaves_in_17_percent():
    """Strength 3 at deviation 0.01 and scale 100 is a lead of 3: a draw leaves a 2:4 start with probability 0.168.

    So do the gates that `_init_2_4_mask_from_prior` of Paramathic/patch (73dfa37, MIT) made of 200,000 groups: 0.1681.
    """
    assert leaving(nm.Pattern(2, 4), 3 * 0.01 * 100) == pytest.approx(0.1678, abs=1e-4)


@pytest.mark.parametrize(
    ("annealing", "temperatures", "scales"),
    [("linear", [4, 2.025, 0.05, 0.05], [100, 300, 500, 500]), ("exponential", [4, 0.2**0.5, 0.05, 0.05], None)],
)
def test_the_schedule(annealing, temperatures, scales):
    """Temperature and scale go along a line or an exponential, and stay; the step size falls along a cosine."""
    schedule = Schedule(400, annealing, 0.5, (4.0, 0.05), (100.0, 500.0), 1e-5, 1e-3, 0.1)
    found = [schedule.at(step) for step in (0, 100, 200, 400)]
    assert [s.temperature for s in found] == pytest.approx(temperatures)
    assert [s.scale for s in found] == pytest.approx(scales or [100, 100 * 5**0.5, 500, 500])
    assert [s.reward for s in found] == pytest.approx([1e-5, 0.75e-5, 0.5e-5, 0])
    assert [s.rate for s in found] == pytest.approx([1e-3, 1e-3 * (0.1 + 0.9 * (1 + 0.5**0.5) / 2), 5.5e-4, 1e-4])
