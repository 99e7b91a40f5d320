"""Laws of the random words: those of Philox4x32, counted in 64 bits."""

import pytest
import torch

from nmbench_plugins.maskpro.kernels.philox import counters, philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """Ten rounds give the known answers of the authors' Random123 1.09."""
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert philox(torch.tensor(counter), key[0] + (key[1] << 32), rounds=10).tolist() == words


def test_counters_are_64_bits_wide():
    """The place of a chunk fills two words, the step and the stream one each."""
    assert counters(2**32 - 1, 2, -1, 1).tolist() == [[2**32 - 1, 0, 2**32 - 1, 1], [0, 1, 2**32 - 1, 1]]
