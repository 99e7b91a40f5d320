"""The time of a one-shot method over the bare forward passes that it needs.

    python one_shot_cost.py --shape smollm2-135m                               a random model of that shape
    python one_shot_cost.py --shape llama-3.1-8b --blocks 4 --dtype bfloat16   a slice of it
    python one_shot_cost.py --model FOLDER                                     a real one
    python one_shot_cost.py --stream ...                                       blocks come from the host, on a GPU

Bare passes: the model without its output layer runs on the windows twice, in the same batches, with no hook, no
statistic and nothing pruned; the second time, it stops before its last block. The whole run of a method is
`prune_one_shot`: the walk with its statistics, the choice of all masks, and the dense weights put back. Both are timed
in turn, several times; the ratio is that of the medians. The first turn is not counted; it includes the trial that a
model can be walked, which is made once per model. The tokens are random, which costs the same.

`peak_bytes`: the most that torch had allocated on the GPU during a run, the model included. The ratio must be at most
1.2 for Wanda on an H100; with `--stream` there is no ratio to keep, and the peak must not be above the one in
`docs/benchmarks/one-shot-cost.md`.

`put back`: the seconds of the run in which dense weights are restored; `prove`: the same with the proof by hash that
ends every row of `nmbench run`. Both depend on the size of the model and not on the number of windows.
"""

from __future__ import annotations

import argparse
import contextlib
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
from nmbench.calibration.walk import batches_of
from nmbench.experiment.environment import cpu_name
from nmbench.experiment.loading import load_model
from nmbench.methods import Baseline, Stat
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.forward import run_model
from nmbench.models.hooks import hooks
from nmbench.pruning.one_shot import prune_one_shot
from nmbench_plugins.magnitude import Magnitude
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.wanda import Wanda

METHODS: dict[str, Baseline] = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT()}


class Enough(Exception):
    """Stops a forward pass."""


@torch.no_grad()
def bare(bundle: Bundle, windows: Tensor) -> Callable[[], None]:
    """The forward passes of a walk, and nothing else."""
    batches = batches_of(bundle, windows)
    blocks = list(bundle.blocks.values())

    def stop(*_: Any) -> None:
        raise Enough

    @torch.no_grad()
    def passes() -> None:
        for place in (blocks[-1].register_forward_hook, blocks[-1].register_forward_pre_hook):
            with hooks([place(stop)]):
                for batch in batches:
                    with contextlib.suppress(Enough):
                        run_model(bundle.model, batch)

    return passes


def measured(work: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Seconds, and the most bytes allocated on a GPU meanwhile; 0 on a CPU."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() if on_gpu else 0


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
    peaks = dict.fromkeys(works, 0)
    for turn in range(repeats + 1):
        for name, work in works.items():
            took, peak = measured(work, bundle.device)
            peaks[name] = max(peaks[name], peak)
            if turn:
                found[name].append(took)
    rows = {}
    for name, times in found.items():
        rows[name] = {"seconds": median(times), "least": min(times), "most": max(times), "peak_bytes": peaks[name]}
        if name in names and METHODS[name].needs is not Stat.NONE:
            rows[name]["ratio"] = median(times) / median(found["bare"])
    return rows


def model_of(args: argparse.Namespace, device: torch.device) -> Bundle:
    if args.model is None:
        shape = SHAPES[args.shape]
        share = shape.vocabulary * (args.blocks or shape.blocks) // shape.blocks  # a slice has its share of embeddings
        start = torch.device("cpu") if args.stream else device
        bundle = random_model(args.shape, args.blocks, getattr(torch, args.dtype), start, share)
        if args.stream:
            bundle.stream(device)
        return bundle
    place = Bundle.stream if args.stream else Bundle.to
    return load_model(args.model, load_plugins(), dtype=args.dtype, device=device.type, place=place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; without it, a random model")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--blocks", type=int, help="of a random model  [all]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--stream", action="store_true", help="keep the blocks on the host")
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
    print("| | seconds | times bare passes | peak GiB |\n|---|---|---|---|")
    for name, row in rows.items():
        times = f"{row['seconds']:.3f} ({row['least']:.3f} to {row['most']:.3f})"
        print(f"| {name} | {times} | {row.get('ratio', '')} | {row['peak_bytes'] / 2**30:.2f} |")
    content = {
        "model": Path(args.model).name if args.model else args.shape,
        "blocks": len(bundle.blocks),
        **{"windows": args.windows, "window_tokens": args.window_tokens, "dtype": args.dtype},
        "streamed": args.stream,
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
