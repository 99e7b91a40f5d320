"""A loaded model for pruning: its decoder blocks, their prunable layers, and the weights left dense with the reason.

`nmbench.models.discovery` finds the blocks and the prunable weights.
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
from nmbench.models.casting import cast_parameters
from nmbench.models.context import context_tokens
from nmbench.models.coverage import weights_by_kind, weights_by_reason
from nmbench.models.discovery import Anatomy, Weight, anatomy_of
from nmbench.models.disk import Disk
from nmbench.models.eight_bit import EightBit, numbers
from nmbench.models.hashing import tensors_digest
from nmbench.models.offload import Streaming, unhooked
from nmbench.models.routers import list_of
from nmbench.spec import Defaults, matches

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Layer:
    """One prunable weight: its place `where` in the model, the `module` that holds it, and the index of its `block`.

    `listed`: it is in a list of modules inside its block, as experts that are modules of their own. `read` and `write`
    use the canonical view `[out, in]`, groups along `in`. A weight that is stored in 8 bits
    (`nmbench.models.eight_bit`) is read and written as int8; `values` are the numbers that it stands for.
    """

    where: Weight
    module: nn.Module
    block: int
    listed: bool = False

    @property
    def name(self) -> str:
        return self.where.name

    @property
    def transposed(self) -> bool:
        return self.where.transposed

    @property
    def fused(self) -> bool:
        """True if the weight is one of several experts in one parameter, without a module of its own."""
        return self.where.expert is not None

    @property
    def eight_bit(self) -> bool:
        """True if the weight is stored in 8 bits."""
        return isinstance(self.module, EightBit)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype that the weight has in the product."""
        return self.module.weight_scale.dtype if isinstance(self.module, EightBit) else self.read().dtype

    def read(self) -> Tensor:
        """Return the live weight `[out, in]` as stored, as a view. Read only: change weights by `write`."""
        return self.where.view(self.module.get_parameter(self.where.parameter).detach())

    def write(self, weight: Tensor) -> None:
        """Copy `weight` `[out, in]` into the live model. Raises `NMBenchError` for floats in place of 8-bit values."""
        if self.eight_bit and weight.dtype != torch.int8:
            raise NMBenchError(
                f"layer {self.name} is stored in 8 bits, which {weight.dtype} weights do not fit; without --weights "
                f"int8 they do."
            )
        self.read().copy_(weight)

    def values(self, out: Tensor | None = None) -> Tensor:
        """Return the live weight `[out, in]` in `dtype`: a view; of an 8-bit weight a copy, in `out` if given."""
        return self.numbers(self.read(), out)

    def numbers(self, stored: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the weight that `stored` `[out, in]` stands for if the layer stores it, on the device of `stored`."""
        if not isinstance(self.module, EightBit):
            return stored
        return numbers(stored, self.module.weight_scale.detach().to(stored.device), out)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.read().shape[0], self.read().shape[1])


@dataclass
class Bundle:
    """A loaded model and all that a run needs to know of it. `skipped`: parameters left dense -> reason."""

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
        """Return the bundle of `model`; without an `anatomy` of the model source, derive it from the module tree.

        Raises `NMBenchError` if the model has no decoder stack, or if a prunable weight is quantised or outside the
        decoder blocks.
        """
        model.eval().requires_grad_(False)
        anatomy = anatomy or anatomy_of(model, ref)
        blocks = {name: model.get_submodule(name) for name in anatomy.blocks}
        layers = layers_of(model, anatomy, ref)
        skipped = dict(anatomy.skipped)
        return cls(ref, model, tokenizer, blocks, layers, skipped, defaults or Defaults(), provenance or {})

    def without(self, globs: Iterable[str]) -> Bundle:
        """Return a bundle of the same model that leaves the layers matching any of `globs` dense.

        Raises `NMBenchError` for a glob without a match, and if no layer remains to be pruned.
        """
        left: dict[str, str] = {}
        for glob in globs:
            matched = [name for name in self.layers if matches(name, glob)]
            if not matched:
                example = next(iter(self.layers))
                raise NMBenchError(f"--skip {glob!r} matches no prunable layer; layer names look like {example!r}.")
            left.update(dict.fromkeys(matched, f"left dense by --skip {glob}"))
        if len(left) == len(self.layers):
            raise NMBenchError(f"--skip leaves no layer of {self.ref} to prune.")
        return self.leaving(left)

    def leaving(self, reasons: Mapping[str, str]) -> Bundle:
        """Return a bundle of the same model that leaves layers dense: layer name -> reason. Other names are ignored."""
        left = {name: reason for name, reason in reasons.items() if name in self.layers}
        layers = {name: layer for name, layer in self.layers.items() if name not in left}
        return dataclasses.replace(self, layers=layers, skipped={**self.skipped, **left})

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return self.streaming.device if self.streaming else next(self.model.parameters()).device

    @property
    def host(self) -> torch.device:
        """The device that stores large tensors: the model's own, or the CPU if blocks are offloaded."""
        return torch.device("cpu") if self.streaming else self.device

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape `[out, in]` of every prunable layer."""
        return {name: layer.shape for name, layer in self.layers.items()}

    def to(self, device: torch.device) -> None:
        """Move the whole model to `device`."""
        self.model.to(device)

    def stream(self, device: torch.device, from_disk: bool = False) -> None:
        """Offload the blocks: they stay on the host, and each is copied to `device` for its own forward pass.

        If `from_disk`, the host reads them from files whenever they are wanted, and needs memory for a few of them.
        """
        self.streaming = Streaming(self.model, self.blocks.values(), device, from_disk)

    def holding(self, block: nn.Module, undo: bool = False) -> AbstractContextManager[None]:
        """Keep a block on the device while the context is open. If blocks are streamed, `undo` restores its weights."""
        return self.streaming.holding(block, undo) if self.streaming else nullcontext()

    @property
    def disk(self) -> Disk | None:
        """The files of the blocks, if they are streamed from disk."""
        return self.streaming.disk if self.streaming else None

    def open(self, name: str) -> None:
        """Let the live weights of the block that holds a layer or parameter be written to, wherever they are."""
        if self.disk and self.streaming:
            for block in (block for prefix, block in self.blocks.items() if name.startswith(f"{prefix}.")):
                self.streaming.open(block)

    def release(self, tensor: Tensor) -> None:
        """Give back the host memory of a weight that was read and is on disk; other tensors stay as they are."""
        if self.disk:
            self.disk.release(tensor)

    @property
    def context_tokens(self) -> int | None:
        """The most tokens that the model can read at once; None if nothing limits it."""
        return context_tokens(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype that the weights have in products."""
        return next(iter(self.layers.values())).dtype

    def in_dtype(self, dtype: torch.dtype) -> Bundle:
        """Return this bundle if it has `dtype`, else a copy with parameters of `dtype`."""
        if dtype == self.dtype:
            return self
        if self.disk:
            raise NMBenchError(
                f"{self.ref} is streamed from disk in {self.dtype} and cannot be copied in {dtype}; leave --eval-dtype "
                f"out, or give --stream alone."
            )
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
        """Return the prunable layers of one block, in the order of the module tree."""
        return [layer for layer in self.layers.values() if layer.block == index]

    def coverage(self) -> dict[str, Any]:
        """Return the numbers of prunable layers and weights, their share in all decoder parameters, and their kinds.

        `kinds`: attention, mlp, experts or other -> number of weights.
        """
        sizes = {name: layer.read().numel() for name, layer in self.layers.items()}
        weights = sum(sizes.values())
        scales = sum(layer.shape[0] for layer in self.layers.values() if layer.eight_bit)
        decoder = sum(p.numel() for block in self.blocks.values() for p in block.parameters()) - scales
        return {
            "layers": len(self.layers),
            "weights": weights,
            "share_of_decoder": weights / decoder,
            "kinds": weights_by_kind(sizes.items()),
        }

    def left_dense(self) -> dict[str, int]:
        """Return the numbers of weights in other matrices of the decoder blocks, by the reason why they stay dense."""
        return weights_by_reason(self.blocks, self.skipped)

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers of the live model by name, non-persistent buffers included."""
        named = (
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        )
        return {name: tensor.detach() for name, tensor in named}

    def digest(self) -> str:
        """Return the SHA-256 over the names, dtypes and bytes of all parameters and buffers."""
        return tensors_digest(self.tensors(), done=self.release)


def hidden_width(bundle: Bundle) -> int:
    """Return the width of the hidden states: the number of inputs of the first prunable layer."""
    return next(iter(bundle.layers.values())).shape[1]


def layers_of(model: nn.Module, anatomy: Anatomy, ref: str) -> dict[str, Layer]:
    """Return the layers of an anatomy by name.

    Raises `NMBenchError` for a weight outside the decoder blocks, and for one that is quantised.
    """
    layers = {}
    for weight in anatomy.weights:
        block = [index for index, name in enumerate(anatomy.blocks) if f"{weight.module}.".startswith(f"{name}.")]
        if not block:
            raise NMBenchError(
                f"layer {weight.name} of {ref} is in none of its decoder blocks, {anatomy.blocks[0]} ..."
            )
        place = anatomy.blocks[block[0]]
        listed = list_of(model.get_submodule(place), weight.module.removeprefix(place).removeprefix(".")) is not None
        layers[weight.name] = Layer(weight, model.get_submodule(weight.module), block[0], listed)
    for layer in layers.values():
        check_dtype(layer, ref)
    return layers


def check_dtype(layer: Layer, ref: str) -> None:
    """Raise `NMBenchError` if the parameter of a layer is not of a floating-point dtype, as a quantised one is not."""
    if (dtype := layer.module.get_parameter(layer.where.parameter).dtype) not in FLOATS:
        raise NMBenchError(
            f"layer {layer.name} of {ref} holds quantised weights ({dtype}); prune the checkpoint that they were made "
            f"from, in float32, bfloat16 or float16."
        )
