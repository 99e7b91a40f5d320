"""Perplexity, with the protocol in the name of the metric: `ppl:<data set>@<window>`.

The test texts are joined and tokenised once with special tokens, cut into non-overlapping windows, the tail dropped;
perplexity is exp of the mean cross-entropy over the window - 1 targets of every window. (The protocol of the GPTQ and
SparseGPT papers. The word perplexity of lm-evaluation-harness is another figure.) With `+bos` in its name a BOS token
begins every window: `ppl:<data set>@<window>+bos`, of the same targets.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import nmbench

MOST_NATS = math.log(sys.float_info.max)  # 709.8


@dataclass(frozen=True)
class Perplexity(nmbench.WindowMetric):
    """exp of the mean token cross-entropy on the test text of a data set."""

    word: ClassVar[str] = "ppl"
    takes_bos: ClassVar[bool] = True

    def measure(self, subject: nmbench.Subject, dense: nmbench.DenseSubject) -> Mapping[str, nmbench.Value]:
        losses = subject.losses(self.dataset, self.window, self.bos)
        value = perplexity(float(losses.mean()), self.argument)
        stderr = float(losses.std() / math.sqrt(len(losses))) * value if len(losses) > 1 else None
        return {f"ppl:{self.argument}": nmbench.Value(value, len(losses), stderr)}


def perplexity(nats: float, text: str) -> float:
    """Return exp of a mean loss in nats. Raises `NumericalFailure` for a loss whose exponential no float64 holds."""
    if nats > MOST_NATS:
        raise nmbench.NumericalFailure(
            f"the mean loss on {text} is {nats:.1f} nats per token, so its perplexity exceeds the largest float64 "
            f"(a loss of {MOST_NATS:.0f} nats); such a model predicts nothing."
        )
    return math.exp(nats)


@nmbench.hookimpl
def nmbench_register_metrics(register: nmbench.Register) -> None:
    register("ppl", Perplexity)
