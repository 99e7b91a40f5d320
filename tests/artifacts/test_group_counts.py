"""Laws of the fast counts: they equal those of a slow, readable computation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.artifacts.group_counts import Counts, count, group_counts, nonzeros
from nmbench.testing.strategies import patterns, tensors

quick = settings(max_examples=60, deadline=None)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@quick
@given(st.data())
def test_group_counts_are_the_sums_of_groups(data):
    """The counts equal a plain sum over groups, for any group size and for a matrix that is not contiguous."""
    pattern = data.draw(patterns())
    kept = data.draw(tensors(pattern)) > 0
    for view in (kept, kept.flip(0), kept.repeat(2, 1)[:, : kept.shape[1]]):
        assert torch.equal(
            torch.from_numpy(group_counts(view.numpy(), pattern.group).astype("int64")), pattern.kept(view)
        )


@quick
@given(st.data(), st.sampled_from(DTYPES))
def test_nonzeros_sees_what_comparison_sees(data, dtype):
    """Non-zeros are where `!= 0` is true, subnormal numbers too; negative zeros are counted, whatever the dtype."""
    weight = data.draw(tensors(data.draw(patterns()))).to(dtype)
    found = nonzeros(weight)
    assert np.array_equal(found.kept, (weight != 0).numpy())
    assert found.negative_zeros == int(((weight == 0) & weight.signbit()).sum())
    assert found.finite == bool(weight.isfinite().all())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_seen(dtype, value):
    """A NaN or infinity among finite numbers is found, and counts as a non-zero."""
    weight = torch.tensor([[1.0, 0.0, -2.0, -0.0]]).to(dtype)
    assert nonzeros(weight).finite and nonzeros(weight).negative_zeros == 1
    broken = torch.tensor([[1.0, value, -2.0, 0.0]]).to(dtype)
    if not broken.float().isfinite().all():  # float8_e4m3fn has no infinity
        assert not nonzeros(broken).finite
    assert nonzeros(broken).kept.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_integers_and_masks_are_counted_too(dtype):
    """Quantised weights and masks have no negative zero."""
    found = nonzeros(torch.tensor([[1, 0, 1, 0]]).to(dtype))
    assert (found.kept.tolist(), found.negative_zeros, found.finite) == ([[True, False, True, False]], 0, True)


@quick
@given(st.data(), st.booleans())
def test_counts_add_up_over_slices(data, exact):
    """Added counts of single rows equal the counts of the whole matrix, with the first broken group at its place."""
    pattern = data.draw(patterns(max_group=8, units=(1, 2, 3)))
    kept = data.draw(tensors(pattern)) > 0
    kept = (pattern.touched(kept) if data.draw(st.booleans()) else kept).numpy()
    whole = count(kept, pattern, exact)
    apart = Counts()
    for row in range(len(kept)):
        apart = apart.plus(count(kept[row : row + 1], pattern, exact, row))
    assert whole == apart
    assert whole == slow_count(kept, pattern, exact)


def slow_count(kept, pattern, exact):
    """The counts by their definition, group by group."""
    broken = fewer = missing = groups = 0
    first = None
    for row, values in enumerate(kept):
        for column in range(0, len(values), pattern.group):
            number = int(values[column : column + pattern.group].sum())
            units = values[column : column + pattern.group].reshape(-1, pattern.unit).sum(axis=1)
            touched = int((units > 0).sum()) * pattern.unit
            groups += 1
            if touched > pattern.keep or (exact and not number == touched == pattern.keep):
                broken += 1
                first = first or (row, column, number)
            fewer += number < pattern.keep
            missing += max(pattern.keep - number, 0)
    return Counts(groups, broken, fewer, missing, first)
