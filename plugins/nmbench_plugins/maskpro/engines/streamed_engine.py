"""The streamed engine, which stores logits and dense weights of all layers, and no mask.

Just before the product of a layer, one kernel draws the mask of the *last* step again from its seed and updates the
logits of the layer with that mask. Then the same kernel draws the mask of this step and writes the masked weights into
a scratch buffer that all layers share. The update of a step is therefore due until the next step begins, or until a
method reads the logits. On CUDA a whole step (forward pass, loss, scalars) is one CUDA graph, and nothing waits for the
host. Where ranks of torchrun share minibatches, the graph ends with the losses of this rank's windows. The losses of
all ranks are gathered, and the scalars computed, outside of it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

import nmbench
from nmbench.evaluation import window_losses
from nmbench.models import ignoring_packed_windows
from nmbench.pruning import LiveWeights, masked
from nmbench_plugins.maskpro import policy
from nmbench_plugins.maskpro.engines.base import Engine
from nmbench_plugins.maskpro.engines.step_graph import Recorded
from nmbench_plugins.maskpro.masks import Computed, Masks
from nmbench_plugins.maskpro.tracker import Rule

Step = Callable[[Tensor, Tensor], None]  # of tokens and references, or of tokens and losses to write
Recorder = Callable[[Step, Tensor, Tensor, Iterable[Tensor]], Recorded]  # as `step_graph.record`


class Kernels(Protocol):
    """The functions of `kernels.launch` and `kernels.reference`; all matrices are contiguous `[out, in]`."""

    def step(
        self,
        logits: Tensor,
        weight: Tensor,
        out: Tensor,
        keep: int,
        group: int,
        *,
        seed: int,
        first_group: int,
        step: Tensor,
        scale: Tensor,
        update: bool,
        draw: bool,
    ) -> None: ...

    def greedy(self, logits: Tensor, weight: Tensor, out: Tensor, keep: int, group: int) -> None: ...


class StreamedEngine(Engine):
    """Masked weights are computed layer by layer inside the forward pass; the live weights stay dense.

    `record` makes a CUDA graph of a step; None: steps are called one by one.
    """

    name = "streamed"
    waits = False

    def __init__(
        self,
        task: nmbench.LearnTask,
        live: LiveWeights,
        rule: Rule,
        kernels: Kernels,
        logits: str = "float32",
        record: Recorder | None = None,
    ) -> None:
        super().__init__(task, live, rule)
        self.kernels = kernels
        self.seed = task.generator.initial_seed()
        self.weights = {name: layer.read() for name, layer in task.bundle.layers.items()}  # as stored
        sizes = [weight.numel() // task.pattern[name].group for name, weight in self.weights.items()]
        self.first_group = dict(zip(task.layers, itertools.accumulate(sizes, initial=0), strict=False))
        kind = getattr(torch, logits)
        self.logits = {n: torch.empty(w.shape, dtype=kind, device=w.device) for n, w in self.weights.items()}
        self._fill(task.initial)
        largest = max(self.weights.values(), key=torch.Tensor.numel)
        self.scratch = torch.empty(largest.numel(), dtype=task.bundle.dtype, device=largest.device)
        self.numbers = torch.empty_like(self.scratch) if largest.dtype == torch.int8 else None
        self._due = False
        self._recorded: Recorded | None = None  # a step
        self._measuring: Recorded | None = None  # the same without update and draw
        self._record = self._record_measuring = record

    def advance(self, tokens: Tensor, references: Tensor) -> None:
        self.task.count_forward(tokens.numel())
        self._measuring = None  # frees its memory
        if self.task.ranks.size == 1:
            self._run_step(self._step, tokens, references)
        else:
            own = self.task.ranks.share(tokens)
            losses = self._run_step(self._draw, own, torch.empty(len(own), device=own.device))
            self.tracker.take(self.task.ranks.gathered(losses, len(tokens)), references)
        self._due = True

    def _run_step(self, step: Step, tokens: Tensor, figures: Tensor) -> Tensor:
        """Run `step(tokens, figures)`, as a CUDA graph if possible; return the figures, which it may have written."""
        if self._record is not None:
            self._try_to_record(self._record, step, tokens, figures)
        if self._recorded is None:
            step(tokens, figures)
            return figures
        self._recorded.replay(tokens, figures)
        return self._recorded.references

    def greedy(self) -> Masks:
        self._settle()
        return Computed(self.logits, self._top)

    def log_prob(self, masks: Masks) -> float:
        self._settle()
        total = torch.zeros((), dtype=torch.float64, device=self.scratch.device)
        groups = 0
        for name, logits in self.logits.items():
            pattern = self.task.pattern[name]
            mask = pattern.groups(masks[name].to(logits.device))
            chance = policy.log_prob(pattern.groups(logits.float()), mask)  # [out, in / group]
            total, groups = total + chance.double().sum(), groups + chance.numel()
        return float(total) / groups

    def losses(self, windows: Tensor, masks: Masks | None = None) -> Tensor:
        self._settle()
        provider = self._greedy_weight if masks is None else lambda name: self._masked(name, masks)
        with ignoring_packed_windows(), self.live.provided(provider):
            return self.task.shared(windows, self.task.loss)

    def references(self, tokens: Tensor) -> Tensor:
        """Compute all windows at once, as `advance` does: in 16 bits a sum depends on the shape of a product."""
        self._settle()
        self.task.count_forward(tokens.numel())
        own = self.task.ranks.part(tokens)
        return self.task.ranks.gathered(self._references(own) if len(own) else own.new_zeros(0).float(), len(tokens))

    def _references(self, tokens: Tensor) -> Tensor:
        losses = torch.empty(len(tokens), device=tokens.device)
        if self._record_measuring is not None:
            with contextlib.suppress(RuntimeError):  # slower without; the recording of the step notes the reason
                self._measuring = self._record_measuring(self._measure, tokens, losses, ())
            self._record_measuring = None
        if self._measuring is not None and self._measuring.tokens.shape == tokens.shape:
            self._measuring.replay(tokens, losses)
            return self._measuring.references.clone()
        self._measure(tokens, losses)
        return losses

    def restart(self, masks: Masks, learning_rate: float) -> None:
        self.tracker.restart(learning_rate)
        self._due = False
        self._fill(masks)

    def to_save(self) -> dict[str, Any]:
        self._settle()
        return {**super().to_save(), **{f"logits {name}": logits for name, logits in self.logits.items()}}

    def load(self, saved: Mapping[str, Any]) -> None:
        super().load(saved)
        for name, logits in self.logits.items():
            logits.copy_(saved[f"logits {name}"])

    def _step(self, tokens: Tensor, references: Tensor) -> None:
        self.tracker.take(self._drawn_losses(tokens), references)

    def _draw(self, tokens: Tensor, losses: Tensor) -> None:
        losses.copy_(self._drawn_losses(tokens))

    def _drawn_losses(self, tokens: Tensor) -> Tensor:
        """Return the losses of windows under a mask that is drawn now, after the update that is due."""
        calls: Counter[str] = Counter()

        def drawn(name: str) -> Tensor:
            calls[name] += 1
            return self._run(name, update=True, draw=True)

        with ignoring_packed_windows(), self.live.provided(drawn):
            losses = window_losses(self.task.model, tokens)
        self._check_calls(calls)
        return losses

    def _measure(self, tokens: Tensor, losses: Tensor) -> None:
        with ignoring_packed_windows(), self.live.provided(self._greedy_weight):
            losses.copy_(window_losses(self.task.model, tokens))

    def _check_calls(self, calls: Counter[str]) -> None:
        """Raise `NMBenchError` unless the forward pass computed, and so updated, every layer exactly once."""
        for name in self.logits:
            if calls[name] != 1:
                raise nmbench.NMBenchError(
                    f"{self.task.who}: layer {name} was computed {calls[name]} times in one forward pass, not once; "
                    f"use --set {self.task.who}.engine=torch."
                )

    def _settle(self) -> None:
        """Apply the update that is due, in all layers."""
        if self._due:
            for name in self.logits:
                self._run(name, update=True, draw=False)
            self.tracker.scale.zero_()
            self._due = False

    def _run(self, name: str, update: bool, draw: bool) -> Tensor:
        pattern, out = self.task.pattern[name], self._out(name)
        self.kernels.step(
            self.logits[name],
            self._weight(name),
            out,
            pattern.keep,
            pattern.group,
            seed=self.seed,
            first_group=self.first_group[name],
            step=self.tracker.step,
            scale=self.tracker.scale,
            update=update,
            draw=draw,
        )
        return out

    def _greedy_weight(self, name: str) -> Tensor:
        pattern, out = self.task.pattern[name], self._out(name)
        self.kernels.greedy(self.logits[name], self._weight(name), out, pattern.keep, pattern.group)
        return out

    def _masked(self, name: str, masks: Masks) -> Tensor:
        weight, out = self._weight(name), self._out(name)
        masked(weight, masks[name].to(weight.device), out)
        return out

    def _top(self, name: str) -> Tensor:
        pattern, logits = self.task.pattern[name], self.logits[name]
        return policy.greedy(pattern.groups(logits), pattern.keep).view(logits.shape)

    def _out(self, name: str) -> Tensor:
        """Return the scratch buffer in the shape of a layer, `[out, in]`."""
        return shaped(self.scratch, self.weights[name])

    def _weight(self, name: str) -> Tensor:
        """Return the dense weight `[out, in]` of a layer; that of a layer in 8 bits is in a buffer that all share."""
        layer = self.task.bundle.layers[name]
        return layer.values(None if self.numbers is None else shaped(self.numbers, self.weights[name]))

    def _fill(self, masks: Masks) -> None:
        for name, logits in self.logits.items():
            logits.copy_(masks[name].to(logits.device)).mul_(self.rule.prior)

    def _try_to_record(self, record: Recorder, step: Step, tokens: Tensor, figures: Tensor) -> None:
        """Record the step as a CUDA graph, or note the reason why a graph is impossible."""
        self._record = None
        try:
            self._recorded = record(step, tokens, figures, self.tracker.tensors().values())
            self.note += "a step is one CUDA graph"
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.note += f"steps are not a CUDA graph: {str(error).splitlines()[0]}"


def shaped(buffer: Tensor, weight: Tensor) -> Tensor:
    """Return the beginning of a buffer as a matrix of the shape of `weight`."""
    return buffer[: weight.numel()].view(weight.shape)
