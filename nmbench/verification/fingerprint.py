"""Whether the dense model still is what was loaded, also in what its weights do not show: code, configuration, layers.

A method that works on the live model may leave another attention, a patched forward or a lost layer behind; the next
method would then be measured on another model. So the model is shown the same tokens before the first job and after
every one. Where the losses differ it is loaded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.evaluation.losses import window_losses
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.runtime.isolation import fenced

PROBE_TOKENS = 64
NEAR = 1e-3  # relative, where a device does not promise the same bits twice
FAR = 1e-2  # relative: no rounding, on whatever device


@dataclass(frozen=True)
class Fingerprint:
    """The names of the prunable layers, and the losses float32 `[1]` of the dense model on the probe."""

    layers: tuple[str, ...]
    losses: Tensor

    def like(self, other: Fingerprint, far: float | None = None) -> bool:
        """Whether two fingerprints are of one model: equal on the CPU, as good as equal elsewhere, or up to `far`."""
        nearness = far if far is not None else 0.0 if self.losses.device.type == "cpu" else NEAR
        return self.layers == other.layers and torch.allclose(self.losses, other.losses, rtol=nearness, atol=0.0)


def probe_of(texts: Mapping[str, Tensor], window: Tensor) -> Tensor:
    """Tokens int64 `[1, n]` to look at the model with: from a test text if there is one, else from the pool."""
    text = next(iter(texts.values()), window)
    return text[:PROBE_TOKENS].clone().unsqueeze(0)


@torch.no_grad()
def fingerprint(bundle: Bundle, probe: Tensor) -> Fingerprint:
    """The fingerprint of the model as it is now."""
    with fenced():
        return Fingerprint(tuple(bundle.layers), window_losses(bundle.model, probe.to(bundle.device)))


def is_intact(bundle: Bundle, dense: DenseWeights, expected: Fingerprint, probe: Tensor, restore: bool = True) -> bool:
    """Whether the model is what it was when the run began; its dense weights are restored first, unless they are."""
    try:
        if restore:
            dense.restore()
        return expected.like(fingerprint(bundle, probe))
    except Exception:  # a model that cannot even be run is not intact, whatever it raises
        return False


def check_intact(bundle: Bundle, dense: DenseWeights, expected: Fingerprint, probe: Tensor, who: str) -> None:
    """Raise `NMBenchError` if `who` left another model behind than it was lent."""
    if not is_intact(bundle, dense, expected, probe):
        raise NMBenchError(
            f"{who} changed the model in a way that is not undone: its code, configuration, layers, dtype or the dense "
            f"weights lent; work on `task.live_weights()` only."
        )
