"""Laws of the kernels in plain torch that the programs cannot show."""

import torch

from nmbench_plugins.maskpro.kernels import reference


def test_events_as_rare_as_the_words_allow_are_drawn():
    """A weight of 2^-30 beside 1 is drawn by the 4 smallest of 2^32 words and by no other; a weight of 0 by none."""
    weights = torch.tensor([[0, 0, 2**-30, 1.0]]).repeat(6, 1)
    words = torch.tensor([[0], [1], [3], [4], [5], [2**32 - 1]])
    assert reference._pick(weights, words)[:, 0].tolist() == [2, 2, 2, 3, 3, 3]
