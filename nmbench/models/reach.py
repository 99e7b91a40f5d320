"""The modules that a forward pass calls: a block that is never reached is an error, a layer stays dense."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle, Layer
from nmbench.models.discovery import prunable_weights
from nmbench.models.hooks import hooks
from nmbench.models.routers import LISTS, linear_layers

FEW_WEIGHTS = 0.02  # of the prunable weights that another stack may have
NEVER_CALLED = "never called in a forward pass, its inputs cannot be observed"


@contextlib.contextmanager
def noting_calls(bundle: Bundle) -> Iterator[set[int]]:
    """Collect the ids of all modules that are called while the context is open."""
    called: set[int] = set()

    def note(module: nn.Module, args: Any) -> None:
        called.add(id(module))

    with hooks(module.register_forward_pre_hook(note) for module in bundle.model.modules()):
        yield called


def check_reached(bundle: Bundle, called: set[int]) -> None:
    """Raise `NMBenchError` for a block with prunable layers, of which `called` holds no module."""
    pruned = {layer.block for layer in bundle.layers.values()}
    blocks = [(name, block) for index, (name, block) in enumerate(bundle.blocks.items()) if index in pruned]
    missed = [name for name, block in blocks if not any(id(module) in called for module in block.modules())]
    if missed:
        other = called_stack(bundle, called)
        raise NMBenchError(
            f"no token reaches block {missed[0]} of {bundle.ref} ({len(missed)} of its {len(blocks)} blocks), so that "
            f"pruning them would change nothing{f'; text runs through {other}' if other else ''}. Load the text model "
            f"alone, or name its blocks by an Anatomy of the model source."
        )


def check_no_other_stack(bundle: Bundle, called: set[int]) -> None:
    """Raise `NMBenchError` if another list of blocks is called as well, with more than a few weights.

    They would stay dense, and the figures would be those of a model that is pruned in part.
    """
    own = sum(layer.read().numel() for layer in bundle.layers.values())
    for name, stack in other_stacks(bundle):
        reached = [child for child in stack if any(id(module) in called for module in child.modules())]
        weights = sum(map(prunable_weights, reached))
        if weights > FEW_WEIGHTS * own:
            raise NMBenchError(
                f"text runs through {name} of {bundle.ref} as well ({len(reached)} blocks, {weights} weights), which "
                f"would stay dense beside the blocks {next(iter(bundle.blocks))} ...; name all blocks by an Anatomy of "
                f"the model source."
            )


def other_stacks(bundle: Bundle) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the outermost lists that hold no decoder block, are in none, and whose members have several layers."""
    blocks = {id(block) for block in bundle.blocks.values()}
    inside = {id(module) for block in bundle.blocks.values() for module in block.modules()}
    for name, stack in bundle.model.named_modules():
        if not isinstance(stack, nn.ModuleList) or id(stack) in inside:
            continue
        if not any(id(module) in blocks for module in stack.modules()):
            inside |= {id(module) for module in stack.modules()}
            if all(len(linear_layers(child)) > 1 for child in stack):
                yield name, stack


def called_stack(bundle: Bundle, called: set[int]) -> str | None:
    """Return the name of the list with the most modules that were called outside the blocks."""
    inside = {id(module) for block in bundle.blocks.values() for module in block.modules()}
    stacks = {name: module for name, module in bundle.model.named_modules() if isinstance(module, nn.ModuleList)}
    sizes = {name: sum(id(m) in called and id(m) not in inside for m in stack) for name, stack in stacks.items()}
    best = max(sizes, key=lambda name: sizes[name], default="")
    return best if sizes.get(best) else None


def never_called(bundle: Bundle, called: set[int]) -> dict[str, str]:
    """Return the layers that `called` holds no module of: name -> reason why it stays dense.

    An expert that no token was routed to is none of them, as long as another expert of its list is called. Fused
    experts have no modules of their own. Raises `NMBenchError` if no layer is left.
    """
    places = {name: place_of(bundle, layer) for name, layer in bundle.layers.items() if not layer.fused}
    reached = {places[name] for name in places if id(bundle.layers[name].module) in called}
    left = {name: NEVER_CALLED for name, place in places.items() if place not in reached}
    if len(left) == len(bundle.layers):
        raise NMBenchError(
            f"{bundle.ref} reads the weights of its layers without calling their modules, first {next(iter(left))}: "
            f"inputs cannot be observed, and nothing can be pruned."
        )
    return left


def place_of(bundle: Bundle, layer: Layer) -> tuple[str, ...]:
    """Return the path of a layer in the model, where a star stands for any member of a list inside the block."""
    name, module = list(bundle.blocks.items())[layer.block]
    path = layer.where.module.removeprefix(name).strip(".")
    places = [name]
    for part in path.split(".") if path else ():
        places.append("*" if isinstance(module, LISTS) else part)
        module = module.get_submodule(part)
    return tuple(places)
