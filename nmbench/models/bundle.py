"""A model as pruning sees it: decoder blocks, their prunable layers, and what was left out and why.

Where blocks and prunable weights are is the matter of `nmbench.models.discovery`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nmbench.errors import NMBenchError
from nmbench.models.discovery import Anatomy, Weight, anatomy_of
from nmbench.models.hashing import tensors_digest
from nmbench.models.offload import Streaming, unhooked
from nmbench.spec import Defaults, matches

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Layer:
    """One prunable weight, `where` it is in the model and the `module` that holds it; in the block of number `block`.

    `read` and `write` speak the canonical view `[out, in]`, groups along `in`.
    """

    where: Weight
    module: nn.Module
    block: int

    @property
    def name(self) -> str:
        return self.where.name

    @property
    def transposed(self) -> bool:
        return self.where.transposed

    @property
    def fused(self) -> bool:
        """Whether it is one of several experts in one parameter, which are no modules of their own."""
        return self.where.expert is not None

    def read(self) -> Tensor:
        """The live weight `[out, in]`, a view: do not change it."""
        return self.where.view(self.module.get_parameter(self.where.parameter).detach())

    def write(self, weight: Tensor) -> None:
        """Copy `weight` `[out, in]` into the live model."""
        self.read().copy_(weight)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.read().shape[0], self.read().shape[1])


@dataclass
class Bundle:
    """A loaded model with everything a run needs to know about it: `skipped` says what is left dense and why."""

    ref: str
    model: nn.Module
    tokenizer: Any
    blocks: dict[str, nn.Module]
    layers: dict[str, Layer]
    skipped: dict[str, str]
    defaults: Defaults = field(default_factory=Defaults)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    streaming: Streaming | None = None

    @classmethod
    def of(
        cls,
        ref: str,
        model: nn.Module,
        tokenizer: Any,
        defaults: Defaults | None = None,
        provenance: Mapping[str, Any] | None = None,
        anatomy: Anatomy | None = None,
    ) -> Bundle:
        """Make a bundle of `model`; its `anatomy` is derived from the module tree if the model source tells none.

        Raises `NMBenchError` if it has no decoder stack, or if a prunable weight is shared, quantised or not there.
        """
        model.eval().requires_grad_(False)
        anatomy = anatomy or anatomy_of(model, ref)
        blocks = {name: model.get_submodule(name) for name in anatomy.blocks}
        layers = layers_of(model, anatomy, ref)
        skipped = dict(anatomy.skipped)
        return cls(ref, model, tokenizer, blocks, layers, skipped, defaults or Defaults(), provenance or {})

    def without(self, globs: Iterable[str]) -> Bundle:
        """The same model with the layers that match any of `globs` left dense. Raises `NMBenchError` on no match."""
        skipped = dict(self.skipped)
        for glob in globs:
            matched = [name for name in self.layers if matches(name, glob)]
            if not matched:
                example = next(iter(self.layers))
                raise NMBenchError(f"--skip {glob!r} matches no prunable layer; layer names look like {example!r}.")
            skipped.update(dict.fromkeys(matched, f"left dense by --skip {glob}"))
        layers = {name: layer for name, layer in self.layers.items() if name not in skipped}
        if not layers:
            raise NMBenchError(f"--skip leaves no layer of {self.ref} to prune.")
        return dataclasses.replace(self, layers=layers, skipped=skipped)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.streaming.device if self.streaming else next(self.model.parameters()).device

    @property
    def host(self) -> torch.device:
        """Where large things wait: with the model, or on the host if it does not fit on the device."""
        return torch.device("cpu") if self.streaming else self.device

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape `[out, in]` of every prunable layer."""
        return {name: layer.shape for name, layer in self.layers.items()}

    def to(self, device: torch.device) -> None:
        """Move the whole model to `device`."""
        self.model.to(device)

    def stream(self, device: torch.device) -> None:
        """Keep the blocks where they are, on the host, and bring each to `device` while it works."""
        self.streaming = Streaming(self.model, self.blocks.values(), device)

    def holding(self, block: nn.Module) -> AbstractContextManager[None]:
        """While the context is open, a block is on the device."""
        return self.streaming.holding(block) if self.streaming else nullcontext()

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.layers.values())).read().dtype

    def in_dtype(self, dtype: torch.dtype) -> Bundle:
        """This bundle, or a copy of it in another dtype."""
        if dtype == self.dtype:
            return self
        model = cast_parameters(unhooked(copy.deepcopy(self.model)), dtype)
        blocks = {name: model.get_submodule(name) for name in self.blocks}
        moved = {
            n: dataclasses.replace(layer, module=model.get_submodule(layer.where.module))
            for n, layer in self.layers.items()
        }
        other = dataclasses.replace(self, model=model, blocks=blocks, layers=moved, streaming=None)
        if self.streaming:
            other.stream(self.device)
        return other

    def block_layers(self, index: int) -> list[Layer]:
        """The prunable layers of one block, in the order of the module tree."""
        return [layer for layer in self.layers.values() if layer.block == index]

    def coverage(self) -> dict[str, Any]:
        """How much of the decoder is pruned: layers, weights, and their share of all decoder parameters."""
        weights = sum(layer.read().numel() for layer in self.layers.values())
        decoder = sum(p.numel() for block in self.blocks.values() for p in block.parameters())
        return {"layers": len(self.layers), "weights": weights, "share_of_decoder": weights / decoder}

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers of the live model, also those that are not saved."""
        named = (
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        )
        return {name: tensor.detach() for name, tensor in named}

    def digest(self) -> str:
        """SHA-256 over the names, dtypes and bytes of all parameters and buffers."""
        return tensors_digest(self.tensors())


def hidden_width(bundle: Bundle) -> int:
    """The width of the hidden states: that of the first weight's inputs."""
    return next(iter(bundle.layers.values())).shape[1]


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change the dtype of a model's parameters, as loading it in that dtype would: buffers, such as the float32
    frequencies of rotary embeddings, stay as they are.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def layers_of(model: nn.Module, anatomy: Anatomy, ref: str) -> dict[str, Layer]:
    """The layers of an anatomy by name. Raises `NMBenchError` for a weight that is not there or cannot be pruned."""
    layers = {}
    for weight in anatomy.weights:
        block = [index for index, name in enumerate(anatomy.blocks) if f"{weight.module}.".startswith(f"{name}.")]
        if not block:
            raise NMBenchError(
                f"layer {weight.name} of {ref} is in none of its decoder blocks, {anatomy.blocks[0]} ..."
            )
        layers[weight.name] = Layer(weight, model.get_submodule(weight.module), block[0])
    for layer in layers.values():
        check_dtype(layer, ref)
    check_shared(model, layers)
    return layers


def check_dtype(layer: Layer, ref: str) -> None:
    """Raise `NMBenchError` if a weight is not stored as plain numbers, one each."""
    if (dtype := layer.module.get_parameter(layer.where.parameter).dtype) not in FLOATS:
        raise NMBenchError(
            f"layer {layer.name} of {ref} holds quantised weights ({dtype}); prune the checkpoint that they were made "
            f"from, in float32, bfloat16 or float16."
        )


def check_shared(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Raise `NMBenchError` if a prunable weight is at the same time another parameter of the model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel() and not parameter.is_meta:
            names.setdefault(parameter.data_ptr(), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    stored = {layer.where.stored for layer in layers.values()}
    for layer in layers.values():
        for other in names.get(layer.module.get_parameter(layer.where.parameter).data_ptr(), ()):
            owner = other.rpartition(".")[0]
            alias = modules[owner] is layer.module and other not in stored  # one module under two names
            if other != layer.where.stored and not alias:
                raise NMBenchError(f"layers {layer.where.module} and {owner} share one weight, which cannot be pruned.")
