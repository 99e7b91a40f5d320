"""Continuations of prompts that a causal language model draws token by token, with its key-value cache.

A model that returns no cache reads the whole window again for every token: slower, and the same tokens.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmbench.models.forward import logits_of, run_model

CACHES = ("cache", "past_key_values", "cache_params")  # since transformers 5.24, before, of recurrent models before


@dataclass(frozen=True)
class Continuation:
    """Windows int64 `[n, length]`, each a prompt and its continuation, and the tokens that the model read for them.

    `last`: the float32 logits `[n, vocabulary]` that the last tokens were drawn from.
    """

    windows: Tensor
    forward_tokens: int
    last: Tensor


@torch.no_grad()
def continued(
    model: nn.Module,
    prompts: Tensor,
    length: int,
    choose: Callable[[Tensor], Tensor],
    report: Callable[[int], None] = lambda drawn: None,
) -> Continuation:
    """Return continuations of `prompts` int64 `[n, prompt]`, which is shorter than `length`, up to `length` tokens.

    `choose` maps float32 logits `[n, vocabulary]` to the next tokens int64 `[n]`. `report(drawn)` is called after each
    token with the tokens that each window has got. All tensors are on the device of the model.
    """
    n, start = prompts.shape
    windows = torch.cat([prompts, prompts.new_zeros(n, length - start)], dim=1)  # [n, length]
    cache, read, forward_tokens = None, 0, 0
    for place in range(start, length):
        output, cache = run_cached(model, windows[:, read:place], cache)
        last = logits_of(output)[:, -1].float()
        windows[:, place] = choose(last)
        forward_tokens += n * (place - read)
        read = 0 if cache is None else place
        report(place + 1 - start)
    return Continuation(windows, forward_tokens, last)


def run_cached(model: nn.Module, tokens: Tensor, cache: Any) -> tuple[Any, Any]:
    """Run `model` on the tokens int64 `[n, new]` that follow those in `cache`; None: they are the first.

    Returns what the model returns, and the cache for the next call; None if the model has no cache.
    """
    name = cache_name(getattr(model.forward, "__func__", model.forward))
    if name is None:
        return run_model(model, tokens), None
    output = model(input_ids=tokens, use_cache=True, **{name: cache})
    return output, getattr(output, name, None)


@functools.lru_cache(maxsize=64)
def cache_name(forward: Callable[..., Any]) -> str | None:
    """Return the name of the argument of a forward pass that is the cache; None if there is none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHES if name in parameters and "use_cache" in parameters), None)


def drawn(logits: Tensor, temperature: float, top_p: float | None, generator: torch.Generator) -> Tensor:
    """Draw one token from each row of logits float32 `[n, vocabulary]`: int64 `[n]`; temperature 0 takes the largest.

    A race of exponential clocks draws from the softmax with numbers of `generator`, which is on the device of the
    logits. Without `top_p` the draw has no cumulative sum, which rounds differently from call to call on a GPU.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    shares = (logits / temperature).softmax(dim=-1)
    if top_p is not None:
        shares = nucleus(shares, top_p)
    return (shares / torch.empty_like(shares).exponential_(generator=generator)).argmax(dim=-1)


def nucleus(shares: Tensor, top_p: float) -> Tensor:
    """Return probabilities `[n, vocabulary]` without all but the fewest likeliest tokens that reach a share of `top_p`.

    The rest is not scaled to a sum of 1. Source: arXiv 1904.09751.
    """
    ordered, places = shares.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return shares.scatter(-1, places, ordered.masked_fill(outside, 0.0))
