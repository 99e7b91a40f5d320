"""The choice of the engine that computes the steps, with its reason."""

from __future__ import annotations

from collections import Counter

import torch

import nmbench
from nmbench.pruning import LiveWeights
from nmbench_plugins.maskpro.engines.base import Engine
from nmbench_plugins.maskpro.engines.step_graph import record
from nmbench_plugins.maskpro.engines.streamed_engine import StreamedEngine
from nmbench_plugins.maskpro.engines.torch_engine import TorchEngine
from nmbench_plugins.maskpro.kernels import launch
from nmbench_plugins.maskpro.tracker import Rule

WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(task: nmbench.LearnTask, live: LiveWeights, rule: Rule, engine: str, logits: str) -> Engine:
    """Return the streamed engine where that engine is possible, else the torch engine, whose note gives the reason.

    Raises `NMBenchError` if the option `engine` or `logits` asks for something that is impossible here.
    """
    reason = f"{task.who}.engine=torch" if engine == "torch" else obstacle(task, live)
    if reason is None:
        return StreamedEngine(task, live, rule, launch, logits, record)
    if engine == "streamed":
        raise nmbench.NMBenchError(f"{task.who}.engine=streamed is impossible: {reason}; use {task.who}.engine=auto.")
    if logits != "float32":
        raise nmbench.NMBenchError(
            f"{task.who}.logits={logits} needs the streamed engine, which is impossible: {reason}; use float32."
        )
    return TorchEngine(task, live, rule, reason)


def obstacle(task: nmbench.LearnTask, live: LiveWeights) -> str | None:
    """Return the reason why the streamed engine cannot learn this model, or None."""
    device = task.bundle.device
    if device.type != "cuda":
        return f"the device is {device.type}"
    for pattern in sorted(set(task.pattern.values())):
        if pattern.unit > 1 or not launch.usable(pattern.keep, pattern.group, device):
            return f"no fused kernel for {pattern}"
    layers = task.bundle.layers
    if len({layer.dtype for layer in layers.values()}) > 1 or task.bundle.dtype not in WEIGHT_TYPES:
        return "no fused kernel for weights of these types"
    for name in task.layers:
        if not layers[name].read().is_contiguous():
            return f"{name} stores its weight the other way round"
    if live.obstacle:
        return live.obstacle
    return not_computed_once(task, live)


def not_computed_once(task: nmbench.LearnTask, live: LiveWeights) -> str | None:
    """Return a text on the first layer that one forward pass does not compute exactly once, or None.

    The streamed engine updates a layer whenever the forward pass computes that layer.
    """
    calls: Counter[str] = Counter()

    def dense(name: str) -> torch.Tensor:
        calls[name] += 1
        return task.bundle.layers[name].values()

    with live.provided(dense):
        task.loss(task.pool[:1])
    others = [name for name in task.layers if calls[name] != 1]
    return f"{others[0]} is computed {calls[others[0]]} times in a forward pass" if others else None
