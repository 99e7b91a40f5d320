"""Linear layers that take their outputs from a product which several layers may share.

q, k and v of an attention, and gate and up of an MLP, read the same tensor. One product with the rows of all their
weights needs one launch, reads the inputs once, and fills the device better than three small ones.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]  # inputs [tokens, in] -> [tokens, out]
Form = Callable[[Tensor, Tensor | None], Product]  # weight [out, in] and bias [out] or None -> their product


class SharedProduct:
    """A product that `members` layers share: the first caller computes it, each takes its columns.

    The outputs are kept until all members have asked for the same tensor object. A member that asks for another one
    gets the product of that one. The tensor must not be written to between the calls of the members.
    """

    def __init__(self, product: Product, members: int = 1) -> None:
        self.product, self.members = product, members
        self._inputs: Tensor | None = None
        self._outputs: Tensor | None = None
        self._left = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the product of inputs `[..., in]` with all rows: `[..., out]`."""
        outputs = self._outputs
        if outputs is None or self._inputs is not inputs:
            rows = self.product(inputs.reshape(-1, inputs.shape[-1]))  # [tokens, out]
            outputs = rows.view(*inputs.shape[:-1], rows.shape[-1])
            self._inputs, self._outputs, self._left = inputs, outputs, self.members
        self._left -= 1
        if self._left == 0:
            self._inputs = self._outputs = None
        return outputs


class ProductLinear(nn.Module):
    """A linear layer in place of `nn.Linear`: columns `start` to `start + out_features` of a shared product.

    For inference only: no gradient passes through.
    """

    def __init__(self, shared: SharedProduct, start: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shared, self.start = shared, start
        self.out_features, self.in_features = shape

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs `[..., out]` for inputs `[..., in]`: a view of the shared product."""
        return self.shared(x)[..., self.start : self.start + self.out_features]

    def extra_repr(self) -> str:
        """Return the shape for the printed model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, members={self.shared.members}"


def shared_inputs(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[list[str]]:
    """Return the names of `layers` in groups that read one input, as observed while `run` runs the model once.

    Layers are in one group if they get the same tensor object one directly after the other. Layers that `run` does not
    reach, or reaches more than once, stand alone.
    """
    seen: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, options: seen.append((name, args[0] if args else options["input"]))

    hooks = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return grouped(list(layers), seen)


def grouped(names: Sequence[str], seen: Sequence[tuple[str, Tensor]]) -> list[list[str]]:
    """Return `names` in groups of neighbours in `seen` that have the same tensor; others are groups of their own."""
    calls = Counter(name for name, _ in seen)
    groups: list[list[str]] = []
    before: Tensor | None = None
    for name, tensor in seen:
        if calls[name] == 1 and before is tensor:
            groups[-1].append(name)
        elif calls[name] == 1:
            groups.append([name])
        before = tensor if calls[name] == 1 else None
    return groups + [[name] for name in names if calls[name] != 1]


def install(model: nn.Module, names: Sequence[str], weights: Sequence[Tensor], form: Form) -> SharedProduct:
    """Put one product of `weights` in place of the `nn.Linear` layers `names`, which read one input; return it."""
    layers = [cast(nn.Linear, model.get_submodule(name)) for name in names]
    product = form(joined(weights), joined_bias(layers))
    shared, start = SharedProduct(product, len(names)), 0
    for name, weight in zip(names, weights, strict=True):
        model.set_submodule(name, ProductLinear(shared, start, (weight.shape[0], weight.shape[1])))
        start += weight.shape[0]
    return shared


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Return the rows of all weights `[out, in]` below each other; a single weight as it is."""
    return weights[0].contiguous() if len(weights) == 1 else torch.cat(list(weights))


def joined_bias(layers: Sequence[nn.Linear]) -> Tensor | None:
    """Return the biases of layers one after the other, zeros for those without one; None if none has."""
    if all(layer.bias is None for layer in layers):
        return None
    biases: list[Tensor | None] = [layer.bias for layer in layers]
    zeros = [layer.weight.new_zeros(layer.out_features) for layer in layers]
    return torch.cat([zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)]).detach()


@contextlib.contextmanager
def multiplying(
    model: nn.Module, groups: Sequence[Sequence[str]], form: Form, weight: Callable[[str], Tensor]
) -> Iterator[list[SharedProduct]]:
    """In the context, the layers of `groups` multiply by `form`; yields one product per group.

    `weight` returns the weight `[out, in]` of a layer to multiply by. The layers are put back afterwards, so the
    weights exist in both forms in the context.
    """
    before = {name: model.get_submodule(name) for group in groups for name in group}
    try:
        yield [install(model, group, [weight(name) for name in group], form) for group in groups]
    finally:
        for name, layer in before.items():
            model.set_submodule(name, layer)
