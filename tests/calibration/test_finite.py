"""Laws of looking at numbers, at once or later."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.calibration.finite import ONE_BY_ONE, Checks
from nmbench.errors import NumericalFailure

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
