"""MaskPro: Linear-Space Probabilistic Learning for Strict (N:M)-Sparsity on Large Language Models (arXiv 2506.12876).

One logit per weight; every group of M draws N without replacement with p = softmax(logits). With f the mean token
cross-entropy of the masked dense model, m_0 the initial mask and m_t the mask drawn at step t, each step does

    r      = f(m_t) - f(m_0)            on the same minibatch: forward passes only
    delta <- 0.99 delta + 0.01 r        the moving average of loss residuals
    logits <- logits - lr * (r - delta) * grad log P(m_t)

from logits C * m_0, and the final mask keeps the N largest logits of every group. Preset `paper` is the published
setting. The default differs from it in three named options: `normalise` divides r - delta by its running spread, so
that one learning rate suits models of any size; `shuffle` draws minibatches at random from the whole pool; and `select`
watches held-out windows (see `watch`), returning the best mask seen, or the initial one if no gain is confirmed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import nmbench
from nmbench_plugins.maskpro.groups import MAX_GROUP
from nmbench_plugins.maskpro.logits import Logits
from nmbench_plugins.maskpro.watch import Watch

PAPER = {
    "steps": 10_000,
    "learning_rate": 50.0,
    "prior": 10.0,
    "minibatch": 32,
    "window_tokens": 128,
    "pool_windows": 512,
    "shuffle": False,
    "normalise": False,
    "select": False,
}


@dataclass(frozen=True)
class MaskPro(nmbench.MaskLearner):
    """Learn one categorical distribution per group by policy gradient, from forward losses only; weights stay dense."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}

    steps: int = nmbench.option(1000, "updates of the logits", unit="steps")
    learning_rate: float = nmbench.option(1.0, "step size on the logits")
    prior: float = nmbench.option(10.0, "logits start at this value times the initial mask")
    minibatch: int = nmbench.option(8, "windows per step", unit="windows")
    window_tokens: int | None = nmbench.option(None, "window length; none: the pool's, at most 128", unit="tokens")
    pool_windows: int | None = nmbench.option(
        None, "learn from this many windows; none: the whole pool", unit="windows"
    )
    shuffle: bool = nmbench.option(True, "draw minibatches at random instead of in fixed order")
    tracker: float = nmbench.option(0.99, "decay of the moving average of loss residuals")
    normalise: bool = nmbench.option(True, "divide the advantage by its running spread")
    select: bool = nmbench.option(True, "return the best greedy mask on held-out windows if others confirm it")
    check_every: int = nmbench.option(100, "steps between two looks at the held-out windows", unit="steps")
    checkpoint_every: int = nmbench.option(100, "steps between two checkpoints", unit="steps")

    def __post_init__(self) -> None:
        least = {"steps": 0, "minibatch": 1, "window_tokens": 2, "pool_windows": 1, "check_every": 1}
        for name, value in {**least, "checkpoint_every": 1}.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise nmbench.NMBenchError(f"option maskpro.{name} must be at least {value}, not {given}.")
        if not 0 <= self.tracker < 1:
            raise nmbench.NMBenchError(f"option maskpro.tracker must lie in [0, 1), not {self.tracker}.")

    def supports(self, pattern: nmbench.Pattern) -> str | None:
        return None if pattern.group <= MAX_GROUP else f"its policy draws from groups of at most {MAX_GROUP} weights."

    @torch.no_grad()
    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        """Return the greedy mask of the learnt logits; see the module for the algorithm."""
        windows = self.pool(task)
        with task.masked_weights() as live:
            initial_losses = reference_losses(task, windows, self.minibatch)
            state = State.start(task, self)
            watch = Watch(task, live) if self.select else None
            if watch:
                watch.resume(state.saved)
            for chosen, tokens in self.minibatches(task, windows, state.step):
                masks = state.logits.draw(task.generator)
                live.apply(masks.by_layer)
                residual = float((task.loss(tokens) - initial_losses[chosen]).mean())
                advantage = state.advantage(residual, self, task.who)
                state.logits.step(masks, -self.learning_rate * advantage)
                state.step += 1
                task.report(state.step, residual=residual, baseline=state.baseline)
                self.look_and_save(task, state, watch)
        return self.conclude(task, state, watch)

    def pool(self, task: nmbench.LearnTask) -> Tensor:
        """The windows to learn from. Raises `NMBenchError` if the pool has fewer or shorter ones than asked for."""
        length = self.window_tokens or min(128, task.pool.shape[1])
        windows = task.windows(length)
        wanted = self.pool_windows or len(windows)
        if wanted > len(windows):
            raise nmbench.NMBenchError(
                f"{task.who} asks for {wanted} windows of {length} tokens, the pool has {len(windows)}; raise "
                f"--pool-tokens to {wanted * length}."
            )
        return windows[:wanted]

    def minibatches(self, task: nmbench.LearnTask, windows: Tensor, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The minibatches of the steps that are left."""
        generator = task.generator if self.shuffle else None
        for _, batch in zip(
            range(done, self.steps), task.batches(self.minibatch, generator, windows, done), strict=False
        ):
            yield batch

    def look_and_save(self, task: nmbench.LearnTask, state: State, watch: Watch | None) -> None:
        """Look at the held-out windows and store a checkpoint when it is time."""
        last = state.step == self.steps
        if state.step % self.check_every == 0 or last:
            masks = state.logits.greedy()
            held_out = {"held_out": watch.look(state.step, masks)} if watch else {}
            state.log.append(
                {
                    "step": state.step,
                    "groups_changed": groups_changed(masks, task),
                    "log_prob_initial": state.logits.log_prob(task.initial),  # mean over groups
                    "spread": state.spread,
                    **held_out,
                }
            )
        if state.step % self.checkpoint_every == 0 or last:
            task.checkpoints.save({**state.to_save(task.generator), **(watch.to_save() if watch else {})})

    def conclude(self, task: nmbench.LearnTask, state: State, watch: Watch | None) -> Mapping[str, Tensor]:
        """The mask to return, and what happened, for the record."""
        masks: Mapping[str, Tensor] = state.logits.greedy()
        task.notes.update({"steps": state.step, "baseline": state.baseline, "log": state.log})
        if watch:
            masks = watch.verdict(masks)
            task.notes.update(watch.notes)
        task.notes["groups_changed"] = groups_changed(masks, task)
        return masks


@dataclass
class State:
    """All that a step changes."""

    logits: Logits
    step: int = 0
    baseline: float = 0.0
    mean_square: float = 0.0  # of the advantages, decaying like the baseline
    log: list[dict[str, float]] = field(default_factory=list)  # one entry each `check_every` steps
    saved: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, task: nmbench.LearnTask, method: MaskPro) -> State:
        """Logits C * m_0, or where a checkpoint left off."""
        state = cls(Logits.prior(task, method.prior))
        if saved := task.checkpoints.load():
            state.logits.load(saved)
            state.step, state.baseline, state.mean_square = saved["step"], saved["baseline"], saved["mean_square"]
            state.log = list(saved["log"])
            task.generator.set_state(saved["generator"])
            state.saved = saved
        return state

    def to_save(self, generator: torch.Generator) -> dict[str, Any]:
        plain = {"step": self.step, "baseline": self.baseline, "mean_square": self.mean_square, "log": self.log}
        return {**self.logits.to_save(), **plain, "generator": generator.get_state()}

    @property
    def spread(self) -> float:
        return math.sqrt(self.mean_square)

    def advantage(self, residual: float, method: MaskPro, who: str) -> float:
        """Move the baseline and return r - delta, divided by its running spread if `normalise` is on.

        Raises `NumericalFailure` for a loss that is not finite.
        """
        if not math.isfinite(residual):
            raise nmbench.NumericalFailure(f"{who}: the loss of step {self.step + 1} is {residual}.")
        self.baseline = method.tracker * self.baseline + (1 - method.tracker) * residual
        advantage = residual - self.baseline
        self.mean_square = method.tracker * self.mean_square + (1 - method.tracker) * advantage**2
        if not method.normalise:
            return advantage
        corrected = self.mean_square / (1 - method.tracker ** (self.step + 1))
        return advantage / math.sqrt(corrected) if corrected > 0 else 0.0


def reference_losses(task: nmbench.LearnTask, windows: Tensor, size: int) -> Tensor:
    """f(m_0), window by window: float32 `[windows]`, of the model as it is now."""
    parts = windows.split(size)
    losses = torch.empty(len(windows), device=windows.device)  # kept apart from the large tensors that come and go
    for index, (part, slot) in enumerate(zip(parts, losses.split(size), strict=True)):
        slot.copy_(task.loss(part))
        task.progress("measure the initial mask", index + 1, len(parts))
    return losses


def groups_changed(masks: Mapping[str, Tensor], task: nmbench.LearnTask) -> float:
    """The share of groups that differ from the initial mask."""
    changed = total = 0
    for name, mask in masks.items():
        differs = task.pattern[name].groups(mask ^ task.initial[name]).any(dim=-1)
        changed, total = changed + int(differs.sum()), total + differs.numel()
    return changed / total
