"""A forward pass in two halves: up to a block, and from its known output on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nmbench.calibration.trial import alike
from nmbench.models.bundle import Bundle
from nmbench.models.forward import logits_of, run_model
from nmbench.models.hooks import hooks, instead


class Reached(Exception):
    """Stops a forward pass whose remaining blocks are of no interest."""


def until(bundle: Bundle, index: int, batch: Tensor) -> Any:
    """The output of block `index` when the model runs on `batch`; the blocks after it are not run."""
    returned: list[Any] = []

    def note(block: nn.Module, args: Any, output: Any) -> None:
        returned.append(output)
        raise Reached

    block = list(bundle.blocks.values())[index]
    with hooks([block.register_forward_hook(note)]), contextlib.suppress(Reached):
        run_model(bundle.model, batch)
    return returned[0]


@contextlib.contextmanager
def resumed(bundle: Bundle, index: int, output: Any) -> Iterator[None]:
    """While the context is open, the model does not compute its blocks up to `index`, which returns `output`."""
    with contextlib.ExitStack() as stack:
        for block in list(bundle.blocks.values())[: index + 1]:
            stack.enter_context(instead(block, lambda *args, **kwargs: output))
        yield


RESUMABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def resumable(bundle: Bundle, window: Tensor) -> bool:
    """True if a pass resumed at the last block has the logits of a whole pass, on `window` int64 `[1, window_tokens]`.

    It has not where blocks also leave something for later blocks elsewhere than in their outputs. A model is tried
    once.
    """
    if bundle.model not in RESUMABLE:
        whole = logits_of(run_model(bundle.model, window))
        above = len(bundle.blocks) - 2
        try:
            with resumed(bundle, above, until(bundle, above, window)):
                RESUMABLE[bundle.model] = above < 0 or alike(logits_of(run_model(bundle.model, window)), whole)
        except Exception:  # of the model, which lacks what a block would have left
            RESUMABLE[bundle.model] = False
    return RESUMABLE[bundle.model]
