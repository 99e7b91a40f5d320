"""One decoder block, or a module inside it, with its inputs: the task of a block repair or a block-local learner.

The calibration windows are cut into batches. Each batch waits at the entry of the block twice: on the pruned path,
where all earlier blocks are as they were left, and on the dense path, where all blocks are dense.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nmbench.calibration.arguments import changed, tensors_of
from nmbench.errors import NMBenchError
from nmbench.methods import SCOPES
from nmbench.models.bundle import Bundle, Layer
from nmbench.models.hooks import hooks
from nmbench.pattern import Pattern
from nmbench.pruning.parameters import stored_tensors


class Call(Protocol):
    """The arguments with which a model calls a module for one batch of tokens, int64 `[windows, window_tokens]`."""

    @property
    def batch(self) -> Tensor: ...

    @property
    def args(self) -> tuple[Any, ...]: ...

    @property
    def kwargs(self) -> dict[str, Any]: ...

    def again(self, module: Callable[..., Any], keep: bool = False) -> Any:
        """Return what `module` makes of these arguments; `keep`: the model goes on with this result."""
        ...


@dataclass(frozen=True)
class InnerCall:
    """A call of a module inside a block; the tensors come to `device`."""

    batch: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device

    def again(self, module: Callable[..., Any], keep: bool = False) -> Any:
        args, kwargs = changed((self.args, self.kwargs), lambda tensor: tensor.to(self.device))
        return module(*args, **kwargs)


@dataclass
class Tally:
    """Tokens through blocks; the tokens of a part count as its share of all prunable weights of the model."""

    weights: int
    forward: float = 0.0
    backward: float = 0.0


@dataclass
class Part:
    """A module whose prunable weights are trained together: a decoder block, or a module inside it.

    `name`: of the module in the model. `layers`: name -> layer. `calls` and `dense_calls`: the batches on the pruned
    and on the dense path; `dense_calls` is empty if the method does not ask for that path. `dense_module` is a dense
    copy of `module`. `host`: where inputs of inner parts wait.
    """

    name: str
    module: nn.Module
    dense_module: nn.Module
    layers: Mapping[str, Layer]
    calls: Sequence[Call]
    dense_calls: Sequence[Call]
    tally: Tally
    host: torch.device

    @property
    def batches(self) -> int:
        """The number of batches."""
        return len(self.calls)

    def tokens(self, number: int) -> Tensor:
        """Return the tokens of a batch, int64 `[windows, window_tokens]`."""
        return self.calls[number].batch

    def outputs(self, number: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the outputs of batch `number` on the pruned path, `[windows, window_tokens, width]`.

        `weights`: layer name -> weight `[out, in]`, or name of another parameter -> tensor, of any float dtype, in
        place of the live ones; the outputs have gradients with respect to those that require them.
        """
        self.count(number, 1, 0)
        output = hidden_of(self.calls[number].again(self.substituted(weights or {})), self.tokens(number))
        if output.requires_grad:
            output.register_hook(lambda gradient: self.count(number, 0, 1))
        return output

    def count(self, number: int, forward: int = 1, backward: int = 1) -> None:
        """Count passes of a batch through the part, as a share of the model; `outputs` counts its own."""
        tokens = self.tokens(number).numel() * self.share
        self.tally.forward += forward * tokens
        self.tally.backward += backward * tokens

    @torch.no_grad()
    def dense_outputs(self, number: int, dense_path: bool = True) -> Tensor:
        """Return what the dense module makes of its inputs on the dense path, or on the pruned path."""
        self.count(number, 1, 0)
        if not dense_path:
            return hidden_of(self.calls[number].again(self.dense_module), self.tokens(number))
        if not self.dense_calls:
            raise NMBenchError("the dense path is not there; set `dense_path` of the method.")
        return hidden_of(self.dense_calls[number].again(self.dense_module, keep=True), self.tokens(number))

    def target(self, number: int, dense: float) -> Tensor:
        """Return the outputs to aim at: of the dense module on the pruned path (`dense` 0), on the dense path (1), or
        between.
        """
        if dense == 1:
            return self.dense_outputs(number)
        near = self.dense_outputs(number, dense_path=False)
        return near.lerp(self.dense_outputs(number), dense) if dense else near

    @cached_property
    def share(self) -> float:
        """The share of the part in all prunable weights of the model."""
        return sum(layer.read().numel() for layer in self.layers.values()) / self.tally.weights

    def substituted(self, weights: Mapping[str, Tensor]) -> Callable[..., Any]:
        """Return the forward pass of the module with `weights` in place of the live ones."""
        if not weights:
            return self.module
        tensors = stored_tensors(self.module, self.name, self.layers, weights)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.module, tensors, args, kwargs)

        return forward

    def parts(self, scope: str) -> Iterator[Part]:
        """Yield the parts of a block: itself, its modules with prunable layers, or each layer, as they are executed.

        Inputs of a later part are those after earlier parts were changed by `write`.
        Raises `NMBenchError` for another scope.
        """
        if scope == SCOPES[0]:
            yield self
        elif scope in SCOPES:
            for inner in inner_modules(self, scope):
                yield inner_part(self, inner)
        else:
            raise NMBenchError(f"scope must be {', '.join(SCOPES[:-1])} or {SCOPES[-1]}, not {scope!r}.")

    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Write trained tensors into the live module, so that parts after it see them."""
        with torch.no_grad():
            for name, tensor in stored_tensors(self.module, self.name, self.layers, weights).items():
                self.module.get_parameter(name).copy_(tensor)


@dataclass
class BlockTask(Part):
    """One decoder block to learn: a `Part`, its start, and what the host knows of it.

    `index`: number of the block, of `blocks`. `pattern`: layer name -> `Pattern`. `masks`: layer name -> bool `[out,
    in]`. `dense` and `weights`: layer name -> dense weight, and the weight of the start, which is zero off the mask;
    both where the block is. `others`: name -> live tensor of the parameters of the block that are no prunable weights.
    `generator`: the only source of randomness.
    """

    index: int = 0
    blocks: int = 1
    pattern: Mapping[str, Pattern] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=torch.Generator)
    figures: dict[str, float] = field(default_factory=dict)
    on_progress: Callable[[int, int], None] = lambda done, total: None

    def report(self, **values: float) -> None:
        """Report figures of the block; the record keeps them as a curve over blocks."""
        self.figures.update(values)

    def progress(self, done: int, total: int) -> None:
        """Report the progress inside the block."""
        self.on_progress(done, total)


def hidden_of(output: Any, batch: Tensor) -> Tensor:
    """Return the hidden states among the outputs of a module: `[windows, window_tokens, width]`, several joined.

    Outputs of another form, of experts for instance, are returned as one tensor of rows `[rows, width]`.
    """
    tensors = [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]
    hidden = [tensor for tensor in tensors if tensor.dim() == 3 and tensor.shape[:2] == batch.shape]
    if not hidden:
        return tensors[0].flatten(0, -2)
    return hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=-1)


def inner_modules(block: Part, scope: str) -> list[str]:
    """Return the names inside a block of the modules to train one by one, as the block executes them.

    For the scope module these are the direct children that hold prunable layers, for the scope layer the modules of
    the layers themselves. A module that is never called is left out, and so are layers in it.
    """
    inside = [layer.where.module.removeprefix(f"{block.name}.") for layer in block.layers.values()]
    wanted = dict.fromkeys(name.split(".")[0] if scope == "module" else name for name in inside)
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: order.append(name) if name not in order else None

    watched = [
        block.module.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in wanted
    ]
    block.count(0, 1, 0)
    with hooks(watched), torch.no_grad():
        block.calls[0].again(block.module)
    return order


def inner_part(block: Part, inner: str) -> Part:
    """Return the part `inner` of a block, with the inputs that the live block gives it now."""
    inside = f"{block.name}.{inner}"
    layers = {name: layer for name, layer in block.layers.items() if f"{layer.where.module}.".startswith(f"{inside}.")}
    catch = functools.partial(caught, inner, block.host)
    for number in range(block.batches):  # the passes that the inputs are taken from
        block.count(number, 1 + bool(block.dense_calls), 0)
    calls = [catch(block.module, call) for call in block.calls]
    dense_calls = [catch(block.dense_module, call) for call in block.dense_calls]
    module, dense = block.module.get_submodule(inner), block.dense_module.get_submodule(inner)
    return Part(inside, module, dense, layers, calls, dense_calls, block.tally, block.host)


def caught(inner: str, host: torch.device, block: nn.Module, call: Call) -> InnerCall:
    """Return the call of the module `inner` while its block computes one batch; its tensors are copies on `host`."""
    found: list[InnerCall] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own_args, own_kwargs = changed((args, kwargs), lambda tensor: tensor.to(host, copy=True))
        device = next(tensors_of((args, kwargs))).device
        found.append(InnerCall(call.batch, own_args, own_kwargs, device))

    with hooks([block.get_submodule(inner).register_forward_pre_hook(catch, with_kwargs=True)]), torch.no_grad():
        call.again(block)
    if len(found) != 1:
        raise NMBenchError(f"{inner} is called {len(found)} times by its block; train the whole block (scope=block).")
    return found[0]


def others_of(bundle: Bundle, index: int) -> dict[str, Tensor]:
    """Return the parameters of a block that are no prunable weights: name in the model -> live tensor."""
    name, block = list(bundle.blocks.items())[index]
    prunable = {layer.where.stored for layer in bundle.block_layers(index)}
    named = ((f"{name}.{inner}", parameter.detach()) for inner, parameter in block.named_parameters())
    return {full: tensor for full, tensor in named if full not in prunable}
