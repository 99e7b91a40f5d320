"""Checks of the dense model by its losses, and of rows against them.

A language model that was loaded right, and reads its own tokens, predicts a text better than a unigram does, and better
than the same tokens in another order. Where it does not, differences between pruned models mean nothing.

The doubts are made when rows are recorded: only then the dense model is there to read shuffled windows, and a record
holds its doubts wherever it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nmbench.evaluation.subject import Subject
from nmbench.experiment.doubts import Doubt
from nmbench.results.format import Interval

DENSE_MODEL, BETTER = "dense model", "better than dense: distrust"
SHUFFLED = 4  # windows that are read again with their tokens in another order
LEAST_SHUFFLED = 16  # tokens of a window whose order can say something
ORDER_NATS = 0.05  # what the order of tokens is worth at least; to a trained model it is worth more than 1


def dense_doubts(subject: Subject) -> dict[str, Doubt]:
    """Return a doubt for each text (`demo@256`) that the dense model of `subject` does not predict.

    The losses of `subject` have been measured. A few windows are read again with their tokens shuffled.
    """
    found = {}
    for name, windows in list(subject.windows.items()):
        reasons = [*no_better_than_unigram(subject.cached[name], windows), *no_better_than_shuffled(subject, name)]
        if reasons:
            found[name] = Doubt(
                DENSE_MODEL,
                f"it does not predict {name}: {float(subject.cached[name].mean()):.3f} nats per token, no better than "
                f"{' and '.join(reasons)}. Weights, tokenizer or text are wrong for each other; rows are not ranked "
                f"by {name}.",
            )
    return found


def no_better_than_unigram(losses: Tensor, windows: Tensor) -> list[str]:
    """Return the loss of a unigram in words if the mean of `losses` `[n]` is not below it: windows int64 `[n, w]`."""
    unigram = unigram_loss(windows[:, 1:])
    return [f"the {unigram:.3f} of token frequencies alone"] if float(losses.mean()) >= unigram else []


def unigram_loss(tokens: Tensor) -> float:
    """Return the loss in nats per token of a unigram on tokens, int64 of any shape, held out one by one.

    Each of the n tokens is predicted by the counts c of all others, with one added for each of the k different tokens:
    the probability is (c - 1 + 1) / (n - 1 + k). Without the hold-out, a short text would predict itself.
    """
    counts = tokens.flatten().unique(return_counts=True)[1].double()
    total = float(counts.sum())
    return math.log(total - 1 + len(counts)) - float((counts * counts.log()).sum()) / total


def no_better_than_shuffled(subject: Subject, name: str) -> list[str]:
    """Return the loss of shuffled windows in words if the windows in order are not clearly below it."""
    windows = subject.windows[name]
    if windows.shape[1] < LEAST_SHUFFLED:
        return []
    chosen = torch.linspace(0, len(windows) - 1, min(SHUFFLED, len(windows))).long()
    ordered = float(subject.cached[name][chosen].mean())
    other = float(subject.measure(shuffled(windows[chosen]), f"shuffled windows of {name}").mean())
    return [f"the {other:.3f} of the same tokens shuffled"] if ordered > other - ORDER_NATS else []


def shuffled(windows: Tensor) -> Tensor:
    """Return windows `[n, window]` with their tokens in a seeded order; the first, which may be BOS, stays."""
    order = torch.randperm(windows.shape[1] - 1, generator=torch.Generator().manual_seed(0)) + 1
    return torch.cat([windows[:, :1], windows[:, order]], dim=1)


def better_than_dense(against_dense: Mapping[str, Interval]) -> list[Doubt]:
    """Return a doubt for each text on which a row is significantly better than dense: the interval is below zero."""
    return [
        Doubt(
            BETTER,
            f"{name} {found['mean']:+.4f} nats per token [{found['low']:+.4f}, {found['high']:+.4f}]. Likely reasons: "
            f"the text is near the calibration text and far from the model's, the tokens are wrong for the model, or "
            f"windows lack the BOS token that it was trained with.",
        )
        for name, found in against_dense.items()
        if found["windows"] > 1 and found["high"] < 0
    ]
