"""A few short forward passes that examine a model before anything is pruned.

- Every block that is to be pruned computes something, else the wrong stack was found.
- A layer whose module is never called has no inputs to observe, so it stays dense. Mamba, for one, reads the weight of
  `dt_proj` without calling the module.
- The same tokens give the same logits again, and text runs through no other stack of blocks, which would stay dense.
- The logits of a token do not depend on later tokens, else a perplexity is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle
from nmbench.models.causality import ROWS, check_causal, difference
from nmbench.models.forward import logits_of, run_model
from nmbench.models.reach import check_no_other_stack, check_reached, never_called, noting_calls
from nmbench.models.sharing import check_shared
from nmbench.runtime.isolation import isolating

MOST_TOKENS = 24  # of a row
MOST_NOISE = 0.05  # of the spread of logits, between two passes on the same tokens


@torch.no_grad()
def examined(bundle: Bundle, tokens: Tensor) -> Bundle:
    """Return `bundle` without the layers that no forward pass calls; `tokens` int64 `[n]` are those of real text.

    Raises `NMBenchError` for a prunable weight that is shared, a model that fails on the tokens, a block that no token
    reaches, another stack of blocks that text runs through, a model without a layer that is called, a model that
    computes other logits each time, and a model whose tokens see later ones.
    """
    check_shared(bundle)
    rows = tokens[:MOST_TOKENS].repeat(ROWS, 1).to(bundle.device)
    with isolating():
        with noting_calls(bundle) as called:
            before = logits(bundle, rows)
        check_reached(bundle, called)
        check_no_other_stack(bundle, called)
        check_repeatable(bundle.ref, before, logits(bundle, rows))
        check_causal(bundle.ref, lambda tokens: logits(bundle, tokens), rows, before)
    return bundle.leaving(never_called(bundle, called))


@torch.no_grad()
def check_length(bundle: Bundle, window: Tensor) -> None:
    """Raise `NMBenchError` if a model whose context is unknown fails on a window int64 `[tokens]`."""
    if bundle.context_tokens is None:
        with isolating():
            logits(bundle, window[None].to(bundle.device))


def check_repeatable(ref: str, once: Tensor, again: Tensor) -> None:
    """Raise `NMBenchError` if the logits of the same tokens differ by more than rounding from pass to pass."""
    if difference(once, again) > MOST_NOISE * float(once.float().std()):
        raise NMBenchError(
            f"{ref} computes other logits each time it reads the same tokens (dropout that is never off, or state that "
            f"it keeps?), so that no figure of it can be repeated; switch that off."
        )


def logits(bundle: Bundle, rows: Tensor) -> Tensor:
    """Return the logits `[rows, n, vocabulary]`.

    Raises `NMBenchError` with the error of a model that fails, and for logits of another shape.
    """
    try:
        found = logits_of(run_model(bundle.model, rows))
    except NMBenchError:
        raise
    except Exception as error:  # the code of a model may raise anything
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise NMBenchError(
            f"{bundle.ref} fails on {rows.shape[1]} tokens of text: {message} (if it cannot read as many, choose "
            f"shorter windows)"
        ) from error
    if found.dim() != 3 or found.shape[:2] != rows.shape:
        raise NMBenchError(
            f"{bundle.ref} returns logits of shape {tuple(found.shape)} for {len(rows)} rows of {rows.shape[1]} "
            f"tokens, not one row of logits for each token, so that it has no perplexity; make it return them all."
        )
    return found
