"""The device memory of MaskPro and flips with weights in 8 bits, beside the same with bfloat16.

    python eight_bit.py --json results/eight_bit_smollm2.json                       the shape of SmolLM2-135M
    python eight_bit.py --shape llama-3.1-8b --blocks 4 --json results/eight_bit_8b.json      4 blocks of 32

For every learner and form of weights, bytes for each prunable weight: `model`, the loaded model; `held`, all that is
there between two steps, the model included; `peak`, the most that torch allocated, also within a step. Embeddings and
output layer do not grow with the number of blocks, so that `held_in_blocks` leaves them out: it is what one more block
adds. The text is random, so that losses say nothing. On a CPU, `held` counts all living tensors, host copies of the
dense weights among them, and there is no peak. Figures are stored after every row.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from shapes import SHAPES, random_model

from nmbench import MaskLearner, Pattern
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.rounding import store_eight_bit
from nmbench.pruning import LearnTask
from nmbench.results.files import MemoryCheckpoints
from nmbench_plugins.maskpro import MaskPro
from nmbench_plugins.swaps import Flips

RESULTS = Path(__file__).parent / "results" / "eight_bit.json"
WEIGHTS = ("bfloat16", "int8")
TWO_FOUR = Pattern(2, 4)


def learners(args: argparse.Namespace) -> dict[str, MaskLearner]:
    """The learners by name; none of them keeps checkpoints, and each takes `--steps` steps."""
    pro = {"steps": args.steps, "minibatch": 16, "check_every": args.steps, "checkpoint_every": 10**6, "select": False}
    tokens = dict.fromkeys(("evidence_tokens", "screen_tokens", "confirm_tokens"), args.tokens)
    found: dict[str, MaskLearner] = {
        "maskpro": MaskPro(**pro),
        "maskpro, torch engine": MaskPro(**pro, engine="torch"),
        "flips": Flips(steps=min(args.steps, 3), sweeps=1, checkpoint_every=10**6, check_every=10**6, **tokens),
        "flips, no earlier evidence": Flips(steps=min(args.steps, 3), sweeps=1, decay=0.0, **tokens),
    }
    if args.device == "cuda":
        found["maskpro, float16 logits"] = MaskPro(**pro, logits="float16")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step of flips, three times")
    parser.add_argument("--window-tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=480, help="no other learner begins after these")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    began, rows = time.perf_counter(), []
    print("| learner | weights | model, B a weight | held | held in blocks | peak | seconds a step |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, method in learners(args).items():
        for weights in WEIGHTS:
            if time.perf_counter() - began < args.seconds:
                rows.append({"learner": name, "weights": weights, **measured(args, method, weights)})
                print(line(rows[-1]), flush=True)
                store(args, rows)


def store(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows so far, so that a run that is ended keeps them."""
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    about = {"device": gpu, "torch": torch.__version__, "transformers": transformers.__version__}
    shape = {"shape": args.shape, "blocks": args.blocks or SHAPES[args.shape].blocks, "pattern": str(TWO_FOUR)}
    args.json.write_text(json.dumps({**about, **shape, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    figures = (row[name] for name in ("model", "held", "held_in_blocks", "peak", "seconds"))
    shown = ("-" if figure is None else f"{figure:.2f}" for figure in figures)
    return f"| {row['learner']} | {row['weights']} | {' | '.join(shown)} |"


def measured(args: argparse.Namespace, method: MaskLearner, weights: str) -> dict[str, Any]:
    """Bytes for each prunable weight, and seconds a step, of a learner on a random model."""
    device = torch.device(args.device)
    gc.collect()
    before = living(device)
    bundle = random_model(args.shape, args.blocks, torch.bfloat16, device)
    if weights == "int8":
        store_eight_bit(bundle)
    count = sum(layer.read().numel() for layer in bundle.layers.values())
    inside = sum(size(p) for block in bundle.blocks.values() for p in block.parameters())
    model = sum(map(size, bundle.tensors().values()))
    held: list[int] = []
    at: dict[int, float] = {}  # step -> when it was first reported

    def note(stage: str, step: int, *others: Any) -> None:
        if stage == "learn":
            held.append(living(device) - before)
            at.setdefault(step, time.perf_counter())

    task = task_of(args, bundle, note)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    method.learn(task)
    times = sorted(at.values())
    outside = model - inside
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
    return {
        **{"prunable_weights": count, "model": model / count, "held": max(held) / count},
        **{"held_in_blocks": (max(held) - outside) / count, "peak": peak and peak / count},
        "seconds": (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        "engine": task.notes.get("engine"),
    }


def task_of(args: argparse.Namespace, bundle: Bundle, note: Any) -> LearnTask:
    """A task of random text, from the masks of the largest weights."""
    generator = torch.Generator().manual_seed(0)
    pool, selection = (
        torch.randint(SHAPES[args.shape].vocabulary, (n, args.window_tokens), generator=generator) for n in (256, 8)
    )
    masks = {name: TWO_FOUR.top(layer.values().abs()).cpu() for name, layer in bundle.layers.items()}
    patterns = dict.fromkeys(bundle.layers, TWO_FOUR)
    given = (bundle, DenseWeights(bundle), patterns, masks, pool, selection, 0, MemoryCheckpoints(), "learner", note)
    return LearnTask(*given)


def living(device: torch.device) -> int:
    """The bytes that living tensors take on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    tensors = (it for it in gc.get_objects() if isinstance(it, torch.Tensor))
    storages = {it.untyped_storage().data_ptr(): it.untyped_storage().nbytes() for it in tensors}
    return sum(storages.values())


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    main()
