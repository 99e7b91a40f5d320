"""Laws of the pair estimator of MaskPro-plus: fair coins that come back, an unbiased gradient, less noise."""

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench_plugins.maskpro import coins
from nmbench_plugins.maskpro.kernels import ROUNDS
from nmbench_plugins.maskpro.pair_tracker import PairRule, PairTracker
from nmbench_plugins.maskpro.philox import counters, philox
from reference import policy as reference

quick = settings(max_examples=40, deadline=None)


def toss(seed: int, step: int, windows: int, rows: int) -> Tensor:
    return coins.toss(seed, torch.tensor([step]), windows, rows)


def tracker(rows: dict[str, int], seed: int = 0, lr: float = 1.0, fades_over: int | None = None) -> PairTracker:
    layers = {name: (count, 4) for name, count in rows.items()}
    generator, bundle = torch.Generator().manual_seed(seed), SimpleNamespace(device=torch.device("cpu"))
    return PairTracker(
        PairRule(lr, 10.0, fades_over), SimpleNamespace(layers=layers, generator=generator, bundle=bundle)
    )


# Coins


@quick
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 6), st.integers(1, 300))
def test_coins_are_the_bits_of_philox(seed, step, windows, rows):
    """The coins of a window are the bits, lowest first, of the words of its own counters in stream 3."""
    each = -(-rows // 128)
    words = philox(counters(0, windows * each, step, 3), seed, ROUNDS)  # [counters, 4]
    bits = torch.stack([(words >> k) % 2 for k in range(32)], -1).view(windows, -1)
    assert torch.equal(toss(seed, step, windows, rows), bits[:, :rows] == 1)


def test_coins_are_fair_and_independent():
    """Half of the coins are True, and half of any two rows, windows, steps or seeds agree, to 5 standard deviations."""
    windows, rows = 64, 4096
    tossed = toss(5, 7, windows, rows)
    others = [tossed.roll(1, 0), tossed.roll(1, 1), toss(5, 8, windows, rows), toss(6, 7, windows, rows)]
    for sample in (tossed, *(tossed == other for other in others)):
        assert float(sample.float().mean()) == pytest.approx(0.5, abs=2.5 / (windows * rows) ** 0.5)
        assert (sample.float().mean(1) - 0.5).abs().max() < 2.5 / rows**0.5
        assert (sample.float().mean(0) - 0.5).abs().max() < 2.5 / windows**0.5


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 300))
def test_windows_have_coins_of_their_own(few, more, rows):
    """The coins of a window depend on its place in the minibatch, not on how many windows follow."""
    assert torch.equal(toss(1, 2, few, rows), toss(1, 2, few + more, rows)[:few])


# From losses to scales


@quick
@given(st.integers(2, 40), st.integers(0, 2**31), st.floats(-3, 3), st.floats(0.01, 100))
def test_scale_is_the_correlation_with_the_coins(windows, seed, offset, size):
    """Every row's scale is -lr * sum a c / sqrt(windows), whatever the size of the losses and what all share."""
    one, two = tracker({"a": 3, "b": 5}, seed, lr=0.5), tracker({"a": 3, "b": 5}, seed, lr=0.5)
    losses = torch.randn(windows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    references = losses.flip(0)
    signs = 2.0 * one.toss(windows).double() - 1
    residuals = losses - references
    away = residuals - residuals.mean()
    wanted = -0.5 * (away / away.square().mean().sqrt()) @ signs / math.sqrt(windows)
    one.take(losses, references)
    torch.testing.assert_close(one.scale.double(), wanted, rtol=1e-5, atol=1e-5)
    two.toss(windows)
    two.take(size * losses + offset, size * references)
    torch.testing.assert_close(two.scale, one.scale, rtol=1e-4, atol=1e-4)
    assert one.figures().spread == pytest.approx(float(away.square().mean().sqrt()))


@pytest.mark.parametrize("windows", [2, 5, 32])
def test_scale_has_unit_variance_without_signal(windows):
    """Where coins make no difference to the loss, scales have mean 0 and variance 1 at any number of windows."""
    scales = tracker({"a": 40_000}, lr=1.0)
    scales.toss(windows)
    scales.take(torch.randn(windows, generator=torch.Generator().manual_seed(1)), torch.zeros(windows))
    assert float(scales.scale.mean()) == pytest.approx(0, abs=5 / 200)
    assert float(scales.scale.square().mean()) == pytest.approx(1, abs=5 * 2**0.5 / 200)


def test_equal_residuals_move_nothing():
    """Windows that all lost the same, and a single window, leave every scale at 0."""
    for windows in (1, 3, 7):
        scales = tracker({"a": 9})
        scales.toss(windows)
        losses = torch.arange(float(windows))  # exact in binary, as their residuals then are
        scales.take(losses + 0.5, losses + 0.25)
        assert not scales.scale.any()
        assert scales.figures()[:4] == (1, 0.25, 0.25, 0.0)


def test_learning_rate_fades():
    """The rate falls in a straight line from the first step to 0 after the last, also after a restart; or it stays."""
    fading, staying = tracker({"a": 50}, lr=2.0, fades_over=4), tracker({"a": 50}, lr=2.0)
    factors = []
    for step in range(4):
        for scales in (fading, staying):
            if step == 2:
                scales.restart(1.0)
            scales.toss(6)
            scales.take(torch.arange(6.0), torch.zeros(6))
        used = staying.scale != 0
        factors.append(float((fading.scale / staying.scale)[used].mean()))
    assert factors == pytest.approx([1, 0.75, 0.5, 0.25])
    assert fading.figures().learning_rate == 1.0


# The estimator


class Problem(NamedTuple):
    """Rows of one group 2:4 each, and the loss of every window under every mask of the whole."""

    logits: Tensor  # [rows, 4]
    losses: Tensor  # [windows, 6, 6, ...], one axis of 6 sets per row
    sets: Tensor  # bool [6, 4]

    @classmethod
    def of(cls, rows: int, windows: int, seed: int) -> "Problem":
        generator = torch.Generator().manual_seed(seed)
        losses = torch.randn(windows, *[6] * rows, generator=generator, dtype=torch.float64) / 4
        for row in range(rows):  # mostly what each row does by itself, for all windows alike
            losses += torch.randn(6, generator=generator).view(6, *[1] * (rows - 1 - row))
        logits = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        return cls(logits, losses, reference.all_masks(2, 4))

    def chances(self) -> Tensor:
        """P of every set of every row, [rows, 6]."""
        return torch.stack(
            [torch.stack([reference.log_prob_by_orders(row, s) for s in self.sets]) for row in self.logits]
        ).exp()

    def gradients(self) -> Tensor:
        """Grad log P of every set of every row, [rows, 6, 4]."""
        count = len(self.sets)
        return torch.stack([reference.grad_log_prob(row.expand(count, 4), self.sets) for row in self.logits])

    def exact(self) -> Tensor:
        """The gradient of the expected mean loss, [rows, 4], by enumeration of all masks."""
        rows, chances = len(self.logits), self.chances()
        expected = self.losses.mean(0)
        for row in range(rows):
            expected = expected * chances[row].view(6, *[1] * (rows - 1 - row))
        slopes = self.gradients()
        result = torch.zeros(rows, 4, dtype=torch.float64)
        for row in range(rows):
            alone = expected.movedim(row, 0).reshape(6, -1).sum(1)  # [6], P times the mean loss given the row's set
            result[row] = alone @ slopes[row]
        return result

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Which sets the policy draws, [count, rows]."""
        return torch.stack([c.multinomial(count, True, generator=generator) for c in self.chances()], 1)

    def mean(self) -> Tensor:
        """The expected mean loss."""
        value = self.losses.mean(0)
        for chances in self.chances():
            value = torch.tensordot(chances, value, 1)
        return value


def pair_estimates(problem: Problem, draws: int) -> Tensor:
    """Un-normalised estimates of the gradient, [draws, rows, 4], from what the tracker makes of the losses."""
    rows, windows = len(problem.logits), len(problem.losses)
    generator, scales, slopes = torch.Generator().manual_seed(1), tracker({"a": rows}), problem.gradients()
    pairs = torch.stack((problem.draw(draws, generator), problem.draw(draws, generator)), 1)  # [draws, 2, rows]
    place, estimates = torch.arange(rows), []
    for a, b in pairs:
        drawn = torch.where(scales.toss(windows), a, b)  # [windows, rows]
        losses = problem.losses[(torch.arange(windows), *drawn.unbind(1))]
        scales.take(losses, torch.zeros(windows))
        size = -scales.scale.double() * scales.figures().spread * math.sqrt(windows) / (windows - 1)
        estimates.append(size[:, None] * (slopes[place, a] - slopes[place, b]))
    return torch.stack(estimates)


def single_estimates(problem: Problem, draws: int) -> Tensor:
    """Estimates of MaskPro with the best constant for its moving average, two minibatches each: as many products."""
    generator, slopes, place = torch.Generator().manual_seed(2), problem.gradients(), torch.arange(len(problem.logits))
    drawn = problem.draw(2 * draws, generator)
    rewards = problem.losses.mean(0)[tuple(drawn.unbind(1))] - problem.mean()
    return (rewards[:, None, None] * slopes[place, drawn]).view(draws, 2, -1, 4).mean(1)


@pytest.mark.parametrize(("rows", "windows"), [(1, 2), (2, 3), (4, 16)])
def test_pair_estimator_is_unbiased(rows, windows):
    """The mean of many estimates is the exact gradient by enumeration, to 4.5 standard errors."""
    problem = Problem.of(rows, windows, seed=rows)
    estimates = pair_estimates(problem, 4000)
    error = (estimates.mean(0) - problem.exact()).abs()
    assert (error <= 4.5 * estimates.std(0) / math.sqrt(len(estimates))).all()
    assert problem.exact().abs().max() > 0.1


def test_pair_estimator_is_less_noisy():
    """Six rows, 32 windows: its variance is below 0.6 of MaskPro's with the best baseline, at as many products."""
    problem = Problem.of(6, 32, seed=6)
    single = single_estimates(problem, 4000)
    assert ((single.mean(0) - problem.exact()).abs() <= 4.5 * single.std(0) / math.sqrt(len(single))).all()
    assert pair_estimates(problem, 1500).var(0).sum() < 0.6 * single.var(0).sum()
