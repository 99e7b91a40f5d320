"""Laws of the fast draws of a CPU: strict masks, the right distribution down to rare events, the right gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench_plugins.maskpro.policy import sequential_cpu
from reference import policy as reference

quick = settings(max_examples=60, deadline=None)
PATTERNS = [(1, 4), (2, 4), (1, 8), (2, 8)]
patterns = st.sampled_from(PATTERNS)
kinds = st.sampled_from(["normal", "wide", "ties", "prior", "far"])


def make(kind: str, group: int, groups: int, seed: int) -> Tensor:
    """Logits [groups, group], float32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(groups, group, generator=generator)
    if kind == "ties":
        return normal.round()
    if kind == "prior":
        return 10.0 * (normal > 0)
    return normal * {"normal": 1.0, "wide": 5.0, "far": 300.0}[kind]


def draw(logits: Tensor, keep: int, seed: int) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(logits)
    return sequential_cpu.draw(logits, keep, torch.Generator().manual_seed(seed), gradient), gradient


@quick
@given(patterns, kinds, st.integers(1, 70), st.integers(0, 2**31))
def test_masks_are_strict(pattern, kind, groups, seed):
    """Every group keeps exactly `keep` weights."""
    keep, group = pattern
    mask, _ = draw(make(kind, group, groups, seed), keep, seed)
    assert mask.shape == (groups, group)
    assert mask.dtype == torch.bool
    assert (mask.sum(1) == keep).all()


@quick
@given(patterns, kinds, st.integers(1, 70), st.integers(0, 2**31))
def test_gradient_is_that_of_the_mask(pattern, kind, groups, seed):
    """The gradient is that of log P of the mask drawn, as enumeration and autograd give it in float64."""
    keep, group = pattern
    logits = make(kind, group, groups, seed)
    mask, gradient = draw(logits, keep, seed)
    torch.testing.assert_close(gradient.double(), reference.grad_log_prob(logits, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("keep", "group"), PATTERNS)
@pytest.mark.parametrize("kind", ["normal", "ties", "wide"])
def test_frequencies(keep, group, kind):
    """Masks come as often as their probability says: a chi-square test over all sets of two groups."""
    count = 200_000
    for seed in range(2):
        logits = make(kind, group, 1, seed)
        masks, _ = draw(logits.expand(count, group).contiguous(), keep, seed)
        sets = reference.all_masks(keep, group)
        chances = torch.stack([reference.log_prob_by_orders(logits[0], mask) for mask in sets]).exp()
        assert float(chances.sum()) == pytest.approx(1)
        place = 2 ** torch.arange(group)
        codes = {int((mask * place).sum()): k for k, mask in enumerate(sets)}
        found = torch.zeros(len(sets), dtype=torch.float64)
        for code, times in zip(*(masks * place).sum(1).unique(return_counts=True), strict=True):
            found[codes[int(code)]] = times
        frequent = chances * count > 5
        chi = ((found - chances * count) ** 2 / (chances * count))[frequent].sum()
        degrees = int(frequent.sum())
        assert chi < degrees + 5 * (2 * degrees) ** 0.5 + 10


@pytest.mark.parametrize("place", [0, *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 2)), 3])
def test_rare_events_are_not_lost(place):
    """A weight of probability 1e-6 is drawn about that often, wherever it stands and whatever else is there."""
    logits = torch.zeros(4)
    logits[place] = -13.0
    masks, _ = draw(logits.expand(8_000_000, 4), 1, place)
    wanted = 8e6 * float(logits.double().softmax(0)[place])  # 6.0
    assert 0 < int(masks[:, place].sum()) < wanted + 6 * wanted**0.5


def test_never_drawn():
    """What is as unlikely as e^-300 is not drawn, and leaves finite gradients."""
    logits = torch.tensor([[300.0, 0.0, 0.0, 600.0], [0.0, -300.0, -300.0, 0.0]]).repeat(50_000, 1)
    masks, gradient = draw(logits, 2, 0)
    assert masks.view(-1, 2, 4).all(0).tolist() == [[True, False, False, True]] * 2
    assert gradient.isfinite().all()


@quick
@given(patterns, st.integers(1, 50), st.integers(1, 50), st.integers(0, 2**31))
def test_chunks_do_not_matter(pattern, first, second, seed):
    """Drawing two parts one after the other with one generator is drawing the whole."""
    keep, group = pattern
    logits, generator = make("normal", group, first + second, seed), torch.Generator().manual_seed(seed)
    whole, slopes = draw(logits, keep, seed)
    gradient = torch.empty_like(logits)
    parts = [
        sequential_cpu.draw(logits[part], keep, generator, gradient[part])
        for part in (slice(first), slice(first, None))
    ]
    assert torch.equal(torch.cat(parts), whole)
    torch.testing.assert_close(gradient, slopes, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("keep", "group", "suits"), [(2, 4, True), (1, 8, True), (3, 4, False), (2, 16, False)])
def test_which_patterns(keep, group, suits):
    """One or two of four or eight, on a CPU."""
    assert sequential_cpu.suits(keep, group, torch.device("cpu")) == suits
    assert not sequential_cpu.suits(keep, group, torch.device("cuda"))
