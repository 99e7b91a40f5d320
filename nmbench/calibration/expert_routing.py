"""The arguments of a module of fused experts, changed to other tokens, another routing or another model.

The arguments are hidden states `[tokens, width]`, the experts chosen for every token, integers `[tokens, choices]`, and
the weights of these experts, of the same shape; in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmbench.calibration.statistics import Skip, unplaced

INTEGERS = (torch.int64, torch.int32)


class Arguments(NamedTuple):
    """The arguments of one call of a module."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def values(self) -> list[Any]:
        return [*self.args, *self.kwargs.values()]

    @property
    def routing(self) -> Tensor | None:
        """The experts chosen for every token, integers `[tokens, choices]`, if that is clear."""
        found = [v for v in self.values if isinstance(v, Tensor) and v.dtype in INTEGERS and v.dim() == 2]
        return found[0] if len(found) == 1 else None

    def changed(self, change: Callable[[Any], Any]) -> Arguments:
        return Arguments([change(v) for v in self.args], {name: change(v) for name, v in self.kwargs.items()})


def to_expert(arguments: Arguments, expert: int) -> Arguments | None:
    """The arguments that send every token to one expert, once; None if there is no clear routing to change."""
    routing = arguments.routing
    if routing is None:
        return None

    def forced(value: Any) -> Any:
        if value is routing:
            return torch.full_like(routing[:, :1], expert)
        return value[:, :1] if isinstance(value, Tensor) and value.shape == routing.shape else value

    return arguments.changed(forced)


def without_first(arguments: Arguments, skip: Skip) -> Arguments:
    """The arguments less the first tokens of every window. Raises `NMBenchError` if there is no clear routing."""
    if not skip.tokens:
        return arguments
    routing = arguments.routing
    if routing is None or len(routing) % skip.window_tokens:
        raise unplaced()
    tokens = len(routing)
    kept = torch.arange(tokens, device=routing.device) % skip.window_tokens >= skip.tokens
    return arguments.changed(lambda v: v[kept] if isinstance(v, Tensor) and v.shape[:1] == (tokens,) else v)


def routed_alike(dense: Arguments, arguments: Arguments) -> Arguments | None:
    """The hidden states of `dense` with the routing of `arguments`; None if there is no clear routing."""
    routing = arguments.routing
    if routing is None or [type(v) for v in dense.values] != [type(v) for v in arguments.values]:
        return None
    ours = iter(arguments.values)

    def mixed(theirs: Any) -> Any:
        value = next(ours)
        return value if isinstance(value, Tensor) and value.shape == routing.shape else theirs

    return dense.changed(mixed)
