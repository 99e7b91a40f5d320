"""Masks of a whole model, stored as bits in host memory and unpacked layer by layer on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from nmbench.results import pack, unpack

Masks = Mapping[str, Tensor]


class Computed(Masks):
    """A mapping that computes a value at every read, so that one layer is in memory at a time."""

    def __init__(self, names: Mapping[str, object], make: Callable[[str], Tensor]) -> None:
        self.names = tuple(names)
        self.make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Packed(Computed):
    """Bool masks as one bit a weight in host memory; reading a layer unpacks its mask on `device`."""

    def __init__(self, masks: Masks, device: torch.device) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self.bits: dict[str, Tensor] = {}  # uint8 [ceil(weights / 8)]
        self.device = device
        for name, mask in masks.items():  # one at a time: `masks` may compute a mask at every read
            self.shapes[name] = mask.shape
            self.bits[name] = pack(mask).cpu()
        super().__init__(self.shapes, self._unpacked)

    def to_save(self, prefix: str) -> dict[str, Tensor]:
        """Return the bits of all layers, by name."""
        return {f"{prefix} {name}": bits for name, bits in self.bits.items()}

    def with_bits(self, prefix: str, saved: Mapping[str, Tensor]) -> Packed:
        """Return masks of the same shapes with the bits that `to_save` returned."""
        other = Packed({}, self.device)
        other.shapes, other.names = self.shapes, self.names
        other.bits = {name: saved[f"{prefix} {name}"].cpu() for name in self.names}
        return other

    def _unpacked(self, name: str) -> Tensor:
        return unpack(self.bits[name].to(self.device), self.shapes[name])
