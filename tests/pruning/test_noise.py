"""Laws of the noise: it is Gumbel, a function of its counters, and independent between places, steps and layers."""

from __future__ import annotations

import torch

from nmbench.pruning.noise import gumbel, mixed_, mixed_number, signed, step_keys

COUNT = 2**18


def noise(seed=0, step=0, layer=0, first=0, count=COUNT):
    keys = torch.tensor(step_keys(seed, step), dtype=torch.int32)
    return gumbel(keys, layer, first, torch.Size([count]))


def test_the_moments_are_those_of_gumbel():
    """Mean 0.5772, variance 1.6449, skewness 1.14, and the tail P(G > 5) = 0.0067."""
    drawn = noise().double()
    centred = drawn - drawn.mean()
    assert abs(float(drawn.mean()) - 0.5772) < 0.015
    assert abs(float(drawn.var()) - 1.6449) < 0.03
    assert abs(float((centred**3).mean() / drawn.std() ** 3) - 1.14) < 0.1
    assert abs(float((drawn > 5).double().mean()) - 0.0067) < 0.001


def test_draws_are_independent():
    """Noise of neighbours, of the next steps, of another seed and of another layer is uncorrelated."""
    one = noise()
    others = [noise(step=1), noise(step=2), noise(seed=1), noise(seed=2**40), noise(layer=1), one.roll(1), one.roll(4)]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / COUNT**0.5
        assert not one.sort().values.equal(other.sort().values) or other.equal(one.roll(1)) or other.equal(one.roll(4))


def test_parts_are_parts_of_the_whole():
    """The noise of rows computed alone is that of the whole layer, also beyond 2^32 places."""
    assert noise(first=1000, count=50).equal(noise(count=1050)[1000:])
    assert noise(first=2**32 + 5, count=10).equal(noise(first=5, count=10))


def test_noise_is_finite_at_every_word():
    """The extreme words give finite noise."""
    assert noise(count=2**20).isfinite().all()


def test_the_hash_of_tensors_is_that_of_numbers():
    """The in-place hash of int32 words equals the hash of Python numbers."""
    words = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 123456789]
    found = mixed_(torch.tensor([signed(word) for word in words], dtype=torch.int32))
    assert found.tolist() == [signed(mixed_number(word)) for word in words]
