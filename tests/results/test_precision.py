"""Laws of the digits of a printed figure."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmbench.results.precision import decimals, decimals_of_mean, printed


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (146.9665, 2.31, "146.97"),
        (36.6162, 0.4217, "36.616"),
        (12.92631, 0.0512, "12.9263"),
        (0.7312, 0.0123, "0.7312"),
        (5.123456, 0.000021, "5.1235"),
        (812345.678, 34567.8, "812345.68"),
        (20.12345, 0.9996, "20.12"),  # the error is 1.00 in three digits
        (20.12345, 0.9994, "20.123"),
    ],
)
def test_a_figure_has_the_digits_of_its_error(value, stderr, text):
    """Three significant digits of the standard error, at least two decimals and at most four."""
    assert printed({"value": value, "stderr": stderr}) == text


@pytest.mark.parametrize("stderr", [None, 0.0, math.nan, math.inf])
def test_an_unknown_error_leaves_four_decimals(stderr):
    """Without a usable standard error a figure has four decimals; older records lack the field."""
    assert printed({"value": 1.23456, "stderr": stderr}) == "1.2346"
    assert printed({"value": 1.23456}) == "1.2346"


@given(st.floats(1e-300, 1e300), st.floats(1, 1e6))
def test_a_larger_error_never_shows_more(stderr, factor):
    """The number of decimals falls with the standard error and stays between two and four."""
    assert 2 <= decimals(stderr * factor) <= decimals(stderr) <= 4


def test_a_mean_over_seeds_has_the_digits_of_its_windows():
    """Seeds share their windows, so more seeds do not make the error smaller; one unknown error makes it unknown."""
    assert decimals_of_mean([{"stderr": 0.5}, {"stderr": 0.9}]) == 3
    assert decimals_of_mean([{"stderr": 0.5}, {"stderr": 5.0}]) == 2
    assert decimals_of_mean([{"stderr": 5.0}, {"stderr": None}]) == 4
