"""The time of a MaskPro step on a CPU without the model: nmbench against the plain sequence of torch calls, at 2:4.

    python maskpro_cpu.py --json results/maskpro_cpu.json

Both draw a mask, mask the weights, compute the gradient of its log probability and update the logits, on one matrix of
float32 weights. The plain sequence is softmax, `torch.multinomial` without replacement, scatter, product; softmax, the
closed form of the gradient, update. Both are timed alternately in one process; the table shows medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmbench import Bundle, LearnTask, Pattern
from nmbench.experiment.environment import cpu_name
from nmbench.models.dense_weights import DenseWeights
from nmbench.results.files import MemoryCheckpoints
from nmbench_plugins.maskpro.engines.logits import Logits

PATTERN = Pattern(2, 4)
SCALE = 1e-3  # of the update
PRIOR = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, nargs="+", default=[1, 4, 16], help="sizes to measure, in 2^20 weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    print(f"{'weights':>10} {'plain ms':>10} {'nmbench ms':>11} {'ratio':>6}   draw, mask, update ms")
    for size in args.weights:
        row = measure(size * 2**20, args.repeats)
        rows.append(row)
        parts = ", ".join(f"{row['parts_ms'][name]:.1f}" for name in ("draw", "mask", "update"))
        print(f"{size:>8} Mi {row['plain_ms']:>10.1f} {row['nmbench_ms']:>11.1f} {row['ratio']:>6.1f}   {parts}")
    environment = {"device": cpu_name(), "threads": args.threads, "torch": torch.__version__}
    if args.json:
        args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(weights: int, repeats: int) -> dict[str, Any]:
    """Median times of both, measured alternately."""
    task = task_of(weights)
    plain = Plain(task)
    with task.live_weights() as live:
        logits = Logits.prior(task, PRIOR)
        drawn: list[Any] = [None]
        ours: dict[str, Callable[[], None]] = {
            "draw": lambda: drawn.__setitem__(0, logits.draw(task.generator)),
            "mask": lambda: live.apply(drawn[0].by_layer),
            "update": lambda: logits.step(drawn[0], SCALE),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ("plain", *ours)}
        for turn in range(repeats + 1):
            for name, part in {"plain": plain.step, **ours}.items():
                seconds[name] += [clocked(part)] if turn else warm(part)
    whole = [sum(parts) for parts in zip(*(seconds[name] for name in ours), strict=True)]
    plain_ms, nmbench_ms = (1000 * statistics.median(times) for times in (seconds["plain"], whole))
    return {
        "weights": weights,
        "plain_ms": plain_ms,
        "nmbench_ms": nmbench_ms,
        "ratio": plain_ms / nmbench_ms,
        "parts_ms": {name: 1000 * statistics.median(seconds[name]) for name in ours},
        "all_seconds": seconds,
    }


def clocked(part: Callable[[], None]) -> float:
    began = time.perf_counter()
    part()
    return time.perf_counter() - began


def warm(part: Callable[[], None]) -> list[float]:
    part()
    return []


def task_of(weights: int) -> LearnTask:
    """A learning task on a model of one matrix."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(1024, weights // 1024, bias=False)])
    bundle = Bundle.of("one matrix", model, None)
    masks = {name: PATTERN.top(layer.read().abs()) for name, layer in bundle.layers.items()}
    tokens = torch.zeros(4, 2, dtype=torch.int64)
    patterns = dict.fromkeys(bundle.layers, PATTERN)
    return LearnTask(bundle, DenseWeights(bundle), patterns, masks, tokens, tokens, 0, MemoryCheckpoints(), "maskpro")


class Plain:
    """The plain sequence of the published code, with its gradient for two kept weights."""

    def __init__(self, task: LearnTask) -> None:
        (self.weight,) = task.dense.values()
        (mask,) = task.initial.values()
        self.generator = task.generator
        self.logits = PRIOR * mask.reshape(-1, PATTERN.group).float()
        self.masked = torch.empty_like(self.weight)

    def step(self) -> None:
        probability = self.logits.softmax(-1)
        chosen = torch.multinomial(probability, PATTERN.keep, generator=self.generator)  # [groups, 2]
        mask = torch.zeros_like(probability).scatter_(1, chosen, 1.0)
        torch.mul(self.weight, mask.view(self.weight.shape), out=self.masked)
        self.logits.add_(self.gradient(chosen, mask), alpha=SCALE)

    def gradient(self, chosen: Tensor, mask: Tensor) -> Tensor:
        """The gradient of log P = log p_a + log p_b + log(1 / q_a + 1 / q_b) with q = 1 - p."""
        probability = self.logits.softmax(-1)
        p = probability.gather(1, chosen)  # [groups, 2]
        q = 1 - p
        share = p / q.square() / q.reciprocal().sum(1, keepdim=True)
        return (mask - (2 + share.sum(1, keepdim=True)) * probability).scatter_add_(1, chosen, share)


if __name__ == "__main__":
    main()
