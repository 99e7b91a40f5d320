"""The device memory of one-shot pruning of large models: estimates, and measured peaks.

    python memory.py                                  estimates, no weight is made; writes results/memory.json
    python memory.py --measure --json results/memory_h100.json        on a GPU, random weights, blocks streamed

Estimates: a table, shape x method x (whole model on the device, blocks streamed from the host), in GiB, bfloat16, with
128 windows of 2048 tokens. Measured: the peak that torch allocated while `prune_one_shot` ran, on a slice of the model,
by default 4 of the 32 blocks of the 8-billion shape. All blocks are alike and one at a time is on the device, so that a
slice has the same peak as the whole model; embeddings and output layer are whole. The number of windows changes the
time but not the peak, since all that waiting forward passes hold is on the host: here also where the GPU would have
room for it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from shapes import SHAPES, random_model, without_weights

from nmbench import Pattern
from nmbench.calibration.walk import batch_tokens
from nmbench.experiment.memory import GIBIBYTE, changes_weights, estimate
from nmbench.methods import Baseline
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pruning.one_shot import prune_one_shot
from nmbench.runtime.cost import Meter
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.swaps import Swaps
from nmbench_plugins.wanda import Wanda

RESULTS = Path(__file__).parent / "results" / "memory.json"
WINDOWS, WINDOW_TOKENS = 128, 2048
METHODS: dict[str, Baseline] = {"wanda": Wanda(), "sparsegpt": SparseGPT(), "swaps": Swaps()}
LARGE = ("llama-3.1-8b", "llama-3.1-70b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="prune a random model on the device, block by block")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-tokens", type=int, default=WINDOW_TOKENS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["wanda", "sparsegpt"])
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    content = measured(args) if args.measure else estimated()
    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def estimated() -> dict[str, Any]:
    """Print and return the table of estimates."""
    rows = []
    print("| model | method | whole model, GiB | streamed, GiB |\n|---|---|---|---|")
    for shape in LARGE:
        bundle = without_weights(shape)
        at_once = batch_tokens(bundle, torch.device("cuda"))
        for name, method in METHODS.items():
            whole, streamed = (
                planned(bundle, method, (WINDOWS, WINDOW_TOKENS), "cuda", stream, at_once) / GIBIBYTE
                for stream in (False, True)
            )
            print(f"| {shape} | {name} | {whole:.1f} | {streamed:.1f} |")
            rows.append({"model": shape, "method": name, "whole_gib": whole, "streamed_gib": streamed})
    return {"windows": WINDOWS, "window_tokens": WINDOW_TOKENS, "dtype": "bfloat16", "rows": rows}


def planned(bundle: Bundle, method: Baseline, windows: tuple[int, ...], device: str, stream: bool, at_once: int) -> int:
    """The estimated peak in bytes; `windows`: their number and their tokens."""
    about = {"sequential": method.sequential, "returns_weights": changes_weights(method)}
    return estimate(bundle, method.needs, *windows, device, stream, at_once, **about).peak


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Prune a slice of a model with offloaded blocks; return peaks in bytes, None where the device is the host."""
    device = torch.device(args.device)
    bundle = random_model(args.shape, args.blocks, torch.bfloat16, device)
    bundle.model.to("cpu")  # random weights are drawn on the device because that is quicker
    bundle.stream(device)
    bundle.streaming.room = 0
    windows = torch.randint(
        SHAPES[args.shape].vocabulary, (args.windows, args.window_tokens), generator=torch.Generator().manual_seed(0)
    )
    dense = DenseWeights(bundle)
    rows = []
    print("| method | estimated, GiB | measured, GiB | seconds |\n|---|---|---|---|", flush=True)
    for name in args.methods:
        rows.append(row(bundle, dense, name, windows, device))
        peak = rows[-1]["peak_bytes"]
        shown = "-" if peak is None else f"{peak / GIBIBYTE:.2f}"
        estimated_gib = rows[-1]["estimated_bytes"] / GIBIBYTE
        print(f"| {name} | {estimated_gib:.2f} | {shown} | {rows[-1]['seconds']:.1f} |", flush=True)
    dense.restore()
    return {
        **{"model": args.shape, "blocks": args.blocks, "of_blocks": SHAPES[args.shape].blocks, "dtype": "bfloat16"},
        **{"windows": args.windows, "window_tokens": args.window_tokens, "batch_tokens": batch_tokens(bundle, device)},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        **{"torch": torch.__version__, "transformers": transformers.__version__, "rows": rows},
    }


def row(bundle: Bundle, dense: DenseWeights, name: str, windows: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Estimated and measured memory of one method."""
    method, patterns = METHODS[name], dict.fromkeys(bundle.layers, Pattern(2, 4))
    estimated = planned(bundle, method, tuple(windows.shape), device.type, True, batch_tokens(bundle, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    begin = time.perf_counter()
    with Meter(device) as meter:
        init = Wanda() if name == "swaps" else None
        pruned = prune_one_shot(bundle, dense, method, patterns, windows, name, init=init).pruned
    assert len(pruned.layers) == len(bundle.layers)
    return {
        **{"method": name, "estimated_bytes": estimated, "peak_bytes": meter.device_bytes},
        **{"host_bytes": meter.host_bytes, "seconds": time.perf_counter() - begin},
    }


if __name__ == "__main__":
    main()
