"""The evidence of a step of flips: errors of activations times inputs, from the dense and the pruned model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmbench
from nmbench.calibration import full_float32, resumable, resumed, until, walk
from nmbench.evaluation import all_logits
from nmbench.pruning import LiveWeights
from nmbench_plugins.swaps.problem import TINY

Note = Callable[[str, Tensor, Tensor], Tensor | None]


class Evidence(NamedTuple):
    """Means over tokens, float32, by layer: `gram` H `[in, in]`, and `error` E `[out, in]`.

    Layers that are called one after another with the same inputs share one matrix H.
    """

    gram: dict[str, Tensor]
    error: dict[str, Tensor]


class Seen(NamedTuple):
    """One pass: what was noted of layers, by name, and what the last block returned."""

    noted: dict[str, Tensor]
    end: Any


def writers(task: nmbench.LearnTask) -> set[str]:
    """Return the layers that write into the residual stream, found with one window of the pool.

    There are none if a pass cannot be resumed at the end of the last block: the output then has no error there.
    """
    window = task.pool[:1]
    most = max(len(task.bundle.block_layers(index)) for index in range(len(task.bundle.blocks)))
    task.count_forward((9 + most) * window.numel())  # every layer of a block is probed, beside nine passes at most
    if not resumable(task.bundle, window):
        return set()
    steps = walk(task.bundle, window, nmbench.Stat.LAG)
    return {name for step in steps for name, stats in step.stats.items() if stats.lag is not None}


def gathered(
    task: nmbench.LearnTask,
    live: LiveWeights,
    masks: Mapping[str, Tensor],
    windows: Tensor,
    writing: Sequence[str],
    local: Sequence[str],
    minibatch: int,
    skip: int,
) -> Evidence:
    """Return the evidence of `windows` int64 `[n, window_tokens]`: by the output for layers `writing`, else local.

    Layers that do not get the tokens of every window in order, such as experts, get no evidence. The weights are those
    of `masks` before and after.
    """
    sums, tokens = Sums(skip), 0
    for part in windows.split(minibatch):
        live.apply_dense()
        dense = seen(task, part, local, lambda name, inputs, output: output)
        live.apply(masks)

        def note(name: str, inputs: Tensor, output: Tensor, wanted: dict[str, Tensor] = dense.noted) -> Tensor | None:
            if name in writing:
                return inputs
            if (other := wanted.pop(name, None)) is not None:
                sums.add(name, inputs, output.float() - other.float())
            return None

        pruned = seen(task, part, (*writing, *local), note)
        sums.end_pass()
        if writing:
            end = output_error(task, part, dense, pruned, skip)
            for name, inputs in pruned.noted.items():
                sums.add(name, inputs, end)
        tokens += len(part) * (part.shape[1] - skip)
    return sums.means(tokens)


def output_error(task: nmbench.LearnTask, part: Tensor, dense: Seen, pruned: Seen, skip: int) -> Tensor:
    """Return the error of the model's output, as a hidden state after the last block: float32 `[n, window, width]`.

    It is the derivative of KL(dense || pruned) by that hidden state, which is the error of the probabilities times the
    output embedding, through the last norm: nothing goes back through a block. It is scaled to the size of the error
    of the hidden state itself.
    """
    last = len(task.bundle.blocks) - 1
    found = []
    for index in range(len(part)):  # logits of one window at a time
        window = part[index : index + 1]
        with resumed(task.bundle, last, one_window(dense.end, index)):
            wanted = all_logits(task.model, window).float().log_softmax(dim=-1)
        hidden = hidden_of(pruned.end)[index : index + 1].detach().requires_grad_()
        with torch.enable_grad(), resumed(task.bundle, last, with_hidden(one_window(pruned.end, index), hidden)):
            own = all_logits(task.model, window).float().log_softmax(dim=-1)
            loss = F.kl_div(own, wanted, reduction="sum", log_target=True)
        found.append(torch.autograd.grad(loss, hidden)[0].float())
    error = torch.cat(found)
    size = (hidden_of(pruned.end).float() - hidden_of(dense.end).float())[:, skip:].norm()
    return error * (size / error[:, skip:].norm().clamp_min(TINY))


class Sums:
    """Sums over tokens, from which the evidence is made. A layer adds to them while its pass goes on, so that inputs
    and outputs of all layers are never there at once.
    """

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.evidence = Evidence({}, {})
        self.last: tuple[Tensor, str] | None = None  # the inputs that were added last, and the layer whose they were

    def add(self, name: str, inputs: Tensor, error: Tensor) -> None:
        """Add inputs `[n, window, in]` and errors `[n, window, out]` of a layer; with the same inputs as the layer
        before, it has the same sum of them.
        """
        gram, errors = self.evidence
        x = inputs[:, self.skip :].flatten(0, 1).float()  # [tokens, in]
        t = error[:, self.skip :].flatten(0, 1)  # [tokens, out]
        leader = self.last[1] if self.last and self.last[0] is inputs else name
        if name not in errors:
            gram[name] = gram[leader] if leader != name else x.new_zeros(x.shape[1], x.shape[1])
            errors[name] = x.new_zeros(t.shape[1], x.shape[1])
        with full_float32():
            if leader == name:
                gram[name].addmm_(x.t(), x)
            errors[name].addmm_(t.t(), x)
        self.last = inputs, leader

    def end_pass(self) -> None:
        """Forget the last inputs."""
        self.last = None

    def means(self, tokens: int) -> Evidence:
        """Return the evidence: the sums, divided in place; shared ones once."""
        shared = {id(gram): gram for gram in self.evidence.gram.values()}
        for total in (*shared.values(), *self.evidence.error.values()):
            total.div_(tokens)
        return self.evidence


def seen(task: nmbench.LearnTask, part: Tensor, layers: Sequence[str], note: Note) -> Seen:
    """Return what one pass of `part` int64 `[n, window]` up to the end of the last block shows; tokens are counted.

    `note(name, inputs, output)`, of the layers that get all tokens of every window in order, returns what to keep.
    """
    noted: dict[str, Tensor] = {}

    def take(name: str, inputs: Tensor, output: Tensor) -> None:
        if inputs.dim() == 3 and inputs.shape[:2] == part.shape and (kept := note(name, inputs, output)) is not None:
            noted[name] = kept

    task.count_forward(part.numel())
    with watching(task, layers, take):
        return Seen(noted, until(task.bundle, len(task.bundle.blocks) - 1, part))


@contextlib.contextmanager
def watching(task: nmbench.LearnTask, layers: Sequence[str], change: Any) -> Iterator[None]:
    """While the context is open, `change(name, inputs, output)` is called after a layer, and may return an output."""

    def hook(name: str) -> Any:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Any:
            return change(name, args[0] if args else next(iter(kwargs.values())), output)

        return call

    chosen = [task.bundle.layers[name] for name in layers if not task.bundle.layers[name].fused]
    handles = [layer.module.register_forward_hook(hook(layer.name), with_kwargs=True) for layer in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_of(returned: Any) -> Tensor:
    """Return the hidden state among what a block returned: the first tensor."""
    parts = returned.values() if isinstance(returned, dict) else returned if isinstance(returned, tuple) else [returned]
    return next(part for part in parts if isinstance(part, Tensor))


def one_window(returned: Any, index: int) -> Any:
    """Return what a block returned for window `index` alone: its hidden state, in the place of that of all windows."""
    return with_hidden(returned, hidden_of(returned)[index : index + 1])


def with_hidden(returned: Any, hidden: Tensor) -> Any:
    """Return what a block returned with another hidden state."""
    if isinstance(returned, Tensor):
        return hidden
    old = hidden_of(returned)
    if isinstance(returned, dict):
        return type(returned)({key: hidden if value is old else value for key, value in returned.items()})
    return tuple(hidden if value is old else value for value in returned)
