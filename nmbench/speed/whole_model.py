"""Tokens per second of a whole model as it stands, at prefill and at decoding.

Twice: eager, where the host launches kernel after kernel and is often slower than the device; and, where possible, as a
CUDA graph, which is launched at once, as servers do it. A graph decodes the same step again and again.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from nmbench.models.bundle import Bundle
from nmbench.speed.report import Times

PREFILL_TOKENS, PROMPT_TOKENS, STEPS = 2048, 128, 32
DECODE_BATCHES = (1, 16)
WARM_UP, REPEAT = 2, 10
EAGER, GRAPH = "eager", "graph"

Key = tuple[str, int, int, str]  # task, batch, new tokens per sequence, how it is launched


class Launches(Protocol):
    """Something that can wait for its device, and may record what it is given to do."""

    def synchronize(self) -> None:
        """Wait until the device is done."""

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        """What does the work of a call again, launched at once; None if it cannot be recorded."""


def whole_model(bundle: Bundle, hardware: Launches) -> dict[Key, Times]:
    """Seconds of a step of the whole model: prefill, and decoding."""
    context = getattr(getattr(bundle.model, "config", None), "max_position_embeddings", None) or PREFILL_TOKENS
    prefill = min(PREFILL_TOKENS, context)
    prompt = min(PROMPT_TOKENS, context - STEPS - WARM_UP - 1)
    call = prefilling(bundle, prefill)
    found = {(f"prefill of {prefill}", 1, prefill, EAGER): Times.of(list(steps(call, hardware)))}
    graph = hardware.graphed(call)
    if graph:
        found[f"prefill of {prefill}", 1, prefill, GRAPH] = Times.of(list(steps(graph, hardware)))
    for batch in DECODE_BATCHES:
        found["decode", batch, 1, EAGER] = Times.of(list(decode_steps(bundle, hardware, batch, prompt)))
        graph = hardware.graphed(decoding(bundle, batch, prompt))
        if graph:
            found["decode", batch, 1, GRAPH] = Times.of(list(steps(graph, hardware)))
    return found


def steps(call: Callable[[], Any], hardware: Launches) -> Iterator[float]:
    """Wall-clock seconds of calls, after some to warm up."""
    for index in range(WARM_UP + REPEAT):
        seconds = timed(call, hardware)[0]
        if index >= WARM_UP:
            yield seconds


def prefilling(bundle: Bundle, tokens: int) -> Callable[[], Any]:
    """A call that reads one sequence into an empty cache."""
    sequence = random_tokens(bundle, 1, tokens)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in arguments(bundle.model) else {}
    return lambda: stepping(bundle.model, sequence, DynamicCache(config=bundle.model.config), **last_only)()


def decoding(bundle: Bundle, batch: int, prompt: int) -> Callable[[], Any]:
    """A call that reads one more token into the cache of `batch` sequences that have `prompt` and more already."""
    cache = DynamicCache(config=bundle.model.config)
    with torch.inference_mode():
        output = stepping(bundle.model, random_tokens(bundle, batch, prompt), cache)()
    return stepping(bundle.model, output.logits[:, -1:].argmax(dim=-1), cache)


def decode_steps(bundle: Bundle, hardware: Launches, batch: int, prompt: int) -> Iterator[float]:
    """Wall-clock seconds of one more token for `batch` sequences that have `prompt` already; the first ones warm up."""
    cache = DynamicCache(config=bundle.model.config)
    output = timed(stepping(bundle.model, random_tokens(bundle, batch, prompt), cache), hardware)[1]
    for index in range(STEPS + WARM_UP):
        token = output.logits[:, -1:].argmax(dim=-1)  # [batch, 1]
        seconds, output = timed(stepping(bundle.model, token, cache), hardware)
        if index >= WARM_UP:
            yield seconds


def stepping(model: nn.Module, tokens: Tensor, cache: Any, **options: Any) -> Callable[[], Any]:
    """A call that reads tokens `[batch, n]` and adds them to the cache."""
    name = "cache" if "cache" in arguments(model) else "past_key_values"  # as older transformers call it
    return lambda: model(input_ids=tokens, use_cache=True, **{name: cache}, **options)


def arguments(model: nn.Module) -> Collection[str]:
    """What the forward pass of a model takes, by name."""
    return inspect.signature(model.forward).parameters


@torch.inference_mode()
def timed(call: Callable[[], Any], hardware: Launches) -> tuple[float, Any]:
    """Seconds of a call until the device is done, and what it returned."""
    hardware.synchronize()
    start = time.perf_counter()
    returned = call()
    hardware.synchronize()
    return time.perf_counter() - start, returned


def random_tokens(bundle: Bundle, batch: int, tokens: int) -> Tensor:
    """Random token ids int64 `[batch, tokens]` on the device."""
    assert isinstance(bundle.model, PreTrainedModel)
    vocabulary = int(bundle.model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(bundle.device)
