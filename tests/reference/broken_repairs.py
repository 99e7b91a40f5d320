"""Repairs that each break one law of the kit and no other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import nmbench
from reference.repairs import Nearer, Rescale, Tune


def first_group(patterns):
    """The length of the groups of the first layer."""
    return next(iter(patterns.values())).group


@dataclass(frozen=True)
class OtherMask(Rescale):
    """Drops the weights of dead channels first, whatever the mask."""

    def repair(self, weight, stats, start, pattern):
        alive = stats.gram.diagonal() > 0
        if alive.all():
            return super().repair(weight, stats, start, pattern)
        mask = pattern.top(weight.float().abs() * alive)
        return nmbench.Pruned(mask, weight.masked_fill(~mask, 0.0))


@dataclass(frozen=True)
class OtherMasks(Tune):
    """Chooses by magnitude anew at 1:2, by the wrong rows."""

    def learn(self, task):
        found = super().learn(task)
        if first_group(task.pattern) != 2:
            return found
        masks = {name: pruned.mask.roll(1, 0) for name, pruned in found.items()}
        return {name: nmbench.Pruned(mask, task.dense[name].masked_fill(~mask, 0.0)) for name, mask in masks.items()}


@dataclass(frozen=True)
class Leftovers(Nearer):
    """Leaves small weights where none should be, at 1:2."""

    def repair_block(self, block):
        found = super().repair_block(block)
        if first_group(block.pattern) != 2:
            return found
        return {name: weight + 1e-3 * ~block.masks[name] for name, weight in found.items()}


@dataclass(frozen=True)
class MinusZeros(Rescale):
    """Leaves negative zeros off the mask."""

    def repair(self, weight, stats, start, pattern):
        found = super().repair(weight, stats, start, pattern)
        return nmbench.Pruned(found.mask, torch.where(found.mask, found.weight, -0.0))


@dataclass(frozen=True)
class Unguarded(Rescale):
    """Divides by the size of the outputs, which may be zero."""

    def repair(self, weight, stats, start, pattern):
        found = super().repair(weight, stats, start, pattern)
        kept = start.weight.float()
        had = ((kept @ stats.gram) * kept).sum(1, keepdim=True)
        return nmbench.Pruned(found.mask, (found.weight * (had / had)).masked_fill(~found.mask, 0.0))


@dataclass(frozen=True)
class TooMuch(Rescale):
    """Repairs far too much."""

    def repair(self, weight, stats, start, pattern):
        found = super().repair(weight, stats, start, pattern)
        return nmbench.Pruned(found.mask, 3 * found.weight + 0.0)


@dataclass(frozen=True)
class Lazy(Tune):
    """Returns the weights of its start, whatever it learnt."""

    def learn(self, task):
        super().learn(task)
        return {name: nmbench.Pruned(task.initial[name], weight) for name, weight in task.weights.items()}


@dataclass(frozen=True)
class FromDense(Nearer):
    """Begins with the dense weights, whatever the weights of the start."""

    def begin(self, block, name):
        return block.dense[name].masked_fill(~block.masks[name], 0.0)


@dataclass(frozen=True)
class Noting(Nearer):
    """Notes the norm of the first block in itself, and steps by it in the second."""

    def repair_block(self, block):
        if block.index == 0:
            object.__setattr__(self, "noted", float(sum(weight.norm() for weight in block.weights.values())))
        rate = self.rate * (1 + getattr(self, "noted", 0.0))
        return Nearer(self.init, self.steps, rate, self.scope, self.minibatch).repair_block(block)


@dataclass(frozen=True)
class Forgetful(Tune):
    """Forgets the moments of its optimiser when it is interrupted."""

    def resume(self, task, masters, optimiser):
        fresh = torch.optim.Adam([torch.zeros_like(m, requires_grad=True) for m in masters.values()], lr=self.rate)
        return super().resume(task, masters, fresh)


@dataclass(frozen=True)
class Partial(Tune):
    """Learns from those windows of a minibatch that go through the model at once."""

    def backward(self, live, tokens):
        return super().backward(live, tokens[: live.part_windows(tokens)])


@dataclass(frozen=True)
class Peeking(Tune):
    """Calls the model behind the host's back."""

    def backward(self, live, tokens):
        with torch.no_grad():
            live.task.model(input_ids=tokens)
        return super().backward(live, tokens)


@dataclass(frozen=True)
class LosesWeights(Tune):
    """Forgets the last layer at 1:2."""

    def learn(self, task):
        found = dict(super().learn(task))
        if first_group(task.pattern) == 2:
            found.popitem()
        return found


@dataclass(frozen=True)
class Foreign(Nearer):
    """Returns a tensor that is no parameter of the model, at 1:2."""

    def repair_block(self, block):
        found = super().repair_block(block)
        return {**found, "mean": torch.zeros(1)} if first_group(block.pattern) == 2 else found


@dataclass(frozen=True)
class Borrowing(Nearer):
    """Works in the weights that it is lent."""

    def repair_block(self, block):
        found = super().repair_block(block)
        for weight in block.weights.values():
            weight.mul_(2)
        return found


BROKEN: dict[str, tuple[nmbench.Method, ...]] = {
    "the_mask_stays": (OtherMask(), OtherMasks()),
    "dropped_weights_stay_zero": (Leftovers(), MinusZeros()),
    "repaired_weights_are_finite": (Unguarded(),),
    "repairs_improve_their_start": (TooMuch(), Lazy()),
    "zero_steps_return_the_start": (FromDense(),),
    "interrupted_repairs_resume": (Noting(), Forgetful()),
    "parts_of_a_minibatch_do_not_matter": (Partial(),),
    "tokens_are_counted": (Peeking(),),
    "results_have_the_right_shape": (LosesWeights(), Foreign()),
    "inputs_are_untouched": (Borrowing(),),
}
