"""Where the layers of a block write into the residual stream, found by a probe instead of by name.

A layer writes into the residual stream if its output is added to the hidden state as it is. The tap of the layer is the
first place where this sum can be seen. To find it, a block is run once as it is and once with random numbers added to
the layer's output: the tap is the first place after the layer whose values change by just these numbers, other than
places that hold the output itself, the input of a dropout say, before it is added.

In a Llama the tap of `o_proj` is the input of the second norm, and that of `down_proj` is the output of the block.
Where attention and MLP are added at once (GPT-NeoX), both have the latter. Where a norm lies between the layer and the
residual stream (Gemma 2), there is none.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nmbench.models.hooks import Observer, Place, hooks, observing

MOST_ERROR = 0.05  # of a change, relative: rounding to half precision stays far below it, another function far above


def find_taps(run: Callable[[], object], block: nn.Module, hidden: Tensor, layers: Sequence[str]) -> dict[str, Place]:
    """The taps of those layers of a block that have one; `layers` and places are named within the block.

    `run` runs the block on hidden states of the form of `hidden` `[batch, window_tokens, width]`: once, and again for
    every layer of `width` outputs.
    """
    usual = trace(run, block, hidden, layers)
    noise = noise_for(usual.values(), hidden)
    taps = {}
    for layer in layers:
        if Place(layer, output=True) in usual:
            with adding(noise, block.get_submodule(layer)):
                noisy = trace(run, block, hidden, layers)
            tap = first_moved(usual, noisy, noise, Place(layer, output=True))
            taps.update({} if tap is None else {layer: tap})
    return taps


def first_moved(
    usual: Mapping[Place, Tensor], noisy: Mapping[Place, Tensor], noise: Tensor, output: Place
) -> Place | None:
    """The first place behind `output` that differs by the noise alone and holds something else than `output`."""
    places = list(usual)
    for place in places[places.index(output) + 1 :]:
        known = place in noisy and not torch.equal(usual[place], usual[output])
        if known and differ_by(noise, usual[place], noisy[place]):
            return place
    return None


def trace(run: Callable[[], object], block: nn.Module, hidden: Tensor, layers: Sequence[str]) -> dict[Place, Tensor]:
    """The inputs of the sub-modules of a block and the outputs of `layers` and of the block, in the order of execution.

    Copies in the shape of `hidden`, because a block may work in place; without tensors of another size, and without
    modules that are called more than once.
    """
    seen: dict[Place, Tensor] = {}
    times: Counter[Place] = Counter()

    def note(place: Place) -> Callable[[Any], None]:
        def keep(values: Any) -> None:
            times[place] += 1
            if isinstance(values, Tensor) and values.shape[-1] == hidden.shape[-1] and values.numel() == hidden.numel():
                seen[place] = values.reshape(hidden.shape).clone()

        return keep

    inputs = [Place(name, output=False) for name, _ in block.named_modules() if name]
    outputs = [Place(name, output=True) for name in (*layers, "")]
    with observing(Observer.at(place, block, note(place)) for place in (*inputs, *outputs)):
        run()
    return {place: values for place, values in seen.items() if times[place] == 1}


def noise_for(values: Iterable[Tensor], hidden: Tensor) -> Tensor:
    """Random numbers like `hidden`, as large as the largest of `values` on average; no global generator is touched."""
    scale = max(tensor.float().square().mean().sqrt() for tensor in values)
    generator = torch.Generator(hidden.device).manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator, device=hidden.device)
    return (noise * scale).to(hidden.dtype)


@contextlib.contextmanager
def adding(noise: Tensor, layer: nn.Module) -> Iterator[None]:
    """While the context is open, the output of a layer is noisy."""

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + noise.reshape(output.shape).to(output.dtype)

    with hooks([layer.register_forward_hook(add)]):
        yield


def differ_by(noise: Tensor, before: Tensor, after: Tensor) -> bool:
    """True if `after - before` is `noise`, to rounding."""
    noise = noise.float()
    return bool((after.float() - before.float() - noise).norm() < MOST_ERROR * noise.norm())
