"""`self:SOURCE`: calibration text that the host samples from the dense model, with prompts from the text of SOURCE.

Calibration by text of the model itself, where there is little or no other text: LLM-QAT (arXiv 2305.17888) for
quantisation, self-calibration (arXiv 2410.17170) for quantisation and pruning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import nmbench


@dataclass(frozen=True)
class SelfText(nmbench.Dataset):
    """Text sampled from the dense model. Raises `NMBenchError` without a source, and for a bad option."""

    def __post_init__(self) -> None:
        nmbench.Sampling.parse(self.argument)

    @property
    def sampling(self) -> nmbench.Sampling:
        return nmbench.Sampling.parse(self.argument)

    def texts(self, split: str) -> Iterable[str]:
        raise nmbench.NMBenchError(
            f"self:{self.argument} is sampled from the dense model and is for --calibration only: {split} text must be "
            f"real text, for example {self.sampling.source}."
        )


@nmbench.hookimpl
def nmbench_register_datasets(register: nmbench.Register) -> None:
    register("self", SelfText)
