"""A few short forward passes that examine a model before anything is pruned.

- Every block that is to be pruned computes something, else the wrong stack was found.
- A layer whose module is never called has no inputs to observe, so it stays dense. Mamba, for one, reads the weight of
  `dt_proj` without calling the module.
- The logits of a token do not depend on later tokens, else a perplexity is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle
from nmbench.models.causality import ROWS, check_causal
from nmbench.models.forward import logits_of, run_model
from nmbench.models.reach import check_reached, never_called, noting_calls
from nmbench.models.sharing import check_shared
from nmbench.runtime.isolation import isolating

MOST_TOKENS = 24  # of a row


@torch.no_grad()
def examined(bundle: Bundle, tokens: Tensor) -> Bundle:
    """Return `bundle` without the layers that no forward pass calls; `tokens` int64 `[n]` are those of real text.

    Raises `NMBenchError` for a prunable weight that is shared, a model that fails on the tokens, a block that no token
    reaches, a model without a layer that is called, and a model whose tokens see later ones.
    """
    check_shared(bundle)
    rows = tokens[:MOST_TOKENS].repeat(ROWS, 1).to(bundle.device)
    with isolating():
        with noting_calls(bundle) as called:
            before = logits(bundle, rows)
        check_reached(bundle, called)
        check_causal(bundle.ref, lambda tokens: logits(bundle, tokens), rows, before)
    return bundle.leaving(never_called(bundle, called))


def logits(bundle: Bundle, rows: Tensor) -> Tensor:
    """Return the logits `[rows, n, vocabulary]`. Raises `NMBenchError` with the error of a model that fails."""
    try:
        return logits_of(run_model(bundle.model, rows))
    except NMBenchError:
        raise
    except Exception as error:  # the code of a model may raise anything
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise NMBenchError(f"{bundle.ref} fails on {rows.shape[1]} tokens of text: {message}") from error
