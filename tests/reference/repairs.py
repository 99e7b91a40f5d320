"""Repairs of the three ranges, small and correct, and repairs that break what the host or the kit promises.

The file is a plugin as well: `--plugin tests/reference/repairs.py`.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import torch

import nmbench
from nmbench.evaluation import Objective

KILLS = "NMBENCH_TEST_KILLS"  # environment variable: the stage of the progress at which the process kills itself


@dataclass(frozen=True)
class Rescale(nmbench.LayerRepair):
    """Scale every row of the kept weights so that its outputs are nearest to the dense ones."""

    needs = nmbench.Stat.GRAM

    def repair(self, weight, stats, start, pattern):
        kept = start.weight.float()
        through = kept @ stats.gram  # [out, in]
        wanted, had = (weight.float() * through).sum(1, keepdim=True), (kept * through).sum(1, keepdim=True)  # [out, 1]
        scale = torch.where(had > 0, wanted / had, 1.0).nan_to_num(1.0, 1.0, 1.0)
        return nmbench.Pruned(start.mask, (scale * kept).masked_fill(~start.mask, 0.0).to(weight.dtype))


@dataclass(frozen=True)
class Nearer(nmbench.BlockRepair):
    """Bring the outputs of a block nearer to those of the dense block by a few steps of Adam."""

    steps: int = nmbench.option(4, "updates of each part", unit="steps")
    rate: float = nmbench.option(1e-3, "step size")
    scope: str = nmbench.option("block", "what is trained at once", choices=nmbench.SCOPES)
    minibatch: int = nmbench.option(8, "windows of a batch", unit="windows")

    def repair_block(self, block):
        found = {}
        for part in block.parts(self.scope):
            trained = self.trained(block, part)
            part.write(trained)
            found.update(trained)
        return found

    def trained(self, block, part):
        masters = {name: self.begin(block, name).float().clone().requires_grad_() for name in part.layers}
        targets = [part.target(number, 0.5) for number in range(part.batches)]
        optimiser = torch.optim.Adam(list(masters.values()), lr=self.rate)
        loss = torch.zeros(())
        for step in range(self.steps):
            optimiser.zero_grad()
            for number, target in enumerate(targets):
                loss = (part.outputs(number, masters).float() - target.float()).square().mean()
                (loss * part.tokens(number).numel()).backward()
            for name, master in masters.items():
                master.grad.mul_(block.masks[name])
            optimiser.step()
            block.progress(step + 1, self.steps)
        block.report(loss=float(loss.detach()))
        return {name: master.detach().masked_fill(~block.masks[name], 0.0) for name, master in masters.items()}

    def begin(self, block, name):
        return block.weights[name]


@dataclass(frozen=True)
class Tune(nmbench.WeightLearner):
    """Bring the predictions of the pruned model nearer to those of the dense model by a few steps of Adam."""

    steps: int = nmbench.option(4, "updates of all weights", unit="steps")
    rate: float = nmbench.option(1e-3, "step size")
    minibatch: int = nmbench.option(8, "windows per step", unit="windows")
    checkpoint_every: int = nmbench.option(2, "steps between two checkpoints", unit="steps")

    def learn(self, task):
        device = task.bundle.device
        masters = {name: weight.to(device, torch.float32, copy=True) for name, weight in task.weights.items()}
        masks = {name: mask.to(device) for name, mask in task.initial.items()}
        optimiser = torch.optim.Adam([master.requires_grad_() for master in masters.values()], lr=self.rate)
        done = self.resume(task, masters, optimiser)
        with task.training() as live, torch.no_grad():
            for step in range(done, self.steps):
                for name, master in masters.items():
                    live.write(name, master)
                batch = next(task.batches(self.minibatch, task.generator))
                losses = self.backward(live, batch.tokens)
                for name, master in masters.items():
                    master.grad = live.gradient(name).float() * masks[name]
                optimiser.step()
                task.report(step + 1, total=self.steps, loss=float(losses.mean()))
                if (step + 1) % self.checkpoint_every == 0:
                    task.checkpoints.save(self.state(task, step + 1, masters, optimiser))
        return {
            name: nmbench.Pruned(masks[name], master.detach().masked_fill(~masks[name], 0.0))
            for name, master in masters.items()
        }

    def backward(self, live, tokens):
        return live.backward(tokens, Objective(kl=1.0))

    def state(self, task, step, masters, optimiser):
        random = task.generator.get_state()
        return {"step": step, "random": random, "masters": masters, "optimiser": optimiser.state_dict()}

    @torch.no_grad()
    def resume(self, task, masters, optimiser):
        state = task.checkpoints.load()
        if state is None:
            return 0
        for name, master in masters.items():
            master.copy_(state["masters"][name])
        optimiser.load_state_dict(state["optimiser"])
        task.generator.set_state(state["random"])
        return state["step"]


BREAKS = ("mask", "off the mask", "nan", "negative zero", "shape", "worse")


def broken(how, mask, weight):
    """A pruned layer that breaks what `how` names."""
    if how == "mask":
        return nmbench.Pruned(mask.roll(1, 0), weight.roll(1, 0))
    weight = weight.clone()
    if how == "off the mask":
        weight[~mask] = 1e-3
    elif how == "nan":
        weight[mask] = torch.nan
    elif how == "negative zero":
        weight[~mask] = -0.0
    elif how == "shape":
        weight = weight[:-1]
    elif how == "worse":
        weight = weight.zero_()
    return nmbench.Pruned(mask, weight)


@dataclass(frozen=True)
class BrokenLayers(nmbench.LayerRepair):
    """Return a broken layer."""

    how: str = nmbench.option("mask", "what is broken", choices=BREAKS)

    def repair(self, weight, stats, start, pattern):
        return broken(self.how, start.mask, start.weight)


@dataclass(frozen=True)
class BrokenBlocks(nmbench.BlockRepair):
    """Return a broken block."""

    how: str = nmbench.option("nan", "what is broken", choices=BREAKS)

    def repair_block(self, block):
        return {name: broken(self.how, block.masks[name], weight).weight for name, weight in block.weights.items()}


@dataclass(frozen=True)
class BrokenModel(nmbench.WeightLearner):
    """Return a broken model."""

    how: str = nmbench.option("mask", "what is broken", choices=BREAKS)

    def learn(self, task):
        return {name: broken(self.how, task.initial[name], weight) for name, weight in task.weights.items()}


@nmbench.hookimpl
def nmbench_register_repairs(register):
    register("rescale", Rescale)
    register("nearer", Nearer)
    register("tune", Tune)
    register("broken-layers", BrokenLayers)
    register("broken-blocks", BrokenBlocks)
    register("broken-model", BrokenModel)


@nmbench.hookimpl
def nmbench_progress(event):
    if os.environ.get(KILLS) == f"{event.stage} {event.done}":
        os.kill(os.getpid(), signal.SIGKILL)
