"""Seconds per step of a whole model as it stands, at prefill and at decoding.

Each step is timed twice: eager, where the host launches kernel after kernel and is often slower than the device; and,
where possible, as a CUDA graph, which is launched at once, as servers do it. A graph repeats one and the same decoding
step.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from nmbench.models.bundle import Bundle
from nmbench.speed.times import Times

WARM_UP, REPEAT = 2, 10
EAGER, GRAPH = "eager", "graph"

Key = tuple[str, int, int, str]  # task, batch, new tokens per sequence, EAGER or GRAPH


@dataclass(frozen=True)
class Sizes:
    """Tokens of a prefill and of the prompt before decoding, timed decoding steps, and batch sizes of decoding.

    After `prefill_seconds` the profile of a prefill begins no further way of multiplying.
    """

    prefill_tokens: int = 2048
    prefill_seconds: float = math.inf
    prompt_tokens: int = 128
    decode_steps: int = 32
    decode_batches: tuple[int, ...] = (1, 16)


class Launches(Protocol):
    """A device that can be waited for, and that may be able to record a call as a graph."""

    def synchronize(self) -> None:
        """Wait until the device is done."""

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        """A call that repeats the work of `call`, launched at once; None if that work cannot be recorded."""


def whole_model(bundle: Bundle, hardware: Launches, sizes: Sizes) -> dict[Key, Times]:
    """Seconds of a step of the whole model, for prefill and for decoding."""
    prefill, context = prefill_tokens(bundle, sizes), context_of(bundle, sizes)
    prompt = min(sizes.prompt_tokens, context - sizes.decode_steps - WARM_UP - 1)
    call = prefill_call(bundle, prefill)
    found = {(f"prefill of {prefill}", 1, prefill, EAGER): Times.of(list(steps(call, hardware)))}
    graph = hardware.graphed(call)
    if graph:
        found[f"prefill of {prefill}", 1, prefill, GRAPH] = Times.of(list(steps(graph, hardware)))
    for batch in sizes.decode_batches:
        eager = list(decode_steps(bundle, hardware, batch, prompt, sizes.decode_steps))
        found["decode", batch, 1, EAGER] = Times.of(eager)
        graph = hardware.graphed(decode_call(bundle, batch, prompt))
        if graph:
            found["decode", batch, 1, GRAPH] = Times.of(list(steps(graph, hardware)))
    return found


def context_of(bundle: Bundle, sizes: Sizes) -> int:
    """The most tokens that the model reads at once; those of the prefill where the model does not say."""
    found = getattr(getattr(bundle.model, "config", None), "max_position_embeddings", None)
    return int(found or sizes.prefill_tokens)


def prefill_tokens(bundle: Bundle, sizes: Sizes) -> int:
    """The tokens of a prefill, within the model's context."""
    return min(sizes.prefill_tokens, context_of(bundle, sizes))


def steps(call: Callable[[], Any], hardware: Launches, warm_up: int = WARM_UP, repeat: int = REPEAT) -> Iterator[float]:
    """Wall-clock seconds of each of `repeat` calls, after `warm_up` calls that are not timed."""
    for index in range(warm_up + repeat):
        seconds = timed(call, hardware)[0]
        if index >= warm_up:
            yield seconds


def prefill_call(bundle: Bundle, tokens: int) -> Callable[[], Any]:
    """A call that reads one sequence of `tokens` into an empty cache."""
    sequence = random_tokens(bundle, 1, tokens)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in arguments(bundle.model) else {}
    return lambda: step_call(bundle.model, sequence, DynamicCache(config=bundle.model.config), **last_only)()


def decode_call(bundle: Bundle, batch: int, prompt: int) -> Callable[[], Any]:
    """A call that reads one more token into the cache of `batch` sequences of at least `prompt` tokens."""
    cache = DynamicCache(config=bundle.model.config)
    with torch.inference_mode():
        output = step_call(bundle.model, random_tokens(bundle, batch, prompt), cache)()
    return step_call(bundle.model, output.logits[:, -1:].argmax(dim=-1), cache)


def decode_steps(bundle: Bundle, hardware: Launches, batch: int, prompt: int, count: int) -> Iterator[float]:
    """Wall-clock seconds of each of `count` decoding steps of `batch` sequences that begin with `prompt` tokens.

    `WARM_UP` steps before them are not timed.
    """
    cache = DynamicCache(config=bundle.model.config)
    output = timed(step_call(bundle.model, random_tokens(bundle, batch, prompt), cache), hardware)[1]
    for index in range(count + WARM_UP):
        token = output.logits[:, -1:].argmax(dim=-1)  # [batch, 1]
        seconds, output = timed(step_call(bundle.model, token, cache), hardware)
        if index >= WARM_UP:
            yield seconds


def step_call(model: nn.Module, tokens: Tensor, cache: Any, **options: Any) -> Callable[[], Any]:
    """A call that reads tokens `[batch, n]` and adds them to the cache."""
    name = "cache" if "cache" in arguments(model) else "past_key_values"  # the name in older transformers
    return lambda: model(input_ids=tokens, use_cache=True, **{name: cache}, **options)


def arguments(model: nn.Module) -> Collection[str]:
    """The names of the arguments of a model's forward pass."""
    return inspect.signature(model.forward).parameters


@torch.inference_mode()
def timed(call: Callable[[], Any], hardware: Launches) -> tuple[float, Any]:
    """Seconds from the launch of a call until the device is done, and the call's return value."""
    hardware.synchronize()
    start = time.perf_counter()
    returned = call()
    hardware.synchronize()
    return time.perf_counter() - start, returned


def random_tokens(bundle: Bundle, batch: int, tokens: int) -> Tensor:
    """Random token ids int64 `[batch, tokens]`, on the device of the model."""
    assert isinstance(bundle.model, PreTrainedModel)
    vocabulary = int(bundle.model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(bundle.device)
