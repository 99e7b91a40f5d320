"""Access of a mask learner to the live weights of the model: masked weights, or weights computed at each product."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle
from nmbench.models.forward import logits_of, run_model
from nmbench.models.substitution import Provider, multiply_only, substituted

PART_WEIGHTS = 2**15  # more would wake other threads, which costs more than it gains


class LiveWeights:
    """The weights of a model while a learner works on the model; the host restores the dense weights afterwards.

    `apply` writes masked weights into the model. `provided` leaves the model dense; every layer computes with
    the weight that a function returns, so that no second tensor of the size of the model is stored. `dense`: the dense
    weights as the model stores them, which may be in 8 bits, in host memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        dense: Mapping[str, Tensor],
        probe: Tensor | None = None,
        count: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.bundle = bundle
        self.dense = dense
        self._probe = probe
        self._count = count  # called with the tokens of every forward pass of the proof
        self._fetched: dict[str, Tensor] = {}  # on the model's device; where that is the CPU, no copies

    def __getitem__(self, name: str) -> Tensor:
        """Return the live weight `[out, in]` of one layer, to be written in place.

        Raises `NMBenchError` for a weight in 8 bits, which only `apply` writes.
        """
        if self.bundle.layers[name].eight_bit:
            raise NMBenchError(f"layer {name} is stored in 8 bits; this learner writes floats: run without --weights.")
        self.bundle.open(name)
        return self.bundle.layers[name].read()

    def apply(self, masks: Mapping[str, Tensor]) -> None:
        """Set the weights of the layers in `masks` to dense where kept, and to zero elsewhere."""
        for name, mask in masks.items():
            self.bundle.open(name)
            live = self.bundle.layers[name].read()
            masked(self._kept(name, live), mask.to(live.device), live)
            self.bundle.release(live)
            self.bundle.release(self.dense[name])

    def apply_dense(self) -> None:
        """Set the weights of all layers to dense."""
        for name, layer in self.bundle.layers.items():
            self.bundle.open(name)
            live = layer.read()
            live.copy_(self._kept(name, live))

    @contextlib.contextmanager
    def provided(self, provider: Provider) -> Iterator[None]:
        """Make every prunable layer compute with `provider(name)`, `[out, in]`, called just before each product.

        The live weights are neither read nor written. A provided weight may be overwritten after the product
        of its layer. Raises `NMBenchError` if provided weights cannot stand in for those of the model.
        """
        if self.obstacle:
            raise NMBenchError(
                f"{self.obstacle}; choose a learner that writes its masks into the model, or leave it dense with "
                f"--skip."
            )
        with substituted(self.bundle, self.bundle.layers, provider):
            yield

    @functools.cached_property
    def obstacle(self) -> str | None:
        """The reason why `provided` is impossible, or None. `apply` is possible all the same.

        Nothing can stand in for the product of fused experts. Other layers are proven on the tokens `probe`, if they
        were given: the model gives the same logits if its own weights are NaN and those provided are its own.
        """
        if self.fused:
            return f"{self.fused} is one of several experts in one parameter, whose product nothing can stand in for"
        if self._probe is None:
            return None
        wanted = self._logits()
        if multiply_only(self.bundle, list(self.bundle.layers), self._logits, wanted):
            return None
        culprits = (n for n in self.bundle.layers if not multiply_only(self.bundle, [n], self._logits, wanted))
        return (
            f"{next(culprits, next(iter(self.bundle.layers)))} does more than multiply by its weight, or its weight is "
            f"read elsewhere too, so that no provided weight can stand in for it"
        )

    @torch.no_grad()
    def _logits(self) -> Tensor:
        assert self._probe is not None
        self._count(self._probe.numel())
        return logits_of(run_model(self.bundle.model, self._probe)).float()

    @property
    def fused(self) -> str | None:
        """The name of a layer that is one of several experts in one parameter; None if there is no such layer."""
        return next((name for name, layer in self.bundle.layers.items() if layer.fused), None)

    def original(self, name: str) -> Tensor:
        """Return the dense weight `[out, in]` of one layer on the device of the model; read-only.

        It is computed at every call if the model stores it in 8 bits.
        """
        return self.bundle.layers[name].numbers(self.stored(name))

    def stored(self, name: str) -> Tensor:
        """Return the dense weight `[out, in]` as the model stores it, on the device of the model; read-only."""
        if name not in self._fetched:
            self._fetched[name] = self.dense[name].to(self.bundle.device)
        return self._fetched[name]

    def _kept(self, name: str, live: Tensor) -> Tensor:
        """Return the dense weight as stored, where `live` is: a streamed block waits on the host."""
        return self.dense[name] if live.device != self.bundle.device else self.stored(name)


def masked(weight: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write `weight` into `out` where `mask` keeps, and +0.0 elsewhere; `[out, in]` each, weights finite.

    Weights may be int8. On a CPU, 0 + weight * mask in parts that fit the cache is ten times faster than `where`. The
    sum is needed: a dropped negative weight times 0 is -0.0, and 0 + -0.0 is +0.0.
    """
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    if weight.device.type != "cpu":
        torch.where(mask, weight, zero, out=out)
        return
    rows = max(1, PART_WEIGHTS // weight.shape[1])
    for w, m, o in zip(weight.split(rows), mask.view(torch.uint8).split(rows), out.split(rows), strict=True):
        torch.addcmul(zero, w, m.to(w.dtype), out=o)
