"""A plugin: `--model shape:NAME` is a random model of a shape of `shapes.py`, made on the GPU in a second or two.

    nmbench speed --plugin shape_model.py --model shape:llama-3.1-8b --only prefill --prefill 8192

`shape:NAME@BLOCKS` has fewer blocks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nmbench

sys.path.append(str(Path(__file__).parent))


class ShapeModel(nmbench.ModelSource):
    """A random model, on the GPU where there is one; it has no tokenizer, so that only its speed can be measured."""

    def load(self, ref: str) -> nmbench.Bundle:
        import torch
        from shapes import SHAPES, random_model

        name, _, blocks = ref.partition("@")
        if name not in SHAPES or not (blocks or "1").isdecimal():
            raise nmbench.NMBenchError(f"shape {ref!r} is not known; there are {', '.join(SHAPES)}, or NAME@BLOCKS.")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return random_model(name, int(blocks) if blocks else None, getattr(torch, self.dtype or "float32"), device)


@nmbench.hookimpl
def nmbench_register_models(register):
    register("shape", ShapeModel)
