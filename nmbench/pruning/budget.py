"""The number of steps of a training, and how the step size goes over them."""

from __future__ import annotations


def steps_within(tokens: int | None, passes: float, pool_tokens: int, step_tokens: int) -> int:
    """Return the number of whole steps in a budget of `tokens`, or of `passes` over the pool if `tokens` is None."""
    return (tokens if tokens is not None else round(passes * pool_tokens)) // step_tokens


def rise_and_fall(step: int, steps: int, warmup: float) -> float:
    """Return the share of the largest step size that update `step` has, counted from 0.

    It rises linearly over the share `warmup` of all steps, and then falls linearly to 0.
    """
    rising = max(1, round(warmup * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))
