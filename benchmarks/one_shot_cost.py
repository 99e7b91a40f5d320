"""The time of a one-shot method over the bare forward passes that it needs.

    python one_shot_cost.py --shape smollm2-135m                               a random model of that shape
    python one_shot_cost.py --shape llama-3.1-8b --blocks 4 --dtype bfloat16   a slice of it
    python one_shot_cost.py --model FOLDER                                     a real one

Bare passes: the windows are embedded and go once through every block, and once more through every block but the last,
in the same batches, with no hook, no statistic and nothing pruned. The whole run of a method is `prune_one_shot`: the
walk with its statistics, the choice of all masks, and the restored dense weights. Both are timed alternately, several
times; the ratio is that of the medians. The tokens are random, which does not change the time.

`put back`: the seconds of the run in which dense weights are restored; `prove`: the same with the proof by hash that
ends every row of `nmbench run`. Both depend on the size of the model and not on the number of windows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from shapes import SHAPES, random_model
from torch import Tensor

from nmbench import Pattern, load_plugins
from nmbench.calibration.block_calls import Run, embed
from nmbench.calibration.walk import batches_of
from nmbench.experiment.environment import cpu_name
from nmbench.experiment.loading import load_model
from nmbench.methods import Baseline, Stat
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pruning.one_shot import prune_one_shot
from nmbench_plugins.magnitude import Magnitude
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.wanda import Wanda

METHODS: dict[str, Baseline] = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT()}


@torch.no_grad()
def bare(bundle: Bundle, windows: Tensor) -> Callable[[], None]:
    """A function that runs the forward passes of a walk alone; the arguments of the blocks are captured beforehand."""
    batches = batches_of(bundle, windows)
    _, calls = embed(bundle, batches)
    blocks = list(bundle.blocks.values())
    runs = [Run({size: c[index] for size, c in calls.items()}) for index in range(len(blocks))]

    @torch.no_grad()
    def passes() -> None:
        hidden = [bundle.model.get_input_embeddings()(batch) for batch in batches]
        for index, (run, block) in enumerate(zip(runs, blocks, strict=True)):
            for batch in hidden:
                run(block, batch)
            if index + 1 < len(blocks):
                hidden = [run(block, batch) for batch in hidden]

    return passes


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(bundle: Bundle, windows: Tensor, names: list[str], repeats: int) -> dict[str, Any]:
    """Seconds of bare passes and of every method, alternately, `repeats` times after one repetition of warm-up.

    A method much slower than its passes, as SparseGPT on a CPU, has as many repetitions as the others.
    """
    dense, patterns = DenseWeights(bundle), dict.fromkeys(bundle.layers, Pattern(2, 4))

    def prune(name: str) -> Callable[[], Any]:
        return lambda: prune_one_shot(bundle, dense, METHODS[name], patterns, windows, name).pruned

    works: dict[str, Callable[[], Any]] = {"bare": bare(bundle, windows), **{n: prune(n) for n in names}}
    works |= {"put back": dense.put_back, "prove": dense.restore}
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            took = seconds(work, bundle.device)
            if turn:
                found[name].append(took)
    rows = {}
    for name, times in found.items():
        rows[name] = {"seconds": median(times), "least": min(times), "most": max(times)}
        if name in names and METHODS[name].needs is not Stat.NONE:
            rows[name]["ratio"] = median(times) / median(found["bare"])
    return rows


def model_of(args: argparse.Namespace, device: torch.device) -> Bundle:
    if args.model is None:
        shape = SHAPES[args.shape]
        share = shape.vocabulary * (args.blocks or shape.blocks) // shape.blocks  # a slice has its share of embeddings
        return random_model(args.shape, args.blocks, getattr(torch, args.dtype), device, share)
    return load_model(args.model, load_plugins(), dtype=args.dtype, device=device.type)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; without it, a random model")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--blocks", type=int, help="of a random model  [all]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window-tokens", type=int, default=2048)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["magnitude", "wanda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    bundle = model_of(args, device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = bundle.model.get_input_embeddings().weight.shape[0]
    windows = torch.randint(vocabulary, (args.windows, args.window_tokens), generator=generator)
    rows = measure(bundle, windows, args.methods, args.repeats)
    print("| | seconds | times bare passes |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['seconds']:.3f} ({row['least']:.3f} to {row['most']:.3f}) | {row.get('ratio', '')} |")
    content = {
        "model": Path(args.model).name if args.model else args.shape,
        "blocks": len(bundle.blocks),
        **{"windows": args.windows, "window_tokens": args.window_tokens, "dtype": args.dtype},
        "batches": len(batches_of(bundle, windows)),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        **{"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()},
        "rows": rows,
    }
    if args.json:
        before = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else []
        args.json.write_text(json.dumps([*before, content], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
