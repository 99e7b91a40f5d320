"""Philox4x32, a counter-based random number generator, in plain torch.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Every round multiplies two
of four 32-bit words to 64 bits and mixes the halves with the other two words and the key.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, square root of 3
LOW = 0xFFFFFFFF


def philox(counter: Tensor, seed: int, rounds: int) -> Tensor:
    """Return four words in 0 .. 2^32 - 1 for every counter: int64 [..., 4] -> int64 [..., 4]; the seed has 64 bits."""
    a, b, c, d = counter.unbind(-1)
    for turn in range(rounds):
        low, high = (((seed >> 32 * i) + turn * KEY_STEPS[i]) & LOW for i in (0, 1))
        even, odd = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # 64 bits; the sign is one of them
        a, b, c, d = _high(odd) ^ b ^ low, odd & LOW, _high(even) ^ d ^ high, even & LOW
    return torch.stack((a, b, c, d), -1)


def counters(first: int, count: int, step: int, stream: int) -> Tensor:
    """Return the counters (first, first + 1, ... as 64 bits, step, stream), int64 [count, 4]."""
    place = torch.arange(first, first + count)
    zero = torch.zeros_like(place)
    return torch.stack((place & LOW, _high(place), zero + (step & LOW), zero + stream), 1)


def _high(words: Tensor) -> Tensor:
    return (words >> 32) & LOW
