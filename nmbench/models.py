"""A model as pruning sees it: decoder blocks, their prunable layers, and what was left out and why.

Where blocks and prunable weights are is the matter of `nmbench.anatomy`.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nmbench.anatomy import Anatomy, Weight, anatomy_of
from nmbench.errors import NMBenchError, RunMismatch
from nmbench.spec import Defaults, matches
from nmbench.streaming import Streaming, unhooked

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PART_BYTES = 2**25  # that one thread hashes; another number makes other digests
MOST_HASHERS = 8  # threads


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


class DenseWeights:
    """A copy of all dense weights in host memory: promises that every method starts from the same model."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.copies = {name: tensor.to("cpu", copy=True) for name, tensor in bundle.tensors().items()}
        self.hooks = [(table, dict(table)) for table in hook_tables(bundle.model)]
        self.digest = bundle.digest()

    def restore(self) -> None:
        """Put the dense weights back and prove it by hash. Raises `RunMismatch` if that fails."""
        self.put_back()
        if self.bundle.digest() != self.digest:
            raise RunMismatch(
                f"the dense weights of {self.bundle.ref} could not be restored; this is a bug of nmbench."
            )

    def put_back(self) -> None:
        """The same without the proof, which reads the whole model; training mode, gradients and hooks are undone too.

        For steps inside a job, at the end of which `restore` proves it.
        """
        self.undo_hooks()
        for name, tensor in self.bundle.tensors().items():
            tensor.copy_(self.copies[name])

    def undo_hooks(self) -> None:
        """Undo hooks, training mode and gradients, and leave the weights alone."""
        self.bundle.model.eval().requires_grad_(False)
        for table, content in self.hooks:
            table.clear()
            table.update(content)

    def layer(self, layer: Layer) -> Tensor:
        """The dense weight of one layer, `[out, in]`, in host memory."""
        return layer.where.view(self.copies[layer.where.stored])


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
    """SHA-256 over the names, dtypes and shapes of tensors, and the SHA-256 of every `PART_BYTES` of their bytes."""
    total = hashlib.sha256()
    parts = parts_of(tensors)
    threads = min(MOST_HASHERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        while some := list(itertools.islice(parts, 4 * threads)):  # whoever interrupts does not wait for all
            digests = pool.map(part_digest, (part for _, part in some))
            for (title, _), digest in zip(some, digests, strict=True):
                total.update(title.encode())
                total.update(digest)
    return total.hexdigest()


def parts_of(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The bytes of tensors, sorted by name, in parts; the first part of each comes with what it is."""
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        tensor = tensor if tensor.is_contiguous() else tensor.cpu().contiguous()
        title = f"{name} {tensor.dtype} {tuple(tensor.shape)};"
        for part in tensor.reshape(-1).view(torch.uint8).split(PART_BYTES):
            yield title, part
            title = ""


def part_digest(numbers: Tensor) -> bytes:
    return hashlib.sha256(numbers.cpu().numpy().data).digest()


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
