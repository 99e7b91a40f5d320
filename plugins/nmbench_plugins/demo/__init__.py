"""The embedded demo: a small Llama-architecture model trained on public-domain prose and Shakespeare, and his plays.

The demo needs no network. benchmarks/demo_model describes the training of the model and its quality. Plays are split
whole: some for calibration, some for selection, two for the test; the model was trained on other plays.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nmbench

ASSETS = Path(__file__).parent / "assets"
WINDOW = 256


@dataclass(frozen=True)
class DemoModel(nmbench.ModelSource):
    """The embedded model, in float32 unless the source has another dtype."""

    def load(self, ref: str) -> nmbench.Bundle:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = getattr(torch, self.dtype or "float32")
        model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(ASSETS, local_files_only=True)
        return nmbench.Bundle.of("demo", model, tokenizer, DEFAULTS)


DEFAULTS = nmbench.Defaults(
    pattern=nmbench.Pattern(2, 4),
    calibration="demo",
    windows=128,
    window_tokens=WINDOW,
    pool_tokens=768 * WINDOW,
    selection_tokens=192 * WINDOW,
    metrics=(f"ppl:demo@{WINDOW}",),
    dtype="float32",
)


@dataclass(frozen=True)
class DemoPlays(nmbench.Dataset):
    """Plays of Shakespeare that the demo model was not trained on, split by play."""

    def texts(self, split: str) -> Iterable[str]:
        return [lzma.decompress(path.read_bytes()).decode("utf-8") for path in self.files(split)]

    def files(self, split: str) -> list[Path]:
        return sorted((ASSETS / "texts" / split).glob("*.txt.xz"))

    def provenance(self) -> Mapping[str, Any]:
        splits = ("calibration", "selection", "test")
        return {s: {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in self.files(s)} for s in splits}


@nmbench.hookimpl
def nmbench_register_models(register: nmbench.Register) -> None:
    register("demo", DemoModel)


@nmbench.hookimpl
def nmbench_register_datasets(register: nmbench.Register) -> None:
    register("demo", DemoPlays)
