"""The windows and the number of steps of a training, and how the step size goes over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Budgeted(Protocol):
    """The options of a method that decide its budget; a frozen dataclass with these fields will do.

    The budget is `tokens`, or `passes` over the pool if `tokens` is None. `minibatch`: windows a step;
    `window_tokens`: their length, None for that of the pool.
    """

    @property
    def passes(self) -> float: ...
    @property
    def tokens(self) -> int | None: ...
    @property
    def minibatch(self) -> int: ...
    @property
    def window_tokens(self) -> int | None: ...


class Pooled(Protocol):
    """A task with a pool of windows."""

    def windows(self, window_tokens: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Budget:
    """A training on `windows` int64 `[n, window_tokens]`, `minibatch` of them in each of `steps` steps."""

    windows: Tensor
    minibatch: int
    steps: int

    @classmethod
    def of(cls, task: Pooled, options: Budgeted) -> Budget:
        """Return the budget of `options` for the pool of `task`; a minibatch has at most all windows."""
        windows = task.windows(options.window_tokens)
        minibatch = min(options.minibatch, len(windows))
        step_tokens = minibatch * windows.shape[1]
        return cls(windows, minibatch, steps_within(options.tokens, options.passes, windows.numel(), step_tokens))

    @property
    def first(self) -> Tensor:
        """The windows of the first minibatch of a pass, `[minibatch, window_tokens]`."""
        return self.windows[: self.minibatch]

    @property
    def step_tokens(self) -> int:
        """The tokens of a step."""
        return self.first.numel()


def steps_within(tokens: int | None, passes: float, pool_tokens: int, step_tokens: int) -> int:
    """Return the number of whole steps in a budget of `tokens`, or of `passes` over the pool if `tokens` is None."""
    return (tokens if tokens is not None else round(passes * pool_tokens)) // step_tokens


def rise_and_fall(step: int, steps: int, warmup: float) -> float:
    """Return the share of the largest step size that update `step` has, counted from 0.

    It rises linearly over the share `warmup` of all steps, and then falls linearly to 0.
    """
    rising = max(1, round(warmup * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))
