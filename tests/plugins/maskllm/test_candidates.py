"""Laws of the candidates of a group, and which N:M are refused."""

from __future__ import annotations

import math

import pytest

import nmbench as nm
from nmbench.experiment.contenders import Contender
from nmbench.experiment.plan import check_supported
from nmbench_plugins.maskllm import MaskLLM
from nmbench_plugins.maskllm.candidates import MOST, candidates, count_of


@pytest.mark.parametrize("text", ["1:2", "2:4", "3:4", "4:8", "2:3", "5:10", "2:4x2"])
def test_candidates_are_all_patterns_once(text):
    """There are C(M, N) candidates, all different and strict; the first keeps the lowest places."""
    pattern = nm.Pattern.parse(text)
    found = candidates(pattern)
    assert found.shape == (math.comb(pattern.units.group, pattern.units.keep), pattern.group)
    assert not pattern.broken(found.bool()).any() and len(found.unique(dim=0)) == len(found)
    assert found[0].tolist() == [1.0] * pattern.keep + [0.0] * (pattern.group - pattern.keep)


def test_too_many_patterns_are_refused():
    """16:32 is refused before anything is measured, with the number of its patterns and what to take instead."""
    with pytest.raises(nm.NMBenchError) as caught:
        check_supported([Contender("mine", "maskllm", MaskLLM(), {})], [nm.Pattern(2, 4), nm.Pattern(16, 32)])
    assert str(caught.value) == (
        "mine cannot prune to 16:32: each group has 601,080,390 patterns with a gate each, 18,783,762 a weight, and at "
        "most 256 patterns are possible; take soft, which has one logit a weight at any N:M."
    )
    assert "soft" in MaskLLM().supports(nm.Pattern(8, 16))
    assert count_of(nm.Pattern(5, 10)) <= MOST and MaskLLM().supports(nm.Pattern(5, 10)) is None
