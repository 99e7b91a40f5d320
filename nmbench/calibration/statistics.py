"""Sums up the inputs of one layer, batch by batch; in float32, whatever the dtype of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmbench.calibration.finite import ONE_BY_ONE, Checks
from nmbench.calibration.gram import add_gram, add_squares
from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.methods import LayerStats, Stat


@dataclass(frozen=True)
class Skip:
    """Leaves out the first `tokens` of every window of `window_tokens`."""

    tokens: int = 0
    window_tokens: int = 1

    def rows(self, values: Tensor) -> Tensor:
        """Values `[..., width]` of whole windows as `[tokens, width]`. Raises `NMBenchError` for others."""
        width = values.shape[-1]
        if self.tokens:
            if values.numel() % (self.window_tokens * width):
                raise unplaced()
            values = values.reshape(-1, self.window_tokens, width)[:, self.tokens :]
        return values.detach().reshape(-1, width)


def unplaced() -> NMBenchError:
    return NMBenchError(
        "a layer is not given all tokens (a mixture of experts?), so it cannot skip the first of every window; choose "
        "a method, or options, that skip no tokens (skip_tokens=0)."
    )


class Gatherer:
    """Statistics of one layer `shape` `[out, in]`, summed up over the inputs of every batch.

    Where `needs` ask for the dense model, `add_dense` comes before `add`. If the layer is `tapped`, `add_stream` comes
    after `add`.
    """

    def __init__(
        self, needs: Stat, shape: tuple[int, int], device: torch.device, tapped: bool = False, skip: Skip | None = None
    ) -> None:
        outputs, inputs = shape
        self.skip = skip or Skip()
        self.tokens = 0
        self.squares = torch.zeros(inputs, device=device) if Stat.INPUT_NORM in needs else None
        self.gram = torch.zeros(inputs, inputs, device=device) if Stat.GRAM in needs else None
        self.drift = torch.zeros(inputs, inputs, device=device) if Stat.DRIFT in needs else None
        self.lag = torch.zeros(outputs, inputs, device=device) if Stat.LAG in needs and tapped else None
        self.latest = torch.zeros(0, inputs)  # inputs
        self.dense: list[Tensor] = []  # inputs in the dense model, until their counterpart comes
        self.dense_stream: list[Tensor] = []

    @property
    def sums(self) -> list[Tensor]:
        """The sums over tokens, of those statistics that are needed."""
        return [one for one in (self.squares, self.gram, self.drift, self.lag) if one is not None]

    def add(self, inputs: Tensor) -> None:
        x = self.skip.rows(inputs)
        self.tokens += len(x)
        if self.squares is not None:
            add_squares(self.squares, x)
        if self.gram is not None:
            add_gram(self.gram, x)
        if self.drift is not None:
            self.drift.addmm_(self.difference(self.dense, x).t(), x.float())
        if self.lag is not None:
            self.latest = inputs.detach()

    def add_dense(self, inputs: Tensor) -> None:
        """Note the inputs of the layer in the dense model; the next `add` brings the counterpart."""
        if self.drift is not None:
            self.dense.append(inputs.detach())

    def add_stream(self, stream: Tensor) -> None:
        """Take the residual stream that the layer wrote into, given the latest inputs."""
        assert self.lag is not None
        s = self.skip.rows(stream)
        self.lag.addmm_(self.difference(self.dense_stream, s).t(), self.skip.rows(self.latest).float())

    def add_dense_stream(self, stream: Tensor) -> None:
        """Note the residual stream of the dense model; the next `add_stream` brings the counterpart."""
        self.dense_stream.append(stream.detach().clone())  # the block may go on to work in place

    def difference(self, dense: list[Tensor], x: Tensor) -> Tensor:
        """The same tokens in the dense model less `x`, in float32. Raises `NMBenchError` if it has others."""
        y = self.skip.rows(dense.pop(0)) if dense else x[:0]
        if y.shape != x.shape:
            raise NMBenchError(
                f"a layer is given {len(x)} tokens where it is given {len(y)} in the dense model (a mixture of "
                f"experts?), so there is no drift of its inputs; choose a method, or options, that do not need it."
            )
        return y.float() - x.float()

    def finish(self, windows: int, name: str, checks: Checks = ONE_BY_ONE) -> LayerStats:
        """Scale the sums in place, once. Raises `NumericalFailure` for inputs not finite, `NMBenchError` for none."""
        if not self.tokens:
            raise NMBenchError(
                f"no calibration token reached layer {name}; give more --windows, or leave it dense with "
                f"--skip {name!r}."
            )
        if self.skip.tokens and self.tokens != windows * (self.skip.window_tokens - self.skip.tokens):
            raise unplaced()
        message = f"the inputs of layer {name} hold NaN or infinite values during calibration."
        norm = None if self.squares is None else (self.squares / windows).sqrt()
        gram, drift, lag = (None if s is None else s.mul_(2.0 / windows) for s in (self.gram, self.drift, self.lag))
        checked = [
            None if statistic is None else checks.made_finite(statistic, lambda: NumericalFailure(message))
            for statistic in (norm, gram, drift, lag)
        ]
        return LayerStats(windows, self.tokens, *checked)
