"""The routers of mixtures of experts, found by their place: linear layers that score, or weigh, experts beside them.

A router has one output for each expert. It stands beside the experts, in the module that holds both or alone in a
module there; else beside the module that holds both, and so on up to the decoder block. A linear layer of one output
beside a router weighs a shared expert, and is treated as a router. Routers are small and decide which weights a token
meets, so they stay dense, as in the literature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
LISTS = (nn.ModuleList, nn.ModuleDict)


class Experts(NamedTuple):
    """The module that holds experts, and their number."""

    module: nn.Module
    number: int


def routers_of(block: nn.Module) -> set[int]:
    """Return the ids of the linear layers of a decoder block that are routers."""
    parents = {id(child): parent for parent in block.modules() for child in parent.children()}
    found: set[int] = set()
    for experts in mixtures(block):
        for level, below in levels(experts.module, parents):
            if (routers := beside(level, below, experts.number)) or has_bare_router(level, below, experts.number):
                found |= routers
                break
        else:
            found |= with_more_outputs(experts, parents)
    return found


def with_more_outputs(experts: Experts, parents: Mapping[int, nn.Module]) -> set[int]:
    """Return the ids of the lone linear layers beside experts that score more than these, such as experts of nothing.

    They have up to twice as many outputs.
    """
    for level, below in levels(experts.module, parents):
        layers = [linear_layers(child) for child in level.children() if child is not below]
        scores = range(experts.number + 1, 2 * experts.number + 1)
        return {id(found[0]) for found in layers if len(found) == 1 and outputs(found[0]) in scores}
    return set()


def levels(experts: nn.Module, parents: Mapping[int, nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the modules around `experts` up to the decoder block, each with its child that holds the experts.

    The first is the module of experts itself, unless that is a list of experts: it may hold its router.
    """
    if not isinstance(experts, LISTS):
        yield experts, experts
    while (level := parents.get(id(experts))) is not None:
        yield level, experts
        experts = level


def mixtures(block: nn.Module) -> Iterator[Experts]:
    """Yield the experts in a block: equal modules in a list or dictionary, or parameters that hold one matrix each."""
    for module in block.modules():
        members = list(module.children())
        if isinstance(module, LISTS) and len(members) > 1 and alike(members):
            yield Experts(module, len(members))
        elif count := stacked(module):
            yield Experts(module, count)


def alike(members: list[nn.Module]) -> bool:
    """True if modules are of one type and hold linear layers."""
    return len({type(member) for member in members}) == 1 and bool(linear_layers(members[0]))


def stacked(module: nn.Module) -> int | None:
    """Return the number of experts whose matrices are stacked in a module's own parameters, None if there are none.

    The stack is the first dimension of a 3-D parameter; or it is part of the rows of a matrix, and the module states
    the number.
    """
    if isinstance(module, (*LINEAR, nn.Embedding, nn.modules.conv._ConvNd)):
        return None
    shapes = [tuple(value.shape) for value in module.parameters(recurse=False)]
    if count := next((shape[0] for shape in shapes if len(shape) == 3 and min(shape) > 1), None):
        return count
    rows = [shape[0] for shape in shapes if len(shape) == 2]
    return next((n for n in stated(module) if rows and all(row % n == 0 and row > n for row in rows)), None)


def stated(module: nn.Module) -> set[int]:
    """Return the numbers of experts, above one, that a module states in attributes such as `num_experts`."""
    named = {name: value for name, value in vars(module).items() if name.endswith("experts")}
    return {value for value in named.values() if type(value) is int and value > 1}


def beside(level: nn.Module, below: nn.Module, count: int) -> set[int]:
    """Return the ids of the routers in `level`: its linear layers, and those that are alone in a child of it.

    `below` is the child that holds the experts.
    """
    others = [child for child in level.children() if child is not below]
    alone = [(child, layers[0]) for child in others if len(layers := linear_layers(child)) == 1]
    found = {id(layer) for child, layer in alone if outputs(layer) in {count, *stated(level), *stated(child)}}
    found |= {id(layer) for child in others for layer in scoring(linear_layers(child), count)}
    weighing = {id(layer) for child, layer in alone if outputs(layer) == 1}
    return found | weighing if found or has_bare_router(level, below, count) else set()


def scoring(layers: list[nn.Module], count: int) -> list[nn.Module]:
    """Return the layers of a router of several layers: the last has one output for each expert, no shared expert's."""
    several = len(layers) > 1 and outputs(layers[-1]) == count != inputs(layers[0])
    return layers if several else []


def has_bare_router(level: nn.Module, below: nn.Module, count: int) -> bool:
    """True if a module other than a linear layer holds a matrix with one row for each expert: a router as well."""
    others = [level, *(child for child in level.children() if child is not below)]
    bare = [module for module in others if not isinstance(module, (*LINEAR, nn.Embedding))]
    return any(value.dim() == 2 and len(value) == count for m in bare for value in m.parameters(recurse=False))


def list_of(block: nn.Module, layer: str) -> str | None:
    """Return the path of the outermost list of modules around a layer of `block`, None for a layer outside lists."""
    parts = layer.split(".")
    paths = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((path for path in paths if isinstance(block.get_submodule(path), LISTS)), None)


def linear_layers(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, LINEAR)]


def outputs(layer: nn.Module) -> int:
    """Return the number of outputs of a linear layer."""
    return layer.nf if isinstance(layer, Conv1D) else layer.out_features  # type: ignore[return-value]


def inputs(layer: nn.Module) -> int:
    """Return the number of inputs of a linear layer."""
    return layer.nx if isinstance(layer, Conv1D) else layer.in_features  # type: ignore[return-value]
