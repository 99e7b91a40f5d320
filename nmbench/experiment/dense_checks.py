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
from nmbench.experiment.tokenizer_checks import embedding_rows
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
    for name in list(subject.windows):
        reasons = [*no_better_than_unigram(subject, name), *no_better_than_shuffled(subject, name)]
        if reasons:
            found[name] = Doubt(
                DENSE_MODEL,
                f"it does not predict {name}: {float(subject.cached[name].mean()):.3f} nats per token, no better than "
                f"{' and '.join(reasons)}. Weights, tokenizer or text are wrong for each other; rows are not ranked "
                f"by {name}.",
            )
    return found


def no_better_than_unigram(subject: Subject, name: str) -> list[str]:
    """Return the loss of a unigram on a text in words if the mean loss of the model is not below it."""
    windows, bos = subject.windows[name]
    tokens = windows[:, 1 + bos :]  # the targets
    vocabulary = max(embedding_rows(subject.bundle) or 0, int(tokens.max()) + 1)
    unigram = unigram_loss(tokens, vocabulary)
    return [f"the {unigram:.3f} of token frequencies alone"] if float(subject.cached[name].mean()) >= unigram else []


def unigram_loss(tokens: Tensor, vocabulary: int) -> float:
    """Return the loss in nats per token of a unigram over `vocabulary` tokens, on int64 tokens of any shape.

    Each token is predicted by the counts of all others, so that a short text does not predict itself, under the
    smoothing of Witten and Bell: with k different tokens among n, a new one has k / (n + k), shared by all tokens that
    have not occurred. (Adding one to each of 100,000 counts would hide a model that is worse than frequencies.)
    """
    counts = tokens.flatten().unique(return_counts=True)[1].double()
    others, kinds = float(counts.sum()) - 1, len(counts)
    repeated = counts[counts > 1]
    total = float((repeated * ((repeated - 1) / (others + kinds)).log()).sum())
    if single := kinds - len(repeated):  # each is new to the others, which have one kind fewer
        new = (kinds - 1) / (others + kinds - 1) if others else 1.0
        total += single * math.log(new / (vocabulary - kinds + 1))
    return -total / (others + 1)


def no_better_than_shuffled(subject: Subject, name: str) -> list[str]:
    """Return the loss of shuffled windows in words if the windows in order are not clearly below it."""
    windows, bos = subject.windows[name]
    if windows.shape[1] < LEAST_SHUFFLED:
        return []
    chosen = torch.linspace(0, len(windows) - 1, min(SHUFFLED, len(windows))).long()
    ordered = float(subject.cached[name][chosen].mean())
    other = float(subject.measure(shuffled(windows[chosen], 1 + bos), f"shuffled windows of {name}", bos).mean())
    return [f"the {other:.3f} of the same tokens shuffled"] if ordered > other - ORDER_NATS else []


def shuffled(windows: Tensor, first: int = 1) -> Tensor:
    """Return windows `[n, window]` with their tokens in a seeded order; the `first` tokens, no targets, stay."""
    order = torch.randperm(windows.shape[1] - first, generator=torch.Generator().manual_seed(0)) + first
    return torch.cat([windows[:, :first], windows[:, order]], dim=1)


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
