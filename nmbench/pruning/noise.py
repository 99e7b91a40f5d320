"""Gumbel noise by counters: the noise of a weight depends on seed, step, layer and place, and is stored nowhere.

So the backward pass computes the noise of the forward pass again, a resumed run needs no state, and a CUDA graph draws
anew in every replay. The bits are those of two rounds of the hash `lowbias32` (Chris Wellons, public domain).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def gumbel(keys: Tensor, layer: int, first: int, shape: torch.Size) -> Tensor:
    """Return Gumbel noise, float32 `shape`, for the weights of layer number `layer` from place `first` on.

    `keys`: int32 `[2]` on the device, of one step (`step_keys`). Every cell of 2^-31 is equally likely, so that rare
    events are as fine as the cells; noise is finite.
    """
    start = signed(first)
    places = torch.arange(shape.numel(), dtype=torch.int32, device=keys.device).add_(start)  # wraps, as the hash does
    bits = mixed_(places.bitwise_xor_(keys[0]))
    bits = mixed_(bits.add_(keys[1]).bitwise_xor_(salt_of(layer)))
    u = bits.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    u.clamp_(max=1 - torch.finfo(torch.float32).eps / 2)  # the last cells round to 1, where the noise is infinite
    return u.neg_().log1p_().neg_().log_().neg_().view(shape)


def step_keys(seed: int, step: int) -> tuple[int, int]:
    """Return the two keys of a step, as signed 32-bit numbers."""
    low = mixed_number(mixed_number(seed & LOW) ^ (step & LOW))
    high = mixed_number(mixed_number(seed >> 32 & LOW) + mixed_number(step ^ 0x9E3779B9))
    return signed(low), signed(high)


def salt_of(layer: int) -> int:
    """Return what tells the noise of a layer from that of other layers, a signed 32-bit number."""
    return signed(mixed_number(layer + 1))


def mixed_(x: Tensor) -> Tensor:
    """Hash int32 words in place; products wrap."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def mixed_number(x: int) -> int:
    """Return the same hash of one number, unsigned."""
    x &= LOW
    x = (x ^ x >> 16) * 0x7FEB352D & LOW
    x = (x ^ x >> 15) * 0x846CA68B & LOW
    return x ^ x >> 16


def signed(bits: int) -> int:
    """Return the low 32 bits as a signed number."""
    low = bits & LOW
    return low - (low >> 31 << 32)
