"""Gradients of the whole model for a learner: live weights, an objective, and the dense model as teacher.

The dense model needs no second model: hooks show dense weights to one block at a time (`DenseView`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nmbench.evaluation.losses import batch_size
from nmbench.evaluation.objective import Objective, objective_losses, window_objective
from nmbench.models.block_forwards import compiled, recomputed, running
from nmbench.models.bundle import Bundle
from nmbench.models.dense_view import DenseView
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.forward import logits_of, run_model
from nmbench.models.packed_windows import ignoring_packed_windows
from nmbench.runtime.cost import Cost
from nmbench.runtime.memory import free_bytes
from nmbench.runtime.ranks import Ranks

ACTIVATIONS = 6  # copies of inputs and outputs of all layers that backpropagation keeps, norms and attention included
TRAINING_LOGIT_BYTES = 2**32  # of the float32 logits of the windows that go through the model at once on a GPU
TINY = 1e-30  # of a norm: losses and gradients of 0 are equal to themselves
FILL = 0.5  # share of the free memory that kept activations may take
ROUNDING = {torch.float32: 0.01}  # by which gradients of compiled passes may differ: fused work rounds less often
SHORT_ROUNDING = 0.3  # the same of shorter dtypes; other seeds of the rounding differ as much


class Counting(Protocol):
    """The task that gradients are computed for: model, cost so far, notes for the record, the ranks that share it."""

    ranks: Ranks
    bundle: Bundle
    model: nn.Module
    cost: Cost
    notes: dict[str, Any]

    def count_forward(self, tokens: int) -> None: ...


class Training:
    """The live weights of a model, with gradients; the host restores the dense weights afterwards.

    Only prunable weights have gradients. Where ranks of torchrun share the work, each computes its windows of every
    minibatch: losses and gradients are those of the whole minibatch on all of them.
    """

    def __init__(self, task: Counting, weights: DenseWeights) -> None:
        self.ranks = task.ranks
        self.task, self.bundle, self._weights = task, task.bundle, weights
        self.parameters = {
            layer.where.stored: layer.module.get_parameter(layer.where.parameter)
            for layer in self.bundle.layers.values()
        }
        self._fitting: dict[int, bool] = {}  # tokens at once -> whether their activations fit
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}  # compiled, by block
        self._each = window_objective
        self._held = False  # gradients are zeroed, not dropped
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def write(self, name: str, weight: Tensor) -> None:
        """Set the live weight of a layer to `weight` `[out, in]`, of any float dtype."""
        with torch.no_grad():
            self.bundle.layers[name].write(weight)

    def apply(self, masks: Mapping[str, Tensor]) -> None:
        """Set the live weights of the layers in `masks` to dense where kept, and to zero elsewhere."""
        for name, mask in masks.items():
            dense = self.dense(name)
            self.write(name, dense.masked_fill(~mask.to(dense.device), 0.0))

    def gradient(self, name: str) -> Tensor:
        """Return the gradient of a layer by the last `backward`, `[out, in]` in the dtype of the model."""
        where = self.bundle.layers[name].where
        gradient = self.parameters[where.stored].grad
        return where.view(torch.zeros_like(self.parameters[where.stored]) if gradient is None else gradient)

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            if self._held and parameter.grad is not None:
                parameter.grad.zero_()
            else:
                parameter.grad = None

    def hold_gradients(self) -> None:
        """Keep gradients where they are from now on, so that a CUDA graph can read them; `clear` makes them zero."""
        self._held = True
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    @property
    def compiled(self) -> bool:
        """True if `backward` runs compiled passes."""
        return bool(self._forwards)

    @property
    def capturable(self) -> bool:
        """True if a CUDA graph may hold `backward`: its passes are not compiled, and no ranks add gradients up."""
        return not self.compiled and self.ranks.size == 1

    def compile(self, tokens: Tensor, objective: Objective, backend: str | None = None) -> None:
        """Compile the passes of `backward` for minibatches of the shape of `tokens`; gradients are as after `clear`.

        `backend` of torch.compile: by default inductor on a CUDA device, and none elsewhere. A model that cannot be
        compiled, or whose losses or gradients then differ by more than rounding, is computed as before, which a note
        of the record says.
        """
        if backend is None and self.bundle.device.type != "cuda":
            return
        backend = backend or "inductor"
        with self.uncounted():
            expected = self._tried(tokens, objective)
            self._forwards = {block: compiled(block.forward, backend) for block in self.bundle.blocks.values()}
            self._each = compiled(window_objective, backend)
            try:
                found = self._tried(tokens, objective)
                away = [distance(one, other) for one, other in zip(found, expected, strict=True)]
                fine = max(away) <= ROUNDING.get(self.bundle.dtype, SHORT_ROUNDING)
                what = "" if fine else f"losses and gradient differ by the shares {away[0]:.3g}, {away[1]:.3g}"
            except Exception as error:  # of the compilers: any type
                what = " ".join(str(error).split()[:30]) or type(error).__name__
        if not self.ranks.every(not what):
            what = what or "another rank could not"
        self.clear()
        if what:
            self._forwards, self._each = {}, window_objective
        self.task.notes["compiled"] = f"no: {what}" if what else "yes"

    def _tried(self, tokens: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        """Return the objective of every window of this rank, and the gradient of the first layer, float32."""
        values = self._backward(self.ranks.share(tokens), objective, len(tokens))
        return values.float(), self.gradient(next(iter(self.bundle.layers))).float()

    def backward(self, tokens: Tensor, objective: Objective) -> Tensor:
        """Compute the gradient of the mean objective of `tokens` `[n, window_tokens]`, in place of the last one.

        Returns the objective of every window, float32 `[n]`. The windows go through the model in parts that fit. Tokens
        of the teacher, of the student and of its backward pass are counted.
        """
        self.count(tokens.numel(), objective)
        values = self._backward(self.ranks.share(tokens), objective, len(tokens))
        if self.ranks.size == 1:
            return values
        self._add_up()
        return self.ranks.gathered(values, len(tokens))

    def _backward(self, tokens: Tensor, objective: Objective, count: int) -> Tensor:
        """Compute the gradient of the sum over `tokens` divided by `count`; return the values of these windows."""
        losses = []
        self.clear()
        with torch.enable_grad(), ignoring_packed_windows(), running(self._chosen_forwards(tokens)):
            for part in tokens.split(self.part_windows(tokens)):
                values = self._values(part, objective, self._each)
                (values.sum() / count).backward()
                losses.append(values.detach())
        return torch.cat(losses)

    def _add_up(self) -> None:
        """Add the gradients of all ranks up; an expert that no token of a rank reached has none there."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.add_up([parameter.grad for parameter in self.parameters.values() if parameter.grad is not None])

    def count(self, tokens: int, objective: Objective) -> None:
        """Count the tokens of one `backward`: forward once, twice with a teacher, and backward."""
        self.task.count_forward(tokens * (2 if objective.kl else 1))
        self.task.cost.backward_tokens += tokens

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Forget the tokens that are counted while the context is open, as those of a trial."""
        cost = dataclasses.replace(self.task.cost)
        try:
            yield
        finally:
            self.task.cost = cost

    @torch.no_grad()
    def losses(self, tokens: Tensor, objective: Objective) -> Tensor:
        """Return the objective of every window `[n, window_tokens]` under the live weights, float32 `[n]`."""
        self.task.count_forward(tokens.numel() * (2 if objective.kl else 1))
        own = self.ranks.part(tokens)
        parts = own.split(self.part_windows(tokens)) if len(own) else ()
        values = [self._values(part, objective) for part in parts]
        return self.ranks.gathered(torch.cat([*values, tokens.new_zeros(0).float()]), len(tokens))

    def losses_under(self, tokens: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """Make `masks` those of the live weights, and return the cross-entropy of every window, float32 `[n]`."""
        self.apply(masks)
        return self.losses(tokens, Objective())

    def _values(self, part: Tensor, objective: Objective, each: Callable[..., Tensor] = window_objective) -> Tensor:
        """Return the objective of windows that go through the model at once, float32 `[n]`."""
        teacher = self.teacher_logits(part) if objective.kl else None
        return objective_losses(logits_of(run_model(self.task.model, part)), part, objective, teacher, each)

    @torch.no_grad()
    def teacher_logits(self, tokens: Tensor) -> Tensor:
        """Return the logits of the dense model, `[n, window_tokens, vocabulary]` in the dtype of the model."""
        with self.teacher.shown() as model:
            return logits_of(run_model(model, tokens))

    @cached_property
    def teacher(self) -> DenseView:
        """A view of the dense model; its weights are copied to the device once, and shared with it on a CPU."""
        device, copies = self.bundle.device, self._weights.copies
        inside = tuple(f"{name}." for name in self.bundle.blocks)
        return DenseView(self.bundle, {n: t.to(device) for n, t in copies.items() if n.startswith(inside)})

    def dense(self, name: str) -> Tensor:
        """Return the dense weight `[out, in]` of a layer on the device, a tensor shared with the teacher; read-only."""
        where = self.bundle.layers[name].where
        return where.view(self.teacher.copies[where.stored])

    def part_windows(self, tokens: Tensor) -> int:
        """Return the number of windows that go through the model at once."""
        on_gpu = self.bundle.device.type == "cuda"
        return batch_size(self.task.model, tokens.shape[1], TRAINING_LOGIT_BYTES if on_gpu else None)

    def _chosen_forwards(self, tokens: Tensor) -> dict[nn.Module, Callable[..., Any]]:
        """Return what runs in place of the blocks: compiled passes, if there are, and recomputed in the backward pass
        where the activations of all blocks would not fit.
        """
        count = min(len(tokens), self.part_windows(tokens)) * tokens.shape[1]
        if count not in self._fitting:  # asked once: a CUDA graph must not ask for free memory
            self._fitting[count] = fits(self.bundle, count)
        if self._fitting[count]:
            return self._forwards
        return {block: recomputed(self._forwards.get(block, block.forward)) for block in self.bundle.blocks.values()}


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the norm of a difference, relative to the expected tensor; infinite if it is not a number."""
    away = float((found - expected).norm() / expected.norm().clamp(min=TINY))
    return away if math.isfinite(away) else math.inf


def fits(bundle: Bundle, tokens: int) -> bool:
    """Return True if the device has room for the activations of `tokens` tokens in all blocks; a CPU always has."""
    if bundle.device.type != "cuda":
        return True
    widths = sum(sum(layer.shape) for layer in bundle.layers.values() if not layer.fused or layer.where.expert == 0)
    return ACTIVATIONS * tokens * widths * bundle.dtype.itemsize < FILL * free_bytes(bundle.device)
