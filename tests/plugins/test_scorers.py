"""Laws of the built-in scorers, magnitude and Wanda (arXiv 2306.11695)."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.methods import LayerStats, Stat
from nmbench.pattern import Pattern
from nmbench.testing import strategies
from nmbench_plugins.magnitude import Magnitude
from nmbench_plugins.wanda import Wanda

quick = settings(max_examples=50, deadline=None)
patterns = strategies.patterns(16)
methods = pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=["magnitude", "wanda"])


def layer(data: st.DataObject) -> tuple[Tensor, LayerStats, Pattern]:
    pattern = data.draw(patterns)
    return *data.draw(strategies.layers(pattern)), pattern


def random_signs(shape: torch.Size, seed: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def test_what_is_needed():
    """Magnitude needs no data, Wanda the norms of the inputs."""
    assert Magnitude().needs is Stat.NONE
    assert Wanda().needs is Stat.INPUT_NORM


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


@methods
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


def test_dead_inputs_are_dropped_first():
    """A weight whose input is always zero loses to any other, however large it is."""
    stats = LayerStats(1, 1, input_norm=torch.tensor([0.0, 1.0, 1.0, 0.0]))
    weight = torch.tensor([[1e6, 1e-6, 1e-6, 1e6]])
    assert Pattern(2, 4).top(Wanda().score(weight, stats)).tolist() == [[False, True, True, False]]


@methods
def test_scorers_have_no_options(method):
    """Both are what their papers say, with nothing to tune."""
    assert dataclasses.fields(method) == ()
