"""The inputs of experts that are modules of their own, if every token were routed to them.

An expert that no calibration token reached has no inputs. Its siblings in the same list are given tokens out of the
hidden states that the module around the list is given. So the expert is called on all of these hidden states, after
the module has run as ever; what the expert returns is dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nmbench.models.hooks import hooks
from nmbench.models.routers import list_of


@contextlib.contextmanager
def calling_experts(block: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """While the context is open, the members of lists that hold `layers` of `block` are called on all tokens.

    Layers outside lists, and lists whose other members are given something else than tokens of the module around the
    list, are left alone.
    """
    with contextlib.ExitStack() as stack:
        for path, members in by_list(block, layers).items():
            owner = block.get_submodule(path.rpartition(".")[0])
            stack.enter_context(calling(owner, block.get_submodule(path), members))
        yield


def by_list(block: nn.Module, layers: Iterable[str]) -> dict[str, list[nn.Module]]:
    """The members that hold `layers`, by the path of their list: the outermost one in the path of a layer."""
    found: dict[str, dict[str, nn.Module]] = {}
    for layer in layers:
        path = list_of(block, layer)
        if path:
            member = f"{path}.{layer.removeprefix(f'{path}.').partition('.')[0]}"
            found.setdefault(path, {})[member] = block.get_submodule(member)
    return {path: list(members.values()) for path, members in found.items()}


@contextlib.contextmanager
def calling(owner: nn.Module, siblings: nn.Module, members: Sequence[nn.Module]) -> Iterator[None]:
    """While the context is open, every call of `owner` is followed by calls of `members` on all of its tokens."""
    given: list[Tensor | None] = []  # the inputs of siblings in this call of the owner

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given.append(args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None)

    def follow(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        noted = list(given)
        tokens = next((v.reshape(-1, v.shape[-1]) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if tokens is not None and noted and all(are_tokens(inputs, tokens) for inputs in noted):
            for member in members:
                member(tokens)
        given.clear()

    attached = [child.register_forward_pre_hook(note, with_kwargs=True) for child in siblings.children()]
    with hooks([*attached, owner.register_forward_hook(follow, with_kwargs=True)]):
        yield


def are_tokens(inputs: Tensor | None, tokens: Tensor) -> bool:
    """True if the first row of `inputs` is one of `tokens` `[n, width]`, or if there are no rows."""
    if inputs is None or inputs.shape[-1:] != tokens.shape[-1:] or inputs.dtype != tokens.dtype:
        return False
    rows = inputs.reshape(-1, tokens.shape[-1])
    return not len(rows) or bool(torch.eq(tokens, rows[0]).all(dim=-1).any())
