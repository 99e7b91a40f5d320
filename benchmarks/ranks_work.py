"""What one rank does for `ranks.py`: imported when it has its GPU, because transformers may use CUDA."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from shapes import random_model

from nmbench import Bundle, LearnTask, MaskLearner, load_plugins
from nmbench.experiment.loading import load_model
from nmbench.methods import Baseline
from nmbench.models.dense_weights import DenseWeights
from nmbench.pruning import one_shot
from nmbench.pruning.shared_work import masks_digest
from nmbench.runtime.ranks import Ranks
from nmbench_plugins.maskpro import MaskPro
from nmbench_plugins.soft import Soft
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.wanda import Wanda

NEVER = 10**9  # steps
PRIOR = 0.3  # of MaskPro: small, so that a few steps change masks
MODES = ("per rank", "in all")  # what the minibatch is fixed for
WALKS: dict[str, Baseline] = {"wanda": Wanda(), "sparsegpt": SparseGPT()}


def rows(args: argparse.Namespace, ranks: Ranks) -> list[dict[str, Any]]:
    """The figures of every learner in every mode, and of every walk."""
    device = torch.device(args.device)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    if args.shape:
        bundle = random_model(args.shape, args.blocks, dtype, device)
    else:
        name = str(dtype).removeprefix("torch.")
        bundle = load_model(args.model, load_plugins(), dtype=name, device=args.device)
    weights = DenseWeights(bundle)
    modes = MODES if ranks.size > 1 else MODES[:1]
    learners = [name for name in args.methods if name not in WALKS]
    found = [learnt(args, bundle, weights, ranks, name, mode) for name in learners for mode in modes]
    return found + [walked(args, bundle, weights, ranks, name) for name in args.methods if name in WALKS]


def learnt(
    args: argparse.Namespace, bundle: Bundle, weights: DenseWeights, ranks: Ranks, name: str, mode: str
) -> dict[str, Any]:
    """Time the steps of one method."""
    minibatch = args.minibatch * (ranks.size if mode == "per rank" else 1)
    clock = Clock(args.warm_up, args.warm_up + args.steps, bundle.device)
    task = task_of(args, bundle, weights, minibatch, clock)
    if bundle.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    masks = method_of(args, name, minibatch).learn(task)
    tokens = minibatch * args.window_tokens
    peak = torch.cuda.max_memory_allocated() / 2**30 if bundle.device.type == "cuda" else None
    notes = {key: task.notes[key] for key in ("engine", "compiled", "cuda graph") if key in task.notes}
    return {
        **{"method": name, "ranks": ranks.size, "fixed": mode, "minibatch": minibatch},
        **{"window_tokens": args.window_tokens, "milliseconds": round(1e3 * clock.seconds / args.steps, 3)},
        **{"tokens_per_second": round(args.steps * tokens / clock.seconds, 1)},
        **{"peak_gib": peak and round(peak, 2), "masks": masks_digest(masks)[:12] if name == "maskpro" else None},
        "notes": notes,
    }


def walked(args: argparse.Namespace, bundle: Bundle, weights: DenseWeights, ranks: Ranks, name: str) -> dict[str, Any]:
    """Time the walk of one method."""
    windows = random_tokens(bundle, args.windows, args.window_tokens)
    method, patterns = WALKS[name], dict.fromkeys(bundle.layers, args.pattern)
    prune = functools.partial(one_shot.prune_one_shot, bundle, weights, method, patterns, windows, name, ranks=ranks)
    made = prune()
    digest = masks_digest(made.pruned.masks)[:12]
    del made
    if bundle.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [together(ranks, prune, bundle.device) for _ in range(args.repeats)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if bundle.device.type == "cuda" else None
    making = making_seconds(prune, bundle.device)
    median = statistics.median(seconds)
    return {
        **{"method": name, "ranks": ranks.size, "fixed": "in all", "windows": args.windows},
        **{"window_tokens": args.window_tokens, "seconds": round(median, 4), "least": round(min(seconds), 4)},
        **{"most": round(max(seconds), 4), "making": round(making, 4)},
        **{"tokens_per_second": round(windows.numel() / median, 1)},
        **{"peak_gib": peak and round(peak, 2), "masks": digest},
    }


def together(ranks: Ranks, work: Callable[[], Any], device: torch.device) -> float:
    """Seconds from the moment when all ranks are ready until the last one is done."""
    wait(device)
    ranks.every(True)
    began = time.perf_counter()
    work()
    wait(device)
    ranks.every(True)
    return time.perf_counter() - began


def making_seconds(prune: Callable[[], Any], device: torch.device) -> float:
    """Seconds in which this rank calls a method for its layers, waiting for the device at every call."""
    usual, spent = one_shot.prune_layer, [0.0]

    def timed(*given: Any) -> Any:
        wait(device)
        began = time.perf_counter()
        made = usual(*given)
        wait(device)
        spent[0] += time.perf_counter() - began
        return made

    one_shot.prune_layer = timed
    try:
        prune()
    finally:
        one_shot.prune_layer = usual
    return spent[0]


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Seconds between the reports of two steps, at which the device is waited for."""

    def __init__(self, first: int, last: int, device: torch.device) -> None:
        self.first, self.last, self.device = first, last, device
        self.seconds = 0.0

    def __call__(self, stage: str, done: int, total: int | None, values: Mapping[str, float]) -> None:
        if stage != "learn" or done not in (self.first, self.last):
            return
        wait(self.device)
        if done == self.first:
            self.seconds = -time.perf_counter()
        else:
            self.seconds += time.perf_counter()


def method_of(args: argparse.Namespace, name: str, minibatch: int) -> MaskLearner:
    """The method with as many steps as are timed, and one more, which ends with measurements."""
    steps = args.warm_up + args.steps + 1
    rare = {
        "minibatch": minibatch,
        "window_tokens": args.window_tokens,
        "check_every": NEVER,
        "checkpoint_every": NEVER,
    }
    if name == "maskpro":
        return MaskPro(steps=steps, select=False, prior=PRIOR, **rare)
    return Soft(
        tokens=steps * minibatch * args.window_tokens, compile=args.device == "cuda", moments="bfloat16", **rare
    )


def task_of(args: argparse.Namespace, bundle: Bundle, weights: DenseWeights, minibatch: int, clock: Clock) -> LearnTask:
    """A task whose initial mask keeps the first members of every group, on random tokens."""
    pattern = args.pattern
    keep = torch.arange(pattern.group) < pattern.keep
    initial = {n: keep.repeat(la.shape[1] // pattern.group).expand(la.shape) for n, la in bundle.layers.items()}
    pool = random_tokens(bundle, 2 * minibatch, args.window_tokens)
    patterns = dict.fromkeys(bundle.layers, pattern)
    return LearnTask(bundle, weights, patterns, initial, pool, pool[:4], 0, Nothing(), "it", clock)


def random_tokens(bundle: Bundle, windows: int, window_tokens: int) -> torch.Tensor:
    """The same windows on every rank."""
    vocabulary = bundle.model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (windows, window_tokens), generator=torch.Generator().manual_seed(0))


class Nothing:
    """No checkpoints."""

    def save(self, state: Mapping[str, Any]) -> None:
        pass

    def load(self) -> None:
        return None
