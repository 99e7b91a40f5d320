"""Laws of N:M patterns and of the masks that keep the best scores of every group."""

from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.pattern import PAIRWISE, SORTED_GROUPS, Pattern, ranks_at_once, ranks_by_pairs, ranks_by_sorting
from nmbench.testing.strategies import masks, patterns, tensors
from reference import pattern as reference

quick = settings(max_examples=30, deadline=None)
PAIRS = ["2:4x", "2:4x0", "2:4x-2", "2:4x2x2", "2:4X2", "x2", "2:4 x2"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def cases(draw, max_group=32, units=(1,), **kwargs):
    """A pattern and scores that fall into its groups."""
    pattern = draw(patterns(max_group, units))
    return pattern, draw(tensors(pattern, **kwargs))


def shuffled(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# The pattern itself


@quick
@given(patterns(units=(1, 2, 3)))
def test_text_round_trip(pattern):
    """Reading what a pattern prints gives the same pattern, blanks around it or not."""
    assert Pattern.parse(str(pattern)) == Pattern.parse(f"  {pattern}\n") == pattern


def test_n_is_the_number_kept():
    """1:4 keeps one weight of four: three quarters are zeros."""
    pattern = Pattern.parse("1:4")
    assert (pattern.keep, pattern.group, pattern.density) == (1, 4, 0.25)
    assert pattern.top(torch.randn(3, 8)).sum() == 6


@quick
@given(st.integers(-3, 40), st.integers(-3, 40))
def test_only_possible_patterns_exist(keep, group):
    """A pattern exists exactly when 1 <= N < M; the refusal shows the pattern and an example."""
    if 1 <= keep < group:
        assert (Pattern(keep, group).keep, Pattern(keep, group).group) == (keep, group)
    else:
        with pytest.raises(NMBenchError, match=f"{keep}:{group} is impossible.*for example 2:4"):
            Pattern(keep, group)


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "2:4:8", "2-4", "a:b", "2.0:4", "-2:4", "2 : 4", "12345:99999", *PAIRS]
)
def test_other_forms_are_refused(text):
    """Text that is neither N:M nor N:MxU is an error of one line that quotes it and shows the forms."""
    with pytest.raises(NMBenchError, match="not of the form N:M") as caught:
        Pattern.parse(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


# Groups


@quick
@given(cases())
def test_groups_are_consecutive_entries_of_one_row(case):
    """Group j of row i holds the columns j M .. j M + M - 1 of row i."""
    pattern, score = case
    size = pattern.group
    groups = pattern.groups(score)
    for row in range(len(score)):
        for first in range(0, score.shape[1], size):
            assert torch.equal(groups[row, first // size], score[row, first : first + size])


@quick
@given(patterns(), st.integers(1, 4), st.integers(1, 100))
def test_rows_that_the_group_does_not_divide_are_refused(pattern, rows, inputs):
    """A row is cut into groups only if M divides it, even where M divides the whole matrix."""
    matrix = torch.zeros(rows * pattern.group, inputs)
    if inputs % pattern.group == 0:
        assert pattern.divides(inputs)
        assert pattern.groups(matrix).shape == (len(matrix), inputs // pattern.group, pattern.group)
        return
    assert not pattern.divides(inputs)
    for call in (pattern.groups, pattern.top, pattern.kept):
        with pytest.raises(NMBenchError, match=f"rows of {inputs} weights .* groups of {pattern.group} .*{pattern}"):
            call(matrix)


# Masks


@quick
@given(cases(), st.sampled_from(DTYPES))
def test_exactly_keep_in_every_group(case, dtype):
    """Any finite scores of any float dtype give exactly N True in every group of M."""
    pattern, score = case
    score = score.to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)  # 1e30 does not fit into float16
    mask = pattern.top(score)
    assert mask.dtype == torch.bool
    assert mask.shape == score.shape
    for row in mask.tolist():
        counts = [sum(row[first : first + pattern.group]) for first in range(0, len(row), pattern.group)]
        assert set(counts) == {pattern.keep}
    assert (pattern.kept(mask) == pattern.keep).all()


@quick
@given(cases())
def test_kept_scores_are_not_below_dropped_ones(case):
    """In every group the lowest kept score is at least the highest dropped one."""
    pattern, score = case
    mask = pattern.top(score)
    lowest = score.where(mask, torch.inf).unflatten(1, (-1, pattern.group)).amin(-1)
    highest = score.where(~mask, -torch.inf).unflatten(1, (-1, pattern.group)).amax(-1)
    assert (lowest >= highest).all()


@quick
@given(cases(max_group=8, max_rows=2, max_groups=3))
def test_equal_to_brute_force(case):
    """On small groups the mask is the one found by trying every set of N columns."""
    pattern, score = case
    assert torch.equal(pattern.top(score), reference.best_mask(score, pattern.keep, pattern.group))


@pytest.mark.parametrize("inputs", [4, 8, 12])
def test_masks_lie_in_order(inputs):
    """A mask is contiguous in memory, also where a row is one group."""
    assert Pattern(2, 4).top(torch.rand(3, inputs)).is_contiguous()


@quick
@given(
    st.sampled_from([2, 3, 4, 8, 16, PAIRWISE]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32]),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_ranks_by_pairs_are_those_by_sorting(group, dtype, values, seed):
    """Comparing pairs ranks every group as a stable sort does, also where entries are equal, or signed zeros."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-values, values + 1, (3, 5, group), generator=generator).to(dtype) / 4
    scores = torch.where(torch.rand(scores.shape, generator=generator) < 0.2, -0.0, scores).to(dtype)
    for ranks in (ranks_by_pairs, ranks_at_once):
        assert torch.equal(ranks(scores).long(), ranks_by_sorting(scores))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(9, PAIRWISE), Pattern(5, PAIRWISE + 1)], ids=str)
def test_many_groups_have_the_masks_of_few(pattern):
    """A group has the same mask whether it is one of few groups or of many, for which another way is faster."""
    score = torch.randint(9, (SORTED_GROUPS // 4, 4 * pattern.group), generator=torch.Generator().manual_seed(0)) / 4
    few, many = pattern.top(score), pattern.top(score.repeat(2, 1))
    assert torch.equal(many, few.repeat(2, 1))


@quick
@given(cases(), st.integers(0, 2**31))
def test_rows_and_groups_do_not_see_each_other(case, seed):
    """Permuting rows, or groups within rows, permutes the mask in the same way."""
    pattern, score = case
    rows, groups = shuffled(len(score), seed), shuffled(score.shape[1] // pattern.group, seed)

    def moved(tensor):
        return tensor[rows].unflatten(1, (-1, pattern.group))[:, groups].flatten(1)

    assert torch.equal(pattern.top(moved(score)), moved(pattern.top(score)))


@quick
@given(cases(kinds=("normal", "ties", "half grid")), st.lists(st.integers(-60, 60), min_size=6, max_size=6))
def test_power_of_two_row_scaling_changes_nothing(case, exponents):
    """Multiplying each row by a power of two of its own leaves the mask as it is."""
    pattern, score = case
    factors = 2.0 ** torch.tensor(exponents[: len(score)])
    assert torch.equal(pattern.top(score * factors[:, None]), pattern.top(score))


@quick
@given(cases())
def test_idempotent(case):
    """The best of what was kept is what was kept: a mask, taken as scores, gives itself."""
    pattern, score = case
    mask = pattern.top(score)
    assert torch.equal(pattern.top(mask), mask)
    assert torch.equal(pattern.top(mask.float()), mask)


@quick
@given(patterns(), st.integers(1, 4), st.sampled_from([0.0, -0.0, 1.5, -3e30]))
def test_lower_index_wins_ties(pattern, groups, value):
    """If all scores are equal, also as zeros of either sign, the first N of every group are kept."""
    score = torch.full((2, groups * pattern.group), value)
    score[1, ::2] *= -1 if value == 0 else 1  # zeros of both signs
    first = torch.arange(score.shape[1]) % pattern.group < pattern.keep
    assert torch.equal(pattern.top(score), first.expand(score.shape))


@quick
@given(cases(), st.data())
def test_scores_that_are_not_finite_are_refused(case, data):
    """One NaN or infinite score anywhere is an error that names its place and value."""
    pattern, score = case
    row = data.draw(st.integers(0, len(score) - 1))
    column = data.draw(st.integers(0, score.shape[1] - 1))
    score[row, column] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    with pytest.raises(NumericalFailure, match=rf"score at \({row}, {column}\) is {score[row, column].item()}"):
        pattern.top(score)


@quick
@given(cases(), st.integers(0, 2**31))
def test_scores_are_left_alone(case, seed):
    """Choosing a mask changes neither the scores nor the global random state, and layout does not matter."""
    pattern, score = case
    copy, state = score.clone(), torch.get_rng_state()
    strided = score.t().contiguous().t()
    assert torch.equal(pattern.top(strided), pattern.top(score))
    assert torch.equal(score, copy)
    assert torch.equal(torch.get_rng_state(), state)


@quick
@given(cases(), st.integers(1, 3))
def test_leading_axes_are_rows(case, experts):
    """One row alone, and a stack of matrices, give the masks that the matrices give."""
    pattern, score = case
    mask = pattern.top(score)
    assert torch.equal(pattern.top(score[0]), mask[0])
    assert torch.equal(pattern.top(score.expand(experts, *score.shape)), mask.expand(experts, *mask.shape))


@quick
@given(st.data())
def test_kept_counts_any_mask(data):
    """The count of a group is the sum of its entries, also where a mask is not strict."""
    pattern = data.draw(patterns())
    mask = data.draw(masks(pattern)) | data.draw(st.booleans())
    expected = [[sum(row[i : i + pattern.group]) for i in range(0, len(row), pattern.group)] for row in mask.tolist()]
    assert pattern.kept(mask).tolist() == expected


# Units of several weights


in_units = {"max_group": 5, "units": (2, 3, 4)}


def test_a_unit_of_one_weight_is_the_plain_pattern():
    """2:4x1 is 2:4 and prints so; 2:4x2 keeps 4 of 8 weights, and is not 4:8."""
    assert Pattern.parse("2:4x1") == Pattern(2, 4) and str(Pattern(2, 4, unit=1)) == "2:4"
    pairs = Pattern.parse("2:4x2")
    assert (pairs.keep, pairs.group, pairs.unit, pairs.units, str(pairs)) == (4, 8, 2, Pattern(2, 4), "2:4x2")
    assert pairs != Pattern(4, 8) and pairs.density == 0.5 and Pattern(4, 8).units == Pattern(4, 8)


@pytest.mark.parametrize("numbers", [(3, 8, 2), (4, 7, 2), (2, 4, 0), (2, 4, -1), (4, 4, 2), (0, 4, 2)])
def test_impossible_units_are_refused(numbers):
    """Keep and group are multiples of the unit, and 1 <= N < M in units; the refusal is one line with an example."""
    with pytest.raises(NMBenchError, match=r"(in units of|units of 2 weights).*for example") as caught:
        Pattern(*numbers)
    assert "\n" not in str(caught.value)


def best_units(score, pattern, power):
    """The units with the highest sums of powers, by trying all choices of every group in exact arithmetic."""
    mask = torch.zeros(score.shape, dtype=torch.bool)
    units, keep = pattern.group // pattern.unit, pattern.keep // pattern.unit
    for row, values in enumerate(score.tolist()):
        for first in range(0, len(values), pattern.group):
            starts = [first + pattern.unit * unit for unit in range(units)]
            sums = {at: sum(Fraction(value) ** power for value in values[at : at + pattern.unit]) for at in starts}
            for at in max(combinations(starts, keep), key=lambda kept: sum(sums[start] for start in kept)):
                mask[row, at : at + pattern.unit] = True
    return mask


@quick
@given(cases(**in_units, max_rows=2, max_groups=2, kinds=("normal", "ties", "half grid")), st.sampled_from([1, 2]))
def test_units_of_the_highest_sums_are_kept(case, power):
    """The mask keeps the units with the highest sum of powers of scores; of equal choices, that of the lowest units."""
    pattern, score = case
    assert torch.equal(pattern.top(score, power), best_units(score, pattern, power))


@quick
@given(cases(**in_units), st.integers(0, 2**31), st.sampled_from([1, 2]))
def test_masks_of_units_are_strict(case, seed, power):
    """A mask of units is a strict mask of weights in whole units; a flipped bit, or a moved group, breaks its group."""
    pattern, score = case
    mask = pattern.top(score.abs(), power)
    assert not pattern.broken(mask).any() and not Pattern(pattern.keep, pattern.group).broken(mask).any()
    assert torch.equal(pattern.touched(mask), mask) and mask.is_contiguous()
    row, column = seed % len(mask), seed % mask.shape[1]
    flipped, moved = mask.clone(), mask.clone()
    flipped[row, column] ^= True
    group = slice(column - column % pattern.group, column - column % pattern.group + pattern.group)
    moved[row, group] = moved[row, group].roll(1)
    for other in (flipped, moved):
        broken = pattern.broken(other)
        assert broken[row, column // pattern.group] and broken.sum() == 1
        assert not torch.equal(pattern.touched(other), other)


@quick
@given(cases(**in_units), st.data())
def test_scores_of_units_that_are_not_finite_are_refused(case, data):
    """One NaN or infinite score in a unit is an error that names its place, and huge scores are none."""
    pattern, score = case
    assert (pattern.kept(pattern.top(torch.full_like(score, 3e38), 2)) == pattern.keep).all()
    score[0, data.draw(st.integers(0, score.shape[1] - 1))] = data.draw(st.sampled_from([torch.nan, -torch.inf]))
    with pytest.raises(NumericalFailure, match=r"score at \(0, "):
        pattern.top(score)
