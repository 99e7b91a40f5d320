"""Laws of the test kit's strategies: they draw what they document, including values that break pruning code."""

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from nmbench.pattern import Pattern
from nmbench.testing import LayerCase
from nmbench.testing.cases import INPUTS
from nmbench.testing.strategies import (
    KINDS,
    cases,
    grams,
    layers,
    logits,
    masks,
    patterns,
    statistics,
    tensors,
    token_streams,
    values,
)

quick = settings(max_examples=24, deadline=None)
TWO_FOUR = Pattern(2, 4)
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

SIGNS = {  # what makes a tensor of a kind one of that kind
    "normal": lambda x: (x != 0).all() and x.abs().max() < 10 and abs(x.mean()) < 0.2,
    "ties": lambda x: x.unique().tolist() == [-2, -1, 0, 1, 2],
    "zeros": lambda x: 0.5 < (x == 0).float().mean() < 0.9,
    "signed zeros": lambda x: (x == 0).all() and 0.3 < x.signbit().float().mean() < 0.7,
    "huge": lambda x: 1e29 < x.abs().mean() < 1e31,
    "subnormal": lambda x: (x.abs() < SMALLEST_NORMAL).all() and (x != 0).float().mean() > 0.9,
    "half grid": lambda x: torch.equal(x, x.half().float()) and (x != 0).any(),
    "one outlier": lambda x: (x == 1e4).sum() == 1 and x.abs().flatten().sort().values[-2] < 10,
}


@quick
@given(st.data())
def test_patterns_are_legal_and_bounded(data):
    """Every pattern has 1 <= N < M, with M up to the largest group requested."""
    largest = data.draw(st.integers(2, 64))
    pattern = data.draw(patterns(largest))
    assert 1 <= pattern.keep < pattern.group <= largest


@pytest.mark.parametrize(
    "pattern", [Pattern(1, 2), Pattern(2, 4), Pattern(4, 8), Pattern(31, 32), Pattern(3, 7)], ids=str
)
def test_patterns_reach(pattern):
    """Usual, odd and extreme patterns are all drawn."""
    assert (
        find(patterns(), lambda drawn: drawn == pattern, settings=settings(max_examples=20_000, database=None))
        == pattern
    )


def test_every_kind_is_described_here():
    """No kind of values is without a test."""
    assert set(SIGNS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 2**31])
def test_values_are_of_their_kind(kind, seed):
    """Values are finite float32 of the requested shape, with the property that names their kind."""
    x = values(kind, (40, 24), seed)
    assert x.dtype == torch.float32
    assert x.shape == (40, 24)
    assert x.isfinite().all()
    assert SIGNS[kind](x)


@quick
@given(st.sampled_from(KINDS), st.integers(0, 2**31), st.integers(0, 99))
def test_values_are_a_function_of_the_seed(kind, seed, other):
    """The same seed gives the same bits, and the global random state is neither read nor changed."""
    first = values(kind, (3, 8), seed)
    torch.manual_seed(other)
    state = torch.get_rng_state()
    again = values(kind, (3, 8), seed)
    assert torch.equal(first.view(torch.int32), again.view(torch.int32))
    assert torch.equal(torch.get_rng_state(), state)


@quick
@given(st.data())
def test_tensors_fall_into_groups(data):
    """A matrix has whole groups of its pattern and is no larger than requested."""
    pattern = data.draw(patterns())
    x = data.draw(tensors(pattern, max_rows=3, max_groups=2))
    assert 1 <= x.shape[0] <= 3
    assert pattern.groups(x).shape[1] in (1, 2)
    assert x.isfinite().all()


@quick
@given(st.data())
def test_masks_are_strict(data):
    """A drawn mask keeps exactly N in every group."""
    pattern = data.draw(patterns())
    mask = data.draw(masks(pattern))
    assert mask.dtype == torch.bool
    assert (pattern.kept(mask) == pattern.keep).all()


def test_every_mask_is_drawn():
    """All six 2:4 masks of a group come up about equally often."""
    drawn = TWO_FOUR.top(values("normal", (6000, 4), 0))  # what the strategy does, many times at once
    counts = (drawn * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16)
    assert int((counts > 0).sum()) == 6
    assert (
        float(((counts[counts > 0] - 1000.0) ** 2 / 1000).sum()) < 20.5
    )  # chi-square, 5 degrees of freedom: 1 in 1000
    for code in counts.nonzero()[:, 0].tolist():
        wanted = [bool(code >> i & 1) for i in range(4)]
        found = find(masks(TWO_FOUR, 1, 1), lambda mask, wanted=wanted: mask[0].tolist() == wanted)
        assert found.shape == (1, 4)


@quick
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**31))
def test_statistics_are_those_of_the_definition(windows, length, width, seed):
    """Norms and Gram matrix equal the sums over windows and tokens of their definition, in float64."""
    inputs = values("normal", (windows * length, width), seed)
    stats = statistics(inputs, windows)
    square, gram = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for window in inputs.double().split(length):
        for token in window:
            square += token**2 / windows
            gram += 2 / windows * torch.outer(token, token)
    assert (stats.windows, stats.tokens) == (windows, windows * length)
    torch.testing.assert_close(stats.input_norm.double(), square.sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.gram.double(), gram, rtol=1e-4, atol=1e-4)


@quick
@given(st.data())
def test_layers_fit_together(data):
    """A layer's statistics are finite and fit its weight: one norm per column and a symmetric Gram matrix."""
    pattern = data.draw(patterns(8))
    weight, stats = data.draw(layers(pattern))
    columns = weight.shape[1]
    assert pattern.divides(columns)
    assert stats.input_norm.shape == (columns,)
    assert stats.gram.shape == (columns, columns)
    torch.testing.assert_close(stats.gram, stats.gram.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.gram.diag(), 2 * stats.input_norm**2, rtol=1e-4, atol=1e-4)
    assert torch.linalg.eigvalsh(stats.gram.double()).min() > -1e-4 * stats.gram.diag().max()


@pytest.mark.parametrize("wanted", ["dead", "alive", "correlated"])
def test_layers_reach(wanted):
    """Layers with a dead channel, without one, and with correlated neighbours are all drawn."""
    signs = {
        "dead": lambda stats: (stats.input_norm == 0).any(),
        "alive": lambda stats: (stats.input_norm > 0).all(),
        "correlated": lambda stats: correlation(stats.gram).diagonal(1).mean() > 0.4,
    }
    weight, stats = find(layers(TWO_FOUR), lambda layer: bool(signs[wanted](layer[1])))
    assert signs[wanted](stats)
    assert weight.shape[1] == len(stats.input_norm)


def correlation(gram):
    scale = gram.diag().clamp(min=1e-9).sqrt()
    return gram / scale / scale[:, None]


@quick
@given(cases())
def test_cases_are_layers(case):
    """A drawn case makes a finite weight of its shape, a strict mask, and statistics that fit."""
    from nmbench.methods import Stat

    weight, stats = case.weight(), case.stats(Stat.INPUT_NORM | Stat.GRAM | Stat.DRIFT | Stat.LAG)
    assert isinstance(case, LayerCase) and case.inputs in INPUTS
    assert weight.shape == case.shape == case.mask().shape == stats.lag.shape
    assert weight.isfinite().all()
    assert (case.nm.kept(case.mask()) == case.nm.keep).all()
    assert stats.gram.shape == stats.drift.shape == (case.shape[1], case.shape[1])
    torch.testing.assert_close(stats.gram.diag(), 2 * stats.input_norm**2, rtol=1e-4, atol=1e-4)
    assert case.stats(Stat.NONE).gram is None


@quick
@given(st.data())
def test_grams_are_gram_matrices(data):
    """A Gram matrix is symmetric and positive semi-definite, up to rounding."""
    gram = data.draw(grams(data.draw(st.integers(1, 12))))
    torch.testing.assert_close(gram, gram.t(), rtol=1e-5, atol=1e-5)
    assert torch.linalg.eigvalsh(gram.double()).min() > -1e-4 * gram.diag().max().clamp_min(1e-9)


@pytest.mark.parametrize("wanted", ["singular", "dead channel"])
def test_grams_reach(wanted):
    """Gram matrices of fewer tokens than channels, and with a dead channel, are drawn."""
    signs = {
        "singular": lambda gram: torch.linalg.matrix_rank(gram) < 6 and (gram.diag() > 0).all(),
        "dead channel": lambda gram: (gram.diag() == 0).sum() == 1,
    }
    assert find(grams(6), lambda gram: bool(signs[wanted](gram))) is not None


@quick
@given(st.data())
def test_logits_are_finite_rows_of_groups(data):
    """Logits are finite, with one row per group."""
    pattern = data.draw(patterns())
    drawn = data.draw(logits(pattern))
    assert drawn.shape[1] == pattern.group
    assert drawn.isfinite().all()


def test_logits_reach_overflow():
    """Logits whose exponentials overflow, and ties, are drawn."""
    assert find(logits(TWO_FOUR), lambda drawn: bool(drawn.exp().isinf().any())) is not None
    assert find(logits(TWO_FOUR), lambda drawn: len(drawn.unique()) == 1) is not None


@quick
@given(token_streams(11))
def test_token_streams_are_tokens(tokens):
    """Tokens are int64 below the size of the vocabulary, at least two per window."""
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < 11
    assert tokens.shape[1] >= 2


def test_a_tiny_bundle():
    """The kit loads a tiny model of any family by name, with the same weights every time."""
    from nmbench.errors import NMBenchError
    from nmbench.testing.models import tiny_bundle

    assert tiny_bundle().digest() == tiny_bundle("llama").digest()
    assert len(tiny_bundle("gpt2").blocks) == 2
    with pytest.raises(NMBenchError, match="there are"):
        tiny_bundle("lama")
