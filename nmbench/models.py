"""A model as pruning sees it: decoder blocks, their prunable layers, and what was left out and why.

Nothing here knows an architecture by name. The decoder stack is the outermost `ModuleList` that holds the most weights
in linear layers; the prunable layers are the linear layers inside it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nmbench.errors import NMBenchError, NumericalFailure, RunMismatch
from nmbench.spec import Defaults, matches


@dataclass(frozen=True)
class Layer:
    """One prunable weight. `read` and `write` speak the canonical view `[out, in]`, groups along `in`."""

    name: str
    module: nn.Module
    block: int

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)  # stores [in, out]

    def read(self) -> Tensor:
        """The live weight `[out, in]`, a view: do not change it."""
        weight = self.module.get_parameter("weight").detach()
        return weight.t() if self.transposed else weight

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

    @classmethod
    def of(
        cls,
        ref: str,
        model: nn.Module,
        tokenizer: Any,
        defaults: Defaults | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Bundle:
        """Find blocks and layers of `model`. Raises `NMBenchError` if it has no decoder stack with linear layers."""
        model.eval().requires_grad_(False)
        blocks = find_blocks(model, ref)
        layers, skipped = find_layers(model, blocks)
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
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.layers.values())).read().dtype

    def in_dtype(self, dtype: torch.dtype) -> Bundle:
        """This bundle, or a copy of it in another dtype."""
        if dtype == self.dtype:
            return self
        model = cast_parameters(copy.deepcopy(self.model), dtype)
        blocks = {name: model.get_submodule(name) for name in self.blocks}
        moved = {n: dataclasses.replace(layer, module=model.get_submodule(n)) for n, layer in self.layers.items()}
        return dataclasses.replace(self, model=model, blocks=blocks, layers=moved)

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

    def check_finite(self) -> None:
        """Raise `NumericalFailure` naming the first layer with a NaN or infinite weight."""
        for name, layer in self.layers.items():
            if not layer.read().isfinite().all():
                raise NumericalFailure(f"layer {name} of {self.ref} holds NaN or infinite weights; nothing was pruned.")


class DenseWeights:
    """A copy of all dense weights in host memory: promises that every method starts from the same model."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.copies = {name: tensor.to("cpu", copy=True) for name, tensor in bundle.tensors().items()}
        self.hooks = [(table, dict(table)) for table in hook_tables(bundle.model)]
        self.digest = bundle.digest()

    def restore(self) -> None:
        """Put the dense weights back and prove it by hash; training mode, gradients and hooks are undone as well.

        Raises `RunMismatch` if that fails.
        """
        self.bundle.model.eval().requires_grad_(False)
        for table, content in self.hooks:
            table.clear()
            table.update(content)
        for name, tensor in self.bundle.tensors().items():
            tensor.copy_(self.copies[name])
        if self.bundle.digest() != self.digest:
            raise RunMismatch(
                f"the dense weights of {self.bundle.ref} could not be restored; this is a bug of nmbench."
            )

    def layer(self, layer: Layer) -> Tensor:
        """The dense weight of one layer, `[out, in]`, in host memory."""
        stored = self.copies[f"{layer.name}.weight"]
        return stored.t() if layer.transposed else stored


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change the dtype of a model's parameters, as loading it in that dtype would: buffers, such as the float32
    frequencies of rotary embeddings, stay as they are.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def hook_tables(model: nn.Module) -> list[dict[int, Any]]:
    """Where the modules of a model keep their forward hooks."""
    return [table for module in model.modules() for table in (module._forward_hooks, module._forward_pre_hooks)]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def find_blocks(model: nn.Module, ref: str) -> dict[str, nn.Module]:
    """The decoder blocks by name: the outermost `ModuleList` with the most weights in linear layers."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    sizes = {name: linear_weights(module) for name, module in stacks.items()}
    if not any(sizes.values()):
        raise NMBenchError(f"model {ref} has no stack of decoder blocks with linear layers: nothing to prune.")
    best = max(sizes, key=lambda name: sizes[name])  # the first of equals: the outer one of two nested lists
    return {f"{best}.{child}": block for child, block in stacks[best].named_children()}


def linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, Conv1D)))


def find_layers(model: nn.Module, blocks: Mapping[str, nn.Module]) -> tuple[dict[str, Layer], dict[str, str]]:
    """The prunable layers by name, and every other matrix of the model with the reason why it is left dense."""
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    owners: dict[int, str] = {}
    for index, (block_name, block) in enumerate(blocks.items()):
        for name, module in named_below(block_name, block):
            if isinstance(module, (nn.Linear, Conv1D)):
                first = owners.setdefault(id(module.weight), name)
                if first != name:
                    raise NMBenchError(f"layers {first} and {name} share one weight, which cannot be pruned twice.")
                layers[name] = Layer(name, module, index)
            else:
                skipped.update(matrices(name, module, "not a linear layer"))
    inside = tuple(f"{name}." for name in blocks)
    for name, module in model.named_modules():
        if not f"{name}.".startswith(inside):
            skipped.update(matrices(name, module, "outside the decoder blocks"))
    return layers, skipped


def named_below(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_modules():
        yield (f"{prefix}.{name}" if name else prefix), child


def matrices(name: str, module: nn.Module, reason: str) -> dict[str, str]:
    """The parameters of at least two dimensions that a module holds itself, each with the reason given."""
    own = module.named_parameters(recurse=False)
    return {f"{name}.{p}": f"{reason} {tuple(value.shape)}" for p, value in own if value.dim() >= 2}
