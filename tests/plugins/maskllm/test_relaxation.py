"""Laws of the soft mask: what it sums to, its limits, and its gradient, which equals autograd of the plain formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import nmbench as nm
from nmbench.pruning import gumbel, step_keys
from nmbench_plugins.maskllm.candidates import candidates
from nmbench_plugins.maskllm.relaxation import as_rows, chosen, keys_gradient, members, soft_mask

quick = settings(max_examples=30, deadline=None)
PATTERNS = st.sampled_from(["1:2", "1:4", "2:4", "3:4", "2:3", "4:8"]).map(nm.Pattern.parse)
GROUPS = 5


@st.composite
def drawn(draw):
    """Keys float64 `[C, 5]`, from ties to gaps of 1000, a slope `[M, 5]`, the pattern, and a temperature."""
    pattern = draw(PATTERNS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1000.0]))
    keys = scale * torch.randn(len(candidates(pattern)), GROUPS, generator=generator, dtype=torch.float64)
    slope = torch.randn(pattern.group, GROUPS, generator=generator, dtype=torch.float64)
    return keys, slope, pattern, draw(st.sampled_from([4.0, 0.3, 0.05]))


@quick
@given(drawn())
def test_the_soft_mask_sums_to_n(case):
    """Entries lie in [0, 1] and sum to N in every group, in float64 and in float32."""
    keys, _, pattern, temperature = case
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        mask = soft_mask(chosen(keys.to(dtype), temperature), candidates(pattern).to(dtype))
        assert (mask >= 0).all() and (mask <= 1 + tolerance).all()
        torch.testing.assert_close(mask.sum(dim=0), torch.full((GROUPS,), float(pattern.keep), dtype=dtype))


@quick
@given(drawn())
def test_the_gradient_is_that_of_autograd(case):
    """The gradient that is written out equals autograd of the plain formula in float64, also for extreme keys."""
    keys, slope, pattern, temperature = case
    patterns, leaf = candidates(pattern).double(), keys.clone().requires_grad_()
    mask = torch.einsum("cm,cg->mg", patterns, F.softmax(leaf / temperature, dim=0))
    (slope * mask).sum().backward()
    shares = chosen(keys, temperature)
    torch.testing.assert_close(soft_mask(shares, patterns), mask.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(keys_gradient(shares, slope, patterns, temperature), leaf.grad, rtol=1e-10, atol=1e-10)


@quick
@given(drawn())
def test_a_cold_soft_mask_is_the_pattern_of_the_largest_key(case):
    """As the temperature falls to 0, the soft mask becomes the candidate of the largest key."""
    keys, _, pattern, _ = case
    keys = keys.round() + 0.01 * torch.arange(len(keys))[:, None]  # no ties
    patterns = candidates(pattern).double()
    assert soft_mask(chosen(keys, 1e-4), patterns).allclose(patterns[keys.argmax(dim=0)].t())


def test_hard_draws_have_the_probabilities_of_the_gates():
    """The largest of scale x gates + noise is a draw from softmax(scale x gates)."""
    draws, gates = 200_000, torch.tensor([0.0, 0.01, -0.005, 0.007, 0.002, 0.02])
    keys = torch.tensor(step_keys(7, 3), dtype=torch.int32)
    noise = gumbel(keys, 0, 0, torch.Size([draws, len(gates)]))
    found = (noise + 100 * gates).argmax(dim=1).bincount(minlength=len(gates)) / draws
    expected = torch.softmax(100 * gates, dim=0)
    assert ((found - expected).abs() < 5 * (expected / draws).sqrt()).all()


def test_members_and_rows_are_inverse():
    """A layer with the members of its groups first, and back."""
    rows = torch.arange(24.0).view(2, 12)
    assert members(rows, 4)[:, 1].tolist() == [4, 5, 6, 7]
    assert as_rows(members(rows, 4), 12).equal(rows)


def test_the_published_choice_has_the_same_mask():
    """Mask and gradient of two groups are those of an independent implementation of the paper, for the same noise.

    The figures come from running `create_2_4_mask` of Paramathic/patch (`patch/learnable_mask.py` at 73dfa37, MIT) at
    temperature 4 and scale 100 with the loss sum of i * mask_i, i = 0 ... 7. With 2,048 groups at (4, 100), (1, 200)
    and (0.05, 500) the largest differences were 1.2e-7 in the mask and 1.8e-7 of the largest gradient.
    """
    gates = torch.tensor([[0.03, -0.01, 0.0, 0.02, -0.02, 0.01], [0.0, 0.0, 0.0, 0.04, 0.0, 0.0]])
    noise = [
        [-0.02689919, 1.2013829, 0.80389756, 0.9714598, 1.1731014, -0.6453689],
        [0.1440669, -0.24147923, -0.63129276, 0.50511336, 0.81339103, 0.93111765],
    ]
    mask = [0.52201205, 0.59845442, 0.5064187, 0.37311465, 0.33699918, 0.63617623, 0.629197, 0.39762759]
    gradient = [
        [-10.85040951, -2.29089904, 0.98188788, 1.68811476, 3.07784629, 7.39346218],
        [-6.43754578, -3.04546738, -0.2221745, -0.80236578, 3.32682419, 7.18073177],
    ]
    shares, patterns = chosen((100 * gates + torch.tensor(noise)).t(), 4.0), candidates(nm.Pattern(2, 4))
    found = keys_gradient(shares, members(torch.arange(8.0)[None], 4), patterns, 4.0) * 100
    torch.testing.assert_close(as_rows(soft_mask(shares, patterns), 8)[0], torch.tensor(mask), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.t(), torch.tensor(gradient), rtol=1e-5, atol=1e-4)
