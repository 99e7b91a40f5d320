"""The relative output error of every pruned layer by itself: `layers:<data set>@<window>`.

Windows as in `ppl:`, with `+bos` too. X are the inputs of a layer in the dense model, over all tokens of all windows,
BOS tokens too, W its dense and V its pruned weight, bias left out:

    error of a layer = || X V^T - X W^T ||_F / || X W^T ||_F

(the square root of the objective of the layer-wise methods, SparseGPT arXiv 2301.00774 eq. 1, made relative). Inputs
are those of the dense model, so that the error of a layer does not contain the errors of the layers before it. Products
are in float32, sums over tokens in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import nmbench

if TYPE_CHECKING:
    from torch import Tensor, nn

UNIT = "relative to the dense output"


@dataclass(frozen=True)
class LayerErrors(nmbench.WindowMetric):
    """Relative output error of each layer on the dense model's inputs: the mean over layers, and the worst layer."""

    word: ClassVar[str] = "layers"
    takes_bos: ClassVar[bool] = True

    def measure(self, subject: nmbench.Subject, dense: nmbench.DenseSubject) -> Mapping[str, nmbench.Value]:
        errors = self.errors(subject, dense)
        worst = max(errors, key=lambda name: errors[name])
        where = worst if errors[worst] else ""  # no layer of the dense model is the worst
        mean = sum(errors.values()) / len(errors)
        return {
            self.full_name: nmbench.Value(mean, len(errors), unit=UNIT, detail=errors),
            f"{self.full_name} worst": nmbench.Value(errors[worst], len(errors), unit=UNIT, where=where),
        }

    def errors(self, subject: nmbench.Subject, dense: nmbench.DenseSubject) -> dict[str, float]:
        """Return the relative output error of every layer that is a separate linear module, by layer name.

        Raises `NumericalFailure` naming the first layer whose error is NaN or infinite.
        """
        import torch

        layers = separate_layers(subject.bundle)
        sums = {name: Sums(layer.values()) for name, layer in layers.items()}
        for tokens in subject.batches(self.dataset, self.window, self.bos):
            with counting_inputs(layers, sums), dense.shown() as model, torch.no_grad():
                model(input_ids=tokens, use_cache=False)
        errors = {name: total.relative() for name, total in sums.items()}
        if broken := [name for name, error in errors.items() if not 0 <= error < math.inf]:
            raise nmbench.NumericalFailure(f"the output error of {broken[0]} on {self.argument} is NaN or infinite.")
        return errors


def separate_layers(bundle: nmbench.Bundle) -> dict[str, Any]:
    """Return the layers that are separate linear modules, by name.

    Experts that share one parameter are not separate modules and are left out. Raises `NMBenchError` if no layer
    remains.
    """
    modules = dict(bundle.model.named_modules())
    layers = {name: layer for name, layer in bundle.layers.items() if modules.get(name) is layer.module}
    if not layers:
        raise nmbench.NMBenchError(
            f"{bundle.ref} has no pruned layer that is a separate module, whose inputs a hook can read."
        )
    return layers


class Sums:
    """Sums of squares over outputs of one layer: the error of `pruned` `[out, in]`, and the dense outputs."""

    def __init__(self, pruned: Tensor) -> None:
        self.pruned = pruned
        self.error: Tensor | float = 0.0
        self.dense: Tensor | float = 0.0

    def add(self, inputs: Tensor, weight: Tensor) -> None:
        """Add inputs `[..., in]` of the layer with its dense weight `[out, in]`. The host does not wait for a GPU."""
        import torch
        import torch.nn.functional as F

        inputs, weight = inputs.float(), weight.float()
        change = self.pruned.to(weight.device).float() - weight
        self.error = self.error + F.linear(inputs, change).square().sum(dtype=torch.float64)
        self.dense = self.dense + F.linear(inputs, weight).square().sum(dtype=torch.float64)

    def relative(self) -> float:
        """Return the relative error: 0 if no output changed, infinite if outputs changed that were all zero."""
        error, dense = float(self.error), float(self.dense)
        return 0.0 if error == 0 else math.sqrt(error / dense) if dense else math.inf


@contextmanager
def counting_inputs(layers: Mapping[str, Any], sums: Mapping[str, Sums]) -> Iterator[None]:
    """Add the inputs of all layers to `sums` by forward hooks while the context is open.

    A hook reads the present weight of a layer, because an offloaded weight is on the device only in the forward pass.
    """
    with ExitStack() as stack:
        for name, layer in layers.items():

            def count(module: nn.Module, args: Any, layer: Any = layer, total: Sums = sums[name]) -> None:
                total.add(args[0], layer.values())

            stack.callback(layer.module.register_forward_pre_hook(count).remove)
        yield


@nmbench.hookimpl
def nmbench_register_metrics(register: nmbench.Register) -> None:
    register("layers", LayerErrors)
