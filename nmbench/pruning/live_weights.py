"""Access of a mask learner to the live weights of the model: masked weights, or weights computed at each product."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle, Layer
from nmbench.models.forward import logits_of, run_model
from nmbench.models.hooks import instead

PART_WEIGHTS = 2**15  # more would wake other threads, which costs more than it gains
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative, of logits
TOLERANCE_OF_HALVES = 0.02
Provider = Callable[[str], Tensor]  # layer name -> the weight [out, in] to compute with


class LiveWeights:
    """The weights of a model while a learner works on the model; the host restores the dense weights afterwards.

    `apply` writes masked weights into the model. `provided` leaves the model dense; every layer computes with
    the weight that a function returns, so that no second tensor of the size of the model is stored.
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
        """Return the live weight `[out, in]` of one layer, to be written in place."""
        self.bundle.open(name)
        return self.bundle.layers[name].read()

    def apply(self, masks: Mapping[str, Tensor]) -> None:
        """Set the weights of the layers in `masks` to dense where kept, and to zero elsewhere."""
        for name, mask in masks.items():
            live = self[name]
            streamed = live.device != self.bundle.device  # the block waits on the host
            masked(self.dense[name] if streamed else self.original(name), mask.to(live.device), live)
            self.bundle.release(live)
            self.bundle.release(self.dense[name])

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
        with self._instead(self.bundle.layers, provider):
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
        if self._replaceable(list(self.bundle.layers), wanted):
            return None
        culprits = (name for name in self.bundle.layers if not self._replaceable([name], wanted))
        return (
            f"{next(culprits, next(iter(self.bundle.layers)))} does more than multiply by its weight, or its weight is "
            f"read elsewhere too, so that no provided weight can stand in for it"
        )

    @torch.no_grad()
    def _logits(self) -> Tensor:
        assert self._probe is not None
        self._count(self._probe.numel())
        return logits_of(run_model(self.bundle.model, self._probe)).float()

    def _replaceable(self, names: Iterable[str], wanted: Tensor) -> bool:
        """True if the logits are `wanted`, to rounding, where layers compute with their weights provided."""
        names = list(names)
        weights = {name: self.bundle.layers[name].read() for name in names}
        layers = [self.bundle.layers[name] for name in names]
        with hidden(layers), self._instead(names, lambda name: weights[name].to(self.bundle.device)):
            found = self._logits()
        tolerance = TOLERANCE.get(self.bundle.dtype, TOLERANCE_OF_HALVES)
        return bool((found - wanted).norm() <= tolerance * wanted.norm())

    @contextlib.contextmanager
    def _instead(self, names: Iterable[str], provider: Provider) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in names:
                module = self.bundle.layers[name].module
                stack.enter_context(instead(module, functools.partial(_call, module, name, provider)))
            yield

    @property
    def fused(self) -> str | None:
        """The name of a layer that is one of several experts in one parameter; None if there is no such layer."""
        return next((name for name, layer in self.bundle.layers.items() if layer.fused), None)

    def original(self, name: str) -> Tensor:
        """Return the dense weight `[out, in]` of one layer on the device of the model; read-only."""
        if name not in self._fetched:
            self._fetched[name] = self.dense[name].to(self.bundle.device)
        return self._fetched[name]


@contextlib.contextmanager
def hidden(layers: Iterable[Layer]) -> Iterator[None]:
    """Show NaN instead of the weights of `layers`, without memory of their size, while the context is open."""
    saved = []
    try:
        for layer in layers:
            parameter = layer.module.get_parameter(layer.where.parameter)
            saved.append((parameter, parameter.data))
            parameter.data = parameter.data.new_full((), torch.nan).expand(parameter.shape)
        yield
    finally:
        for parameter, weight in saved:
            parameter.data = weight


def masked(weight: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write `weight` into `out` where `mask` keeps, and +0.0 elsewhere; `[out, in]` each, weights finite.

    On a CPU, 0 + weight * mask in parts that fit the cache is ten times faster than `where`. The sum is needed: a
    dropped negative weight times 0 is -0.0, and 0 + -0.0 is +0.0.
    """
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    if weight.device.type != "cpu":
        torch.where(mask, weight, zero, out=out)
        return
    rows = max(1, PART_WEIGHTS // weight.shape[1])
    for w, m, o in zip(weight.split(rows), mask.view(torch.uint8).split(rows), out.split(rows), strict=True):
        torch.addcmul(zero, w, m.to(w.dtype), out=o)


def _call(module: nn.Module, name: str, provider: Provider, input: Tensor) -> Tensor:
    """Return the output of a linear layer with the provided weight; the layer may store its weight transposed."""
    return F.linear(input, provider(name), getattr(module, "bias", None))
