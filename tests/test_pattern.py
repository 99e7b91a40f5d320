"""Laws of N:M patterns and of the masks that keep the best scores of every group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.pattern import PAIRWISE, Pattern, ranks_at_once, ranks_by_pairs, ranks_by_sorting
from nmbench.testing.strategies import masks, patterns, tensors
from reference import pattern as reference

quick = settings(max_examples=30, deadline=None)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def cases(draw, max_group=32, **kwargs):
    """A pattern and scores that fall into its groups."""
    pattern = draw(patterns(max_group))
    return pattern, draw(tensors(pattern, **kwargs))


def shuffled(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# The pattern itself


@quick
@given(patterns())
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


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "2:4:8", "2-4", "a:b", "2.0:4", "-2:4", "2 : 4", "12345:99999"])
def test_other_forms_are_refused(text):
    """Text that is not N:M is an error of one line that quotes it and shows the form."""
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
