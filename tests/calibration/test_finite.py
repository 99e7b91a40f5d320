"""Laws of looking at numbers, at once or later."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.calibration.finite import ONE_BY_ONE, Checks, checked_later
from nmbench.errors import NMBenchError, NumericalFailure
from reference.ranks import by_threads

quick = settings(max_examples=50, deadline=None)
VALUES = [0.0, -0.0, 1.0, 1e-45, -3.4e38, 3.4e38, float("nan"), float("inf"), float("-inf")]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@quick
@given(st.lists(st.tuples(st.lists(st.sampled_from(VALUES), max_size=6), st.sampled_from(DTYPES)), max_size=5))
def test_looking_later_finds_what_looking_at_once_does(tensors):
    """What was noted has failed if and only if looking at one of the tensors at once raises."""
    tensors = [torch.tensor(values, dtype=torch.float64).to(dtype) for values, dtype in tensors]
    later, at_once = Checks(later=True), False
    for tensor in tensors:
        later.finite(tensor, lambda: pytest.fail("looks later"))
        try:
            ONE_BY_ONE.finite(tensor, lambda: NumericalFailure("bad"))
        except NumericalFailure:
            at_once = True
        assert later.failed() == at_once
    assert not ONE_BY_ONE.failed()


def test_scores_that_cannot_be_nan_are_fine():
    """Whole numbers and truth values are finite."""
    later = Checks(later=True)
    for tensor in (torch.arange(4), torch.tensor([True, False])):
        for checks in (later, ONE_BY_ONE):
            checks.finite(tensor, lambda: pytest.fail("is finite"))
    assert not later.failed()


@pytest.mark.parametrize("failing", [True, False])
def test_ranks_repeat_a_walk_together(failing):
    """If rank 1 alone has noted NaN, both ranks walk once more, also after an error: their exchanges still match."""

    def work(ranks):
        walks = []

        def walked(checks):
            walks.append(checks)
            checks.finite(torch.tensor([float("nan") if ranks.rank and checks.later else 1.0]), lambda: None)
            ranks.said(None)
            if failing and checks.later:
                raise NMBenchError("a fault of the method")

        with pytest.raises(NumericalFailure, match="did not when it was repeated"):
            checked_later(walked, "acme", ranks)
        return len(walks)

    assert by_threads(2, work) == [2, 2]
