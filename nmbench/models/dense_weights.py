"""A copy of all dense weights, from which the model is restored: in host memory, or on disk where blocks are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from nmbench.models.bundle import Bundle, Layer


class DenseWeights:
    """A copy of all dense weights in host memory, so that every method starts from the same model.

    Blocks that are streamed from disk have no copy: nothing writes to the files of their dense weights.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        parameters = dict(bundle.model.named_parameters(remove_duplicate=False)) if bundle.disk else {}
        dense = bundle.disk.dense if bundle.disk else {}
        self.on_disk = {name: dense[id(it)] for name, it in parameters.items() if id(it) in dense}
        rest = {name: tensor for name, tensor in bundle.tensors().items() if name not in self.on_disk}
        self.copies = {**self.on_disk, **{name: tensor.to("cpu", copy=True) for name, tensor in rest.items()}}
        self.hooks = [(table, dict(table)) for table in hook_tables(bundle.model)]
        self.digest = bundle.digest()

    def restore(self) -> None:
        """Write the dense weights back and assert that the model has its first hash again; else nmbench has a bug.

        Raises `ModelChanged` if weights are streamed from a file that is no longer what it was.
        """
        self.put_back()
        if self.bundle.disk:
            self.bundle.disk.maps.check_unchanged()
        if self.bundle.digest() != self.digest:
            raise AssertionError(f"the dense weights of {self.bundle.ref} could not be restored: their hash differs.")

    def put_back(self) -> None:
        """Write the dense weights back without the hash; undo training mode, gradients and hooks.

        Hashing reads the whole model. Steps inside a job use this method; the job ends in `restore`.
        """
        self.undo_hooks()
        if self.bundle.disk:
            self.bundle.disk.put_back(self.bundle.model.parameters())
        for name, tensor in self.bundle.tensors().items():
            if name not in self.on_disk:
                tensor.copy_(self.copies[name])

    def undo_hooks(self) -> None:
        """Undo changes of hooks, training mode and `requires_grad`; leave the weights alone."""
        self.bundle.model.eval().requires_grad_(False)
        for table, content in self.hooks:
            table.clear()
            table.update(content)

    def layer(self, layer: Layer) -> Tensor:
        """Return the dense weight `[out, in]` of one layer, in host memory; a copy if it is stored in 8 bits."""
        return layer.numbers(self.stored(layer))

    def stored(self, layer: Layer) -> Tensor:
        """Return the dense weight `[out, in]` of one layer as the model stores it, in host memory."""
        return layer.where.view(self.copies[layer.where.stored])


class ByLayer(Mapping[str, Tensor]):
    """Dense weights `[out, in]` by layer name; weights in 8 bits become numbers when they are read."""

    def __init__(self, weights: DenseWeights) -> None:
        self.weights, self.layers = weights, weights.bundle.layers

    def __getitem__(self, name: str) -> Tensor:
        return self.weights.layer(self.layers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def hook_tables(model: nn.Module) -> list[dict[int, Any]]:
    """Return the dictionaries in which the modules of a model keep their forward hooks and forward pre-hooks."""
    return [table for module in model.modules() for table in (module._forward_hooks, module._forward_pre_hooks)]
