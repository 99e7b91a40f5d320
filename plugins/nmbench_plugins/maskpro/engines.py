"""Which engine computes the steps, and why."""

from __future__ import annotations

from collections import Counter

import torch

import nmbench
from nmbench.pruning import LiveWeights
from nmbench_plugins.maskpro import kernels
from nmbench_plugins.maskpro.engine import Engine, TorchEngine
from nmbench_plugins.maskpro.streamed import StreamedEngine
from nmbench_plugins.maskpro.tracker import Rule

ENGINES = ("auto", "streamed", "torch")
WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(task: nmbench.LearnTask, live: LiveWeights, rule: Rule, engine: str, logits: str) -> Engine:
    """The streamed engine where it can be, else the torch engine, whose note says why.

    Raises `NMBenchError` if that is not the engine, or not the type of logits, that was asked for.
    """
    reason = f"{task.who}.engine=torch" if engine == "torch" else obstacle(task, live)
    if reason is None:
        return StreamedEngine(task, live, rule, kernels, logits)
    if engine == "streamed":
        raise nmbench.NMBenchError(f"{task.who}.engine=streamed is impossible: {reason}; use {task.who}.engine=auto.")
    if logits != "float32":
        raise nmbench.NMBenchError(
            f"{task.who}.logits={logits} needs the streamed engine, which is impossible: {reason}; use float32."
        )
    return TorchEngine(task, live, rule, reason)


def obstacle(task: nmbench.LearnTask, live: LiveWeights) -> str | None:
    """Why the streamed engine cannot learn this model, or None."""
    device = task.bundle.device
    if device.type != "cuda":
        return f"the device is {device.type}"
    for pattern in sorted(set(task.pattern.values())):
        if not kernels.fused(pattern.keep, pattern.group, device):
            return f"no fused kernel for {pattern}"
    if len({live[name].dtype for name in task.layers}) > 1 or live[next(iter(task.layers))].dtype not in WEIGHT_TYPES:
        return "no fused kernel for weights of these types"
    for name in task.layers:
        if not live[name].is_contiguous():
            return f"{name} stores its weight the other way round"
    if live.fused:
        return f"{live.fused} is one of several experts in one parameter"
    return unlike_once(task, live)


def unlike_once(task: nmbench.LearnTask, live: LiveWeights) -> str | None:
    """Why the layers cannot be updated as the forward pass comes by, or None: each must be computed exactly once."""
    asked: Counter[str] = Counter()

    def dense(name: str) -> torch.Tensor:
        asked[name] += 1
        return live[name]

    with live.provided(dense):
        task.loss(task.pool[:1])
    others = [name for name in task.layers if asked[name] != 1]
    return f"{others[0]} is computed {asked[others[0]]} times in a forward pass" if others else None
