"""A plain forward pass of a causal language model: tokens in, logits out, no cache."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


def run_model(model: nn.Module, tokens: Tensor) -> Any:
    """Run `model` on tokens int64 `[windows, window_tokens]` without a cache; returns what the model returns."""
    return model(input_ids=tokens, use_cache=False) if takes_use_cache(model) else model(input_ids=tokens)


def takes_use_cache(model: nn.Module) -> bool:
    """True if the forward pass of a model has an argument `use_cache`."""
    return has_use_cache(getattr(model.forward, "__func__", model.forward))


@functools.lru_cache(maxsize=64)
def has_use_cache(forward: Callable[..., Any]) -> bool:
    """True if a function, which need not be bound to its model, has an argument `use_cache`."""
    parameters = inspect.signature(forward).parameters
    return "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def logits_of(output: Any) -> Tensor:
    """The logits `[windows, window_tokens, vocabulary]` among the values that a model returns; the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.logits


@contextlib.contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """While the context is open, no configuration of a model or of its modules asks for a cache.

    Some models prefer their configuration to the argument `use_cache`.
    """
    found: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    configs = {id(config): config for config in found if getattr(config, "use_cache", False) is True}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
