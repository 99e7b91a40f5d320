"""Proof that the dense model is the loaded one, in its code, configuration and layers as well as in its weights.

A method that works on the live model may leave another attention, a patched forward or a missing layer behind, and the
next method would be measured on another model. So the host computes the losses of the same tokens before the first job
and after every job. If the losses differ, the host loads the model again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nmbench.errors import ModelChanged, NMBenchError
from nmbench.evaluation.losses import window_losses
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.runtime.isolation import isolating

PROBE_TOKENS = 64
TOLERANCE = 1e-3  # relative, on devices that do not reproduce bits
LOOSE = 1e-2  # relative: more than rounding, on any device


@dataclass(frozen=True)
class Fingerprint:
    """The names of the prunable layers, and the losses float32 `[1]` of the dense model on the probe."""

    layers: tuple[str, ...]
    losses: Tensor

    def like(self, other: Fingerprint, tolerance: float | None = None) -> bool:
        """True if two fingerprints are of one model: same layers, and losses equal within a relative `tolerance`.

        The default is 0 on the CPU and `TOLERANCE` on other devices.
        """
        if tolerance is None:
            tolerance = 0.0 if self.losses.device.type == "cpu" else TOLERANCE
        return self.layers == other.layers and torch.allclose(self.losses, other.losses, rtol=tolerance, atol=0.0)


def probe_of(texts: Mapping[str, Tensor], window: Tensor) -> Tensor:
    """Return the tokens int64 `[1, n]` of a fingerprint: from the first test text if any, else from `window`."""
    text = next(iter(texts.values()), window)
    return text[:PROBE_TOKENS].clone().unsqueeze(0)


@torch.no_grad()
def fingerprint(bundle: Bundle, probe: Tensor) -> Fingerprint:
    """Return the fingerprint of the live model."""
    with isolating():
        return Fingerprint(tuple(bundle.layers), window_losses(bundle.model, probe.to(bundle.device)))


def is_intact(bundle: Bundle, dense: DenseWeights, expected: Fingerprint, probe: Tensor, restore: bool = True) -> bool:
    """True if the model has the `expected` fingerprint. If `restore`, the dense weights are restored first."""
    try:
        if restore:
            dense.restore()
        return expected.like(fingerprint(bundle, probe))
    except ModelChanged:  # its files: no method did it
        raise
    except Exception:  # any exception of the model means that it is not intact
        return False


def check_intact(bundle: Bundle, dense: DenseWeights, expected: Fingerprint, probe: Tensor, who: str) -> None:
    """Raise `NMBenchError` if the method `who` changed the model for good."""
    if not is_intact(bundle, dense, expected, probe):
        raise NMBenchError(
            f"{who} changed the model in a way that is not undone: its code, configuration, layers, dtype or dense "
            f"weights; work on `task.live_weights()` only."
        )
