"""Tokens per second of a whole model as it stands, at prefill and at decoding, the host's launch times included."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from nmbench.models import Bundle
from nmbench.speed.report import Times

PREFILL_TOKENS, PROMPT_TOKENS, STEPS = 2048, 128, 32
DECODE_BATCHES = (1, 16)


class Waits(Protocol):
    """Something that can wait for its device."""

    def synchronize(self) -> None:
        """Wait until the device is done."""


def whole_model(bundle: Bundle, hardware: Waits) -> dict[tuple[str, int, int], Times]:
    """Seconds of a step of the whole model, by task, batch and new tokens per sequence: prefill, and decoding."""
    context = getattr(getattr(bundle.model, "config", None), "max_position_embeddings", None) or PREFILL_TOKENS
    prefill = min(PREFILL_TOKENS, context)
    prompt = min(PROMPT_TOKENS, context - STEPS - 1)
    found = {(f"prefill of {prefill}", 1, prefill): Times.of(list(prefill_steps(bundle, hardware, prefill)))}
    for batch in DECODE_BATCHES:
        steps = list(decode_steps(bundle, hardware, batch, prompt))
        found["decode", batch, 1] = Times.of(steps)
    return found


def prefill_steps(bundle: Bundle, hardware: Waits, tokens: int) -> Iterator[float]:
    """Wall-clock seconds of forward passes over one sequence, after two to warm up."""
    sequence = random_tokens(bundle, 1, tokens)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in arguments(bundle.model) else {}
    for index in range(2 + 10):
        seconds = timed(lambda: bundle.model(input_ids=sequence, use_cache=False, **last_only), hardware)[0]
        if index >= 2:
            yield seconds


def decode_steps(bundle: Bundle, hardware: Waits, batch: int, prompt: int) -> Iterator[float]:
    """Wall-clock seconds of one more token for `batch` sequences that have `prompt` already; the first two warm up."""
    cache = DynamicCache(config=bundle.model.config)
    output = timed(stepping(bundle.model, random_tokens(bundle, batch, prompt), cache), hardware)[1]
    for index in range(STEPS):
        token = output.logits[:, -1:].argmax(dim=-1)  # [batch, 1]
        seconds, output = timed(stepping(bundle.model, token, cache), hardware)
        if index >= 2:
            yield seconds


def stepping(model: nn.Module, tokens: Tensor, cache: Any) -> Callable[[], Any]:
    """A call that reads tokens `[batch, n]` and adds them to the cache."""
    name = "cache" if "cache" in arguments(model) else "past_key_values"  # as older transformers call it
    return lambda: model(input_ids=tokens, use_cache=True, **{name: cache})


def arguments(model: nn.Module) -> Collection[str]:
    """What the forward pass of a model takes, by name."""
    return inspect.signature(model.forward).parameters


@torch.inference_mode()
def timed(call: Callable[[], Any], hardware: Waits) -> tuple[float, Any]:
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
