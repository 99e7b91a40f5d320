"""Laws of the paired comparison: differences of per-window losses with a bootstrap interval."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nmbench.comparison import not_worse, paired, resampled, resampled_means
from reference import bootstrap as reference

quick = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 2**31)


def losses(count, seed, spread=1.0):
    """Float64 losses of windows, such as a model has."""
    return 3 + spread * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def pairs(draw, min_size=1):
    """Losses of two models on the same windows."""
    count, seed = draw(st.integers(min_size, 60)), draw(seeds)
    return losses(count, seed), losses(count, seed + 1)


def figures(difference):
    return difference.mean, difference.low, difference.high


@quick
@given(pairs())
def test_mean_is_the_mean_difference(pair):
    """The mean is the mean over windows of loss minus reference, and the windows are counted."""
    ours, theirs = pair
    found = paired(ours, theirs)
    expected = math.fsum(a - b for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)) / len(ours)
    assert found.mean == pytest.approx(expected, abs=1e-12)
    assert found.windows == len(ours)
    assert found.low <= found.high


@quick
@given(st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=5))
def test_interval_is_that_of_all_resamples(values):
    """On few windows, 2.5 % of all n^n resampled means lie below the interval and 2.5 % above, up to sampling error."""
    means = reference.all_means(values)
    found = paired(torch.tensor(values, dtype=torch.float64), torch.zeros(len(values)))
    for side in (1, -1):
        end = found.high if side > 0 else found.low
        assert (side * means > side * end + 1e-9).mean() <= 0.025 + 0.015
        assert (side * means >= side * end - 1e-9).mean() >= 0.025 - 0.015


@pytest.mark.parametrize("windows", [1, 2, 31, 64, 335])
@pytest.mark.parametrize("at_once", [1, 1000, 2**17])
def test_resamples_drawn_together_are_those_drawn_one_by_one(windows, at_once):
    """However many resamples are drawn at once, their means are bit for bit those of resamples drawn in turn."""
    values = losses(windows, 0)
    assert torch.equal(resampled_means(values, at_once), reference.means_one_by_one(values))


@quick
@given(seeds)
def test_interval_is_normal_for_many_windows(seed):
    """For many windows the interval is the mean plus and minus 1.96 standard errors, to a quarter of one."""
    difference = losses(500, seed)
    found = paired(difference, torch.zeros(500))
    error = float(difference.std(correction=0)) / math.sqrt(500)
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.25 * error)


def test_interval_covers_the_truth():
    """Over many samples of 100 windows, the interval holds the true difference about 95 times in 100."""
    found = [paired(losses(100, seed), torch.zeros(100)) for seed in range(60)]
    covered = sum(interval.low <= 3 <= interval.high for interval in found)
    assert 51 <= covered <= 60  # below 51 has a chance of 1 in 1000


@quick
@given(pairs())
def test_antisymmetric(pair):
    """Swapping the two models turns the interval around."""
    there, back = paired(*pair), paired(*reversed(pair))
    assert figures(back) == pytest.approx((-there.mean, -there.high, -there.low), abs=1e-12)
    assert there.clear == back.clear


@quick
@given(pairs(), st.integers(-20, 20))
def test_what_both_share_does_not_count(pair, shift):
    """Adding the same amount to both, even another for each window, changes nothing: only differences count."""
    ours, theirs = pair
    common = shift + 5 * losses(len(ours), 9)
    assert figures(paired(ours + common, theirs + common)) == pytest.approx(figures(paired(ours, theirs)), abs=1e-12)


@quick
@given(pairs(), st.integers(-5, 5), st.integers(-8, 8))
def test_interval_follows_shift_and_scale(pair, shift, exponent):
    """Adding to one model's losses shifts mean and interval; scaling both scales them."""
    ours, theirs = pair
    before = figures(paired(ours, theirs))
    assert figures(paired(ours + shift, theirs)) == pytest.approx([value + shift for value in before], abs=1e-12)
    scaled = paired(ours * 2.0**exponent, theirs * 2.0**exponent)
    assert figures(scaled) == tuple(value * 2.0**exponent for value in before)


@quick
@given(pairs(), st.integers(1, 4))
def test_seeds_are_averaged(pair, count):
    """Losses of several seeds count as their mean, and a single reference serves all of them."""
    ours, theirs = pair
    several = torch.stack([ours + losses(len(ours), seed) for seed in range(count)])  # [seeds, windows]
    averaged = figures(paired(several.mean(dim=0), theirs))
    assert figures(paired(several, theirs)) == pytest.approx(averaged, abs=1e-12)
    assert figures(paired(several, theirs.expand(count, -1))) == pytest.approx(averaged, abs=1e-12)
    assert paired(several, theirs).windows == len(ours)


@quick
@given(pairs(), st.integers(0, 100))
def test_deterministic(pair, seed):
    """The interval is the same on every call, whatever the global random state, and leaves that state alone."""
    first = paired(*pair)
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    assert paired(*pair) == first
    assert torch.equal(torch.get_rng_state(), state)


@quick
@given(pairs())
def test_identical_losses_cannot_be_told_apart(pair):
    """A model against itself has a difference of exactly zero, which is not significant."""
    found = paired(pair[0], pair[0].clone())
    assert figures(found) == (0, 0, 0)
    assert not found.clear


@quick
@given(pairs(min_size=2))
def test_clear_means_that_zero_is_outside(pair):
    """A difference is significant exactly if the whole interval lies on one side of zero."""
    ours, theirs = pair
    found = paired(ours, theirs)
    assert found.clear == (found.low > 0 or found.high < 0)
    assert paired(ours + 20, theirs).clear
    assert not paired(torch.cat([ours, theirs]), torch.cat([theirs, ours])).clear  # as often better as worse


@quick
@given(st.floats(-5, 5), st.floats(-5, 5))
def test_one_window_tells_nothing(first, second):
    """On a single window, which cannot be resampled, no difference is significant."""
    assume(first != second)
    assert not paired(torch.tensor([first]), torch.tensor([second])).clear


@quick
@given(st.integers(0, 2**31))
def test_pairing_finds_what_the_spread_hides(seed):
    """A small gain on every window is significant although windows differ far more among themselves."""
    hard = losses(40, seed, spread=2.0)
    gained = hard - 0.05 + 0.02 * losses(40, seed + 1) - 0.06
    assert paired(gained, hard).high < 0


def test_shown_with_signs():
    """A difference is shown as mean and interval in nats, each with its sign."""
    found = dataclasses.replace(paired(torch.ones(3), torch.ones(3)), mean=-0.25, low=-0.3, high=0.125)
    assert str(found) == "-0.2500 [-0.3000, +0.1250]"


@quick
@given(pairs(min_size=2), st.floats(0, 1))
def test_not_worse_is_the_one_sided_bound(pair, tolerance):
    """Losses are not worse if mean plus 1.645 standard errors of the paired difference is within the tolerance."""
    ours, theirs = pair
    found = not_worse(ours, theirs, tolerance)
    difference = (ours.double() - theirs.double()).numpy()
    bound = difference.mean() + 1.645 * difference.std(ddof=1) / len(difference) ** 0.5
    assert found.one_sided_95_bound == pytest.approx(bound, abs=1e-9)
    assert found.holds == (found.one_sided_95_bound <= tolerance)
    assert not_worse(ours, ours, tolerance).holds
    assert not not_worse(ours + 5, ours, tolerance).holds
    assert not not_worse(ours * torch.nan, ours, tolerance).holds


@quick
@given(st.integers(2, 5), st.integers(1, 40), seeds)
def test_all_pairs_at_once_are_pairs_one_by_one(rows, windows, seed):
    """Rows that are resampled once have the differences of `paired`, up to rounding."""
    values = torch.stack([losses(windows, seed + row) for row in range(rows)])
    found = resampled(values)
    for row in range(rows):
        for other in range(rows):
            expected = figures(paired(values[row], values[other]))
            assert figures(found.difference(row, other)) == pytest.approx(expected, abs=1e-12)
            assert found.difference(row, other).windows == windows


def test_share_removed_by_its_ends():
    """The reference removes the whole excess of the baseline, the baseline none of it; half of it is a half."""
    reference, noise = losses(30, 0), 0.01 * losses(30, 1)
    found = resampled(torch.stack([reference, reference + 1 + noise, reference + (1 + noise) / 2, reference + 3]))
    shares = [found.share_removed(row, baseline=1, reference=0) for row in range(4)]
    assert [share.mean for share in shares[:3]] == pytest.approx([1, 0, 0.5])
    assert figures(shares[2]) == pytest.approx((0.5, 0.5, 0.5))
    assert shares[3].high < 0
