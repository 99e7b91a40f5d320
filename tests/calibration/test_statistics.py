"""Laws of gathering: sums over the inputs of one layer do not depend on how they arrive."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.calibration.gram import HALVES, by_conversion, halves_rule
from nmbench.calibration.statistics import Gatherer, Skip
from nmbench.errors import NMBenchError
from nmbench.methods import Stat
from nmbench.pattern import Pattern
from nmbench.testing import strategies

BOTH = Stat.INPUT_NORM | Stat.GRAM
CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_gatherer_does_not_care_for_the_split(data):
    """Inputs that arrive in any pieces give the statistics of all of them together."""
    x = data.draw(strategies.tensors(Pattern(2, 4), ("normal", "ties", "zeros", "half grid"), max_rows=24))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=3)))
    windows = data.draw(st.integers(1, 5))
    gatherer = Gatherer(BOTH, (1, x.shape[1]), x.device)
    for start, stop in itertools.pairwise([0, *cuts, len(x)]):
        gatherer.add(x[start:stop])
    got, wanted = gatherer.finish(windows, "a"), strategies.statistics(x.double(), windows)
    assert (got.windows, got.tokens) == (windows, len(x))
    torch.testing.assert_close(got.input_norm, wanted.input_norm, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.gram, wanted.gram, rtol=1e-4, atol=1e-4)


def test_half_precision_inputs_are_summed_in_float32():
    """Squares that overflow in half precision, and sums that stall in it, come out right."""
    x = torch.full((5000, 4), 300.0, dtype=torch.float16)
    gatherer = Gatherer(BOTH, (1, 4), x.device)
    gatherer.add(x)
    stats = gatherer.finish(1, "a")
    torch.testing.assert_close(stats.input_norm, torch.full((4,), 300.0 * 5000**0.5))
    torch.testing.assert_close(stats.gram, torch.full((4, 4), 2 * 5000 * 300.0**2), rtol=1e-3, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, *HALVES]))
def test_sums_on_a_cpu_are_those_of_float32(data, dtype):
    """Inputs of any type give, bit for bit, the sums of the same inputs turned to float32 first."""
    x = data.draw(strategies.tensors(Pattern(2, 4), ("normal", "ties"), max_rows=24)).to(dtype)
    needs = BOTH | Stat.DRIFT
    ours, plain = (Gatherer(needs, (1, x.shape[1]), x.device) for _ in range(2))
    for gatherer, values in ((ours, x), (plain, x.float())):
        gatherer.add_dense(values * 2)
        gatherer.add(values)
    gram = torch.zeros(x.shape[1], x.shape[1]).addmm_(x.float().t(), x.float())
    assert torch.equal(ours.gram, gram)
    assert torch.equal(ours.squares, x.float().square().sum(dim=0))
    assert torch.equal(ours.drift, plain.drift)


def test_products_of_halves_fall_back_on_conversion():
    """Where torch has no product of such numbers into float32, as on a CPU, they are converted."""
    assert halves_rule(CPU, torch.bfloat16) is by_conversion


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sums_of_halves_on_a_gpu_are_those_of_float32(dtype):
    """Tensor cores give the sums to float32 accuracy: squares and products of 5,000 tokens, and of none."""
    x = strategies.values("normal", (5000, 96), 0).to(dtype)
    x[:, 3] *= 100
    gatherer = Gatherer(BOTH, (1, 96), torch.device("cuda"))
    for part in x.cuda().split([3000, 0, 2000]):
        gatherer.add(part)
    exact = x.double().T @ x.double()
    scale = exact.diagonal().sqrt()
    assert ((gatherer.gram.cpu() - exact) / torch.outer(scale, scale)).abs().max() < 3e-5
    torch.testing.assert_close(gatherer.squares.cpu(), exact.diagonal().float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dense", [None, 4])
def test_tokens_without_a_counterpart_are_refused(dense):
    """Drift is defined only for layers that are given the same tokens as in the dense model."""
    gatherer = Gatherer(Stat.DRIFT, (1, 8), CPU)
    if dense:
        gatherer.add_dense(torch.zeros(dense, 8))
    with pytest.raises(NMBenchError, match=f"given 5 tokens where it is given {dense or 0} in the dense model"):
        gatherer.add(torch.zeros(5, 8))


@pytest.mark.parametrize("tokens", [(5,), (8, 8), (8, 16, 8)])
def test_tokens_without_a_place_are_refused(tokens):
    """First tokens can be left out only of layers that are given whole windows, and all of them."""
    gatherer = Gatherer(BOTH, (1, 8), CPU, skip=Skip(1, 8))
    with pytest.raises(NMBenchError, match="it cannot skip the first of every window"):  # noqa: PT012
        for count in tokens:
            gatherer.add(torch.ones(count, 8))
        gatherer.finish(3, "a")
