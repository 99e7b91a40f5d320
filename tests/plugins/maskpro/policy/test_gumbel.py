"""Laws of the draws: strictly N of M, as often as the probability of a mask says, and by the seed alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench_plugins.maskpro import policy
from nmbench_plugins.maskpro.policy import gumbel
from reference import policy as reference
from reference.groups import PATTERNS, cases, rng, spread

quick = settings(max_examples=40, deadline=None)


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """The chance of counts at least this far from those expected."""
    statistic = ((counts - expected) ** 2 / expected).sum().double()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (3, 4), (4, 8), (5, 8)], ids="{0[0]}:{0[1]}".format)
def test_frequencies_match_probabilities(pattern, dtype):
    """Over many draws, every mask comes up as often as its probability says (chi-square)."""
    keep, group = pattern
    logits, masks = spread(torch.randn(group, generator=rng(7)).to(dtype), keep)
    drawn = policy.sample(logits[:1].expand(200_000, group), keep, rng(8))
    code = 2 ** torch.arange(group)
    counts = (drawn * code).sum(-1).bincount(minlength=2**group)[(masks * code).sum(-1)].double()
    expected = reference.log_prob_by_subsets(logits, masks).exp() * counts.sum()
    assert counts.sum() == 200_000
    assert chi_square_p(counts, expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rare_draws_come_at_their_rate(dtype):
    """A draw with a chance of some 1e-5 is neither lost nor favoured."""
    logits = torch.tensor([12.0, 0, 0, 0], dtype=dtype)
    rare = (~policy.sample(logits.expand(4_000_000, 4), 1, rng(1))[:, 0]).sum().double()
    expected = 4_000_000 * 3 / (3 + torch.tensor(12.0).double().exp())
    at_most_as_many = torch.special.gammaincc(rare + 1, expected)  # of a Poisson variable
    assert 1e-3 < at_most_as_many < 1 - 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_finite_and_unbiased_at_its_ends(dtype):
    """The first cells of the uniform draw give E = u at their middles, the last ones a large but finite E."""
    cells = 2 ** (63 if dtype == torch.float64 else 31)
    ends = torch.tensor([0, 1, cells - 1], dtype=dtype)
    noise = gumbel.log_exponential(ends).double().exp()
    torch.testing.assert_close(noise[:2] * cells, torch.tensor([0.5, 1.5]).double(), rtol=1e-5, atol=0)
    assert 16 < noise[2] < 45


def test_gap_that_noise_cannot_bridge():
    """Weights a gap of 1000 above the rest are always drawn, and the rest still by their own probabilities."""
    drawn = policy.sample(torch.tensor([0.0, 1000, 0, 0]).expand(60_000, 4), 2, rng(0))
    assert drawn[:, 1].all()
    assert chi_square_p(drawn[:, [0, 2, 3]].sum(0).double(), torch.tensor(20_000.0)) > 1e-3


@quick
@given(cases([*PATTERNS, (16, 32), (1, 32), (31, 32)]), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_sample_is_strictly_n_of_m(case, dtype):
    """Every draw keeps exactly N of M, whatever the logits."""
    logits, mask = case
    drawn = policy.sample(logits.to(dtype), int(mask[0].sum()), rng(0))
    assert drawn.dtype == torch.bool
    assert drawn.shape == logits.shape
    assert (drawn.sum(-1) == mask.sum(-1)).all()


@quick
@given(cases([(1, 4), (2, 4), (5, 8), (8, 16), (31, 32)]), st.booleans())
def test_top_is_a_stable_sort(case, ties):
    """The `keep` largest by counting are those of a stable descending sort: lower index wins."""
    logits, mask = case
    keys = logits.round() if ties else logits
    keep = int(mask[0].sum())
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    expected = torch.zeros_like(mask).scatter_(1, order[:, :keep], True)
    assert (gumbel.top(keys.t().contiguous(), keep).t() == expected).all()


@quick
@given(cases(), st.integers(0, 2**32))
def test_same_seed_same_draws(case, seed):
    """The generator alone decides the draws: its seed repeats them, and the global state is left as it was."""
    logits, mask = case
    keep = int(mask[0].sum())
    before = torch.get_rng_state()
    first, again = policy.sample(logits, keep, rng(seed)), policy.sample(logits, keep, rng(seed))
    assert (first == again).all()
    assert (torch.get_rng_state() == before).all()
