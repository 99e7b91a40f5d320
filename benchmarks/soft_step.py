"""The time of an update of `soft` beside the forward and backward pass that it contains, and its memory.

    python soft_step.py --model FOLDER --json results/soft_step_h100.json

In one process, for both dtypes of the moments and for compiled passes: the bare pass (teacher, forward, loss, backward)
and the whole update (soft masks, the same pass, logits), as CUDA graphs unless the passes are compiled; then the bytes
that are allocated for a prunable weight: live and dense weight, its gradient, logits and moments. `--shape llama-3.1-8b
--blocks 4` takes random weights in place of a model, because speed and memory do not depend on their values. Needs a
GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, random_model
from timing import seconds
from torch import Tensor

from nmbench import Bundle, LearnTask, Pattern, load_plugins
from nmbench.evaluation import Objective
from nmbench.experiment.environment import version
from nmbench.experiment.loading import load_model
from nmbench.models.dense_weights import DenseWeights
from nmbench.pruning import Replay, Training
from nmbench.results.files import MemoryCheckpoints
from nmbench_plugins.soft.logits import Logits
from nmbench_plugins.soft.schedule import Setting
from nmbench_plugins.soft.steps import Steps

SETTING = Setting(step=0, temperature=0.5, noise=0.02, rate=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--pattern", type=Pattern.parse, default=Pattern(2, 4))
    parser.add_argument("--minibatch", type=int, default=16)
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    rows = []
    for moments, compiled in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        bundle = (
            random_model(args.shape, args.blocks, torch.bfloat16, device)
            if args.shape
            else load_model(args.model, load_plugins(), dtype="bfloat16", device="cuda")
        )
        setting = {"moments": str(moments).removeprefix("torch."), "compiled": compiled}
        rows.append({**setting, **measured(bundle, args, moments, compiled)})
        print(json.dumps(rows[-1]), flush=True)
        del bundle
        gc.collect()
        torch.cuda.empty_cache()
    if args.json:
        versions = {package: version(package) for package in ("torch", "transformers", "triton")}
        about = {"device": torch.cuda.get_device_name(), **versions, "model": args.shape or Path(args.model).name}
        args.json.write_text(json.dumps({**about, "pattern": str(args.pattern), "rows": rows}, indent=1) + "\n")


@torch.no_grad()
def measured(bundle: Bundle, args: argparse.Namespace, moments: torch.dtype, compiled: bool) -> dict[str, Any]:
    """Time the bare pass and the update; count bytes."""
    vocabulary = bundle.model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (args.minibatch, args.window_tokens), device=bundle.device)
    weights = sum(layer.read().numel() for layer in bundle.layers.values())
    live_bytes = sum(layer.read().nbytes for layer in bundle.layers.values())
    task, objective = task_of(bundle, args.pattern, args.window_tokens), Objective(args.kl)
    before = torch.cuda.memory_allocated()
    with task.gradients() as live:
        if compiled:
            live.compile(tokens, objective)
        bare_ms = bare_milliseconds(live, tokens, objective, args.repeats)
        steps = Steps(
            live,
            Logits(task.pattern, task.initial, task.bundle.device, 0.2, 0.02, moments),
            objective,
            straight=False,
            seed=0,
        )
        steps.take(tokens, SETTING)
        torch.cuda.reset_peak_memory_stats()
        step_ms = milliseconds(lambda: steps.take(tokens, SETTING), args.repeats)
        added = held(live, steps, live_bytes)
        peak = torch.cuda.max_memory_allocated()
    note = "; ".join(f"{name}: {value}" for name, value in task.notes.items())
    return {
        **{"minibatch": args.minibatch, "window_tokens": args.window_tokens, "kl": args.kl},
        **{"bare_ms": round(bare_ms, 2), "step_ms": round(step_ms, 2), "ratio": round(step_ms / bare_ms, 3)},
        **{"prunable_weights": weights, "bytes_per_weight": round((live_bytes + added) / weights, 2)},
        **{"allocated_before_gib": round(before / 2**30, 2), "peak_gib": round(peak / 2**30, 2), "note": note},
    }


def bare_milliseconds(live: Training, tokens: Tensor, objective: Objective, repeats: int) -> float:
    """The part of an update that is not of `soft`: the passes of teacher and model, forward and backward."""
    bare = Replay(live, objective, lambda batch: live.backward(batch, objective))
    if bare.due:
        bare.capture(tokens)
    found = milliseconds(lambda: bare(tokens), repeats)
    live.clear()
    return found


def held(live: Training, steps: Steps, live_bytes: int) -> int:
    """The bytes of dense weights, gradients, logits and moments of all prunable weights."""
    state = [*steps.logits.values.values(), *steps.logits.first.values(), *steps.logits.second.values()]
    gradients = [parameter.grad for parameter in live.parameters.values() if parameter.grad is not None]
    return live_bytes + sum(tensor.nbytes for tensor in (*state, *gradients))


def task_of(bundle: Bundle, pattern: Pattern, window_tokens: int) -> LearnTask:
    """A task whose initial mask keeps the first members of every group."""
    keep = torch.arange(pattern.group) < pattern.keep
    initial = {n: keep.repeat(la.shape[1] // pattern.group).expand(la.shape) for n, la in bundle.layers.items()}
    windows = torch.zeros(8, window_tokens, dtype=torch.int64)
    patterns = dict.fromkeys(bundle.layers, pattern)
    return LearnTask(bundle, DenseWeights(bundle), patterns, initial, windows, windows, 0, MemoryCheckpoints(), "soft")


def milliseconds(run: Any, repeats: int) -> float:
    """Median milliseconds of a call between events, after one that is not counted."""
    return 1e3 * statistics.median(seconds(run, repeats, torch.device("cuda"), warm_up=1))


if __name__ == "__main__":
    main()
