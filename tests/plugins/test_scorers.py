"""Laws of the built-in scorers: magnitude, Wanda (arXiv 2306.11695) and RIA (ICLR 2024)."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.methods import LayerStats, Stat
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import choose
from nmbench.runtime.packed import pack, unpack
from nmbench.testing import strategies
from nmbench.testing.cases import LayerCase
from nmbench_plugins.alps import ALPS
from nmbench_plugins.magnitude import Magnitude
from nmbench_plugins.ria import RIA
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.swaps import Swaps
from nmbench_plugins.wanda import Wanda

quick = settings(max_examples=30, deadline=None)
patterns = strategies.patterns(16)
row_by_row = pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=["magnitude", "wanda"])
methods = pytest.mark.parametrize("method", [Magnitude(), Wanda(), RIA()], ids=["magnitude", "wanda", "ria"])


def layer(data: st.DataObject) -> tuple[Tensor, LayerStats, Pattern]:
    pattern = data.draw(patterns)
    return *data.draw(strategies.layers(pattern)), pattern


def random_signs(shape: torch.Size, seed: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def test_what_is_needed():
    """Magnitude needs no data, Wanda and RIA the norms of the inputs."""
    assert Magnitude().needs is Stat.NONE
    assert Wanda().needs is RIA().needs is Stat.INPUT_NORM


@quick
@given(st.data())
def test_wanda_with_unit_norms_is_magnitude(data):
    """Where all inputs have norm 1, Wanda rates weights as magnitude does, whatever the weights."""
    pattern = data.draw(patterns)
    weight = data.draw(strategies.tensors(pattern))
    stats = LayerStats(1, 1, input_norm=torch.ones(weight.shape[1]))
    assert torch.equal(Wanda().score(weight, stats), Magnitude().score(weight, LayerStats(0, 0)))


@quick
@given(st.data())
def test_wanda_is_its_definition(data):
    """Wanda's score of weight (i, j) is |w_ij| times the root of the mean over windows of input j's sum of squares."""
    weight, stats, _ = layer(data)
    energy = stats.gram.double().diagonal() / 2  # the mean over windows of the sum of squares
    expected = weight.double().abs() * energy.sqrt()
    torch.testing.assert_close(Wanda().score(weight, stats).double(), expected, rtol=1e-5, atol=1e-6)


@methods
@quick
@given(st.data())
def test_signs_do_not_matter(method, data):
    """Flipping the signs of any weights changes no score."""
    weight, stats, _ = layer(data)
    flipped = weight * random_signs(weight.shape, data.draw(st.integers(0, 2**31)))
    assert torch.equal(method.score(flipped, stats), method.score(weight, stats))


@row_by_row
@quick
@given(st.data())
def test_rows_are_rated_alone(method, data):
    """Permuting the rows of a weight permutes its scores, and scaling a row by a power of two changes no mask."""
    weight, stats, pattern = layer(data)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))))
    score = method.score(weight, stats)
    assert torch.equal(method.score(weight[order], stats), score[order])
    scale = 2.0 ** torch.arange(len(weight))[:, None]
    assert torch.equal(pattern.top(method.score(weight * scale, stats)), pattern.top(score))


@methods
@quick
@given(st.data(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_compared_in_float32(method, data, dtype):
    """Half-precision weights are rated as the float32 numbers they stand for, so that no score is rounded to a tie."""
    weight, stats, _ = layer(data)
    half = weight.to(dtype)
    assume(half.isfinite().all())
    score = method.score(half, stats)
    assert score.dtype == torch.float32
    assert torch.equal(score, method.score(half.float(), stats))


def test_norms_decide_between_bf16_neighbours():
    """Two products that bfloat16 cannot tell apart are told apart, and not by the lower index."""
    weight = torch.ones(1, 4, dtype=torch.bfloat16)
    stats = LayerStats(1, 1, input_norm=torch.tensor([1.0, 1.001, 1.0, 1.002]))
    assert Pattern(2, 4).top(Wanda().score(weight, stats)).tolist() == [[False, True, False, True]]


@methods
@quick
@given(st.data())
def test_scorers_are_pure(method, data):
    """A scorer changes neither the weight nor the statistics it is handed."""
    weight, stats, _ = layer(data)
    before = weight.clone(), stats.input_norm.clone(), stats.gram.clone()
    method.score(weight, stats)
    assert all(map(torch.equal, before, (weight, stats.input_norm, stats.gram)))


@pytest.mark.parametrize("method", [Wanda(), RIA()], ids=["wanda", "ria"])
def test_dead_inputs_are_dropped_first(method):
    """A weight whose input is always zero loses to any other, however large it is."""
    stats = LayerStats(1, 1, input_norm=torch.tensor([0.0, 1.0, 1.0, 0.0]))
    weight = torch.tensor([[1e6, 1e-6, 1e-6, 1e6]])
    assert Pattern(2, 4).top(method.score(weight, stats)).tolist() == [[False, True, True, False]]


@quick
@given(st.data(), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_ria_is_its_definition(data, power):
    """RIA's score of (i, j) is |w_ij| over the sums of its column and of its row, times a power of the input norm."""
    weight, stats, _ = layer(data)
    assume((weight.abs().sum(dim=0) > 1e-30).all() and (weight.abs().sum(dim=1) > 1e-30).all())
    size = weight.double().abs()
    shares = size / size.sum(dim=0) + size / size.sum(dim=1, keepdim=True)
    expected = shares * stats.input_norm.double() ** power
    torch.testing.assert_close(RIA(power).score(weight, stats).double(), expected, rtol=1e-5, atol=1e-12)


@quick
@given(st.data())
def test_ria_rates_rows_and_columns_alike(data):
    """Permuted outputs permute the scores, and a layer and its transpose have transposed scores where norms are 1."""
    weight, stats, _ = layer(data)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))))
    torch.testing.assert_close(RIA().score(weight[order], stats), RIA().score(weight, stats)[order])
    scores = [RIA(0.0).score(w, LayerStats(1, 1, input_norm=torch.ones(w.shape[1]))) for w in (weight, weight.T)]
    torch.testing.assert_close(scores[0], scores[1].T)


def test_ria_saves_a_small_column():
    """A column of small weights keeps its largest, where Wanda and magnitude drop it."""
    weight = torch.tensor([[0.1, 1.0, 1.0, 1.1], [0.0, 1.0, 1.0, 1.0]])
    stats = LayerStats(1, 1, input_norm=torch.ones(4))
    assert Pattern(2, 4).top(RIA().score(weight, stats))[0].tolist() == [True, False, False, True]
    assert Pattern(2, 4).top(Wanda().score(weight, stats))[0].tolist() == [False, True, False, True]


def test_ria_survives_rows_and_columns_of_zeros():
    """Where a sum is zero, so are the scores; none is NaN."""
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 2.0, 0.0]])
    score = RIA().score(weight, LayerStats(1, 1, input_norm=torch.ones(4)))
    assert score.tolist()[0] == [0.0] * 4
    assert score.isfinite().all()


def test_power_of_ria_has_limits():
    """A negative power would keep the weakest inputs."""
    with pytest.raises(NMBenchError, match="power from 0 to 4"):
        RIA(power=-1.0)


@row_by_row
def test_scorers_have_no_options(method):
    """Both are what their papers say, with nothing to tune."""
    assert dataclasses.fields(method) == ()


@row_by_row
@quick
@given(st.data())
def test_units_are_kept_by_the_error_of_the_layer(method, data):
    """Of all choices of units, the one kept has the least error on uncorrelated inputs, of the norms in use."""
    pattern = data.draw(strategies.patterns(5, units=(2, 3)))
    weight, stats = data.draw(strategies.layers(pattern, ("normal", "one outlier")))
    norm = stats.input_norm if isinstance(method, Wanda) else torch.ones(weight.shape[1])
    mask = choose(method, weight, stats, pattern).mask
    lost = pattern.by_unit((weight.double() * norm).square()).sum(dim=-1)  # [out, units], the error of dropping a unit
    kept, units = pattern.by_unit(mask)[..., 0], pattern.units
    least = units.groups(lost).sort(dim=-1).values[..., : units.group - units.keep].sum(dim=-1)
    assert not pattern.broken(mask).any()
    torch.testing.assert_close(units.groups(lost.masked_fill(kept, 0.0)).sum(dim=-1), least, rtol=1e-5, atol=0.0)


ONE_SHOT = (Magnitude(), Wanda(), RIA(), SparseGPT(), ALPS(iterations=30), Swaps(skip_tokens=0, sequential=False))


@pytest.mark.parametrize("text", ["4:6", "6:8"])
def test_patterns_of_slides_are_pruned_and_keep_more_than_2_4(text):
    """4:6 and 6:8 are strict by every one-shot method, as packed too, and lose less of the output than 2:4 does."""
    case = LayerCase(pattern=text, rows=8, groups=12, inputs="correlated")  # 72 or 96 inputs, whole groups of 4
    half = LayerCase(rows=8, groups=case.shape[1] // 4, inputs="correlated")
    assert torch.equal(case.weight(), half.weight())
    for method in ONE_SHOT:
        lost = []
        for each in (case, half):
            stats = each.stats(Stat.GRAM | Stat.INPUT_NORM | Stat.DRIFT | Stat.LAG)
            pruned = choose(method, each.weight(), stats, each.nm, each.mask())
            assert not each.nm.broken(pruned.mask).any()
            weight = each.weight().masked_fill(~pruned.mask, 0.0) if pruned.weight is None else pruned.weight
            assert torch.equal(unpack(pack(weight, each.nm, pruned.mask)), weight)
            lost.append(float((each.tokens() @ (each.weight() - weight).T).square().sum()))
        assert lost[0] < lost[1], method
