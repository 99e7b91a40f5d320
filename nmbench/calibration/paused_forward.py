"""Forward passes of a model that wait at the entry of every decoder block.

Each pass runs in a greenlet of its own, one batch of windows each. A hook at the entry of a block hands control back;
the block can then be run on its arguments as often as statistics need it, and the pass goes on through the block, as
the block is by then, to the entry of the next one. The model itself joins its blocks: arguments, residual pairs,
embeddings between blocks and containers that blocks share are those of a plain forward pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from nmbench.calibration.arguments import arranged, changed, tensors_of
from nmbench.calibration.waiting import Waiting, arrived, copied_to_host, leaves
from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle
from nmbench.models.forward import run_model
from nmbench.models.hooks import hooks, instead

Work = Callable[[Tensor], Any]
REMEDY = "it cannot be walked block by block; choose a method that needs no statistics."


class PausedForward(greenlet):
    """The forward pass of a model on `batch`, int64 `[windows, window_tokens]`.

    `index`, `args` and `kwargs`: the block at whose entry the pass waits, and what the model calls the block with; if
    `away`, the tensors wait on the host. `writing`: numbers of the blocks that write into their arguments, which are
    run on copies. `work` runs the model on the batch; `result` is what it returned, once the pass has gone through the
    last block. Raises `NMBenchError` if the blocks are not called once each, in order.
    """

    def __init__(
        self,
        bundle: Bundle,
        batch: Tensor,
        writing: frozenset[int] = frozenset(),
        work: Work | None = None,
        away: bool = False,
    ) -> None:
        super().__init__()
        self.bundle, self.batch, self.writing = bundle, batch, writing
        self.work = work or functools.partial(run_model, bundle.model)
        self.result: Any = None
        self.index = -1
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.kept: list[Any] = []  # the output to go on with, if it is known already
        self.other_way: Callable[..., Any] | None = None  # what the block at the entry is replaced by
        self._waiting = Waiting(bundle, batch) if away else None

    @property
    def away(self) -> bool:
        """True if what the pass holds waits on the host."""
        return self._waiting is not None

    def run(self) -> None:
        """The body of the greenlet."""
        self.result = self.work(self.batch)

    def enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait at the entry of block `index`; called in the greenlet."""
        if index != self.index + 1:
            names = list(self.bundle.blocks)
            check_order(self.bundle, [*names[: self.index + 1], names[index]])
        self.index, self.args, self.kwargs = index, args, kwargs
        self.parent.switch()

    def go_on(self) -> None:
        """Run the block at whose entry the pass waits, and go on to the entry of the next one."""
        if self._waiting:
            self._waiting.bring()
        self.args, self.kwargs, state = (), {}, torch_state()
        self.parent = getcurrent()
        self.switch()
        if self.dead:
            check_order(self.bundle, list(self.bundle.blocks)[: self.index + 1])
        if torch_state() != state:
            raise NMBenchError(
                f"{self.bundle.ref} switches autocast, gradients or inference mode while its blocks run; {REMEDY}"
            )
        if self._waiting:
            self._waiting.leave(self.gr_frame)

    def again(self, module: nn.Module, keep: bool = False) -> Any:
        """Return what `module`, the block or a copy of the block, makes of the arguments, which stay as they are.

        If `keep`, the pass goes on with this output, unless the block has changed a container among its arguments.
        Raises `NMBenchError` if the block writes into tensors among its arguments and is not among `writing`.
        """
        own = not self.away and self.index not in self.writing
        args, kwargs = changed((self.args, self.kwargs), self._lent if not own else lambda tensor: tensor)
        before, versions = arranged((args, kwargs)), [t._version for t in tensors_of((args, kwargs))] if own else []
        output = module(*args, **kwargs)
        if keep and arranged((args, kwargs)) == before:
            self.kept = [changed(output, copied_to_host) if self.away else output]
        if own and versions != [t._version for t in tensors_of((self.args, self.kwargs))]:
            name = list(self.bundle.blocks)[self.index]
            raise NMBenchError(
                f"block {name} of {self.bundle.ref} writes into its inputs for some tokens only; {REMEDY}"
            )
        return output

    def _lent(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor for a block to work with."""
        return tensor.to(self.bundle.device, non_blocking=True, copy=True) if self.away else tensor.clone()

    def close(self) -> None:
        """Leave the model in the middle of its forward pass."""
        if self:
            self.parent = getcurrent()
            self.throw()
        self.args, self.kwargs, self.kept = (), {}, []


def torch_state() -> tuple[bool, ...]:
    """The settings that a forward pass could change for all greenlets of a thread."""
    autocast = (torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextlib.contextmanager
def paused_forwards(
    bundle: Bundle,
    batches: Iterable[Tensor],
    writing: frozenset[int] = frozenset(),
    work: Work | None = None,
    away: bool | None = None,
) -> Iterator[list[PausedForward]]:
    """Passes on `batches`, each at the entry of the first block; whatever is left of them at the end is given up.

    `away`: whether they wait on the host; None: if the device has no room for them.
    """
    batches = list(batches)
    if away is None:
        away = leaves(bundle, sum(batch.numel() for batch in batches))
    forwards = [PausedForward(bundle, batch, writing, work, away) for batch in batches]
    try:
        go_on(bundle, forwards)
        yield forwards
    finally:
        for forward in forwards:
            forward.close()


@contextlib.contextmanager
def entries(bundle: Bundle) -> Iterator[None]:
    """While the context is open, passes wait at the entries of blocks; other forward passes run through."""
    blocks = list(bundle.blocks.values())
    with contextlib.ExitStack() as stack:
        # A pass waits before a streamed block comes to the device.
        entered = [b.register_forward_pre_hook(entry(i), prepend=True, with_kwargs=True) for i, b in enumerate(blocks)]
        stack.enter_context(hooks(entered))
        for block in blocks:
            stack.enter_context(instead(block, passing(block.forward)))
        yield


def entry(index: int) -> Callable[..., None]:
    """A hook: the pass that enters block `index` waits."""

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = getcurrent()
        if isinstance(current, PausedForward):
            current.enter(index, args, kwargs)

    return enter


def passing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for the `forward` of a block, which PyTorch looks up before a pass waits: a pass may go another way."""

    def passed(*args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        other = current.other_way if isinstance(current, PausedForward) else None
        return (other or forward)(*args, **kwargs)

    return passed


def go_on(bundle: Bundle, forwards: Iterable[PausedForward], dense_block: nn.Module | None = None) -> None:
    """Let passes go on to the entry of the next block: through the block, or with the outputs of `dense_block`."""
    forwards = list(forwards)
    with entries(bundle):
        for forward in forwards:
            forward.other_way = None if dense_block is None else kept_or(dense_block, forward)
            forward.go_on()
            forward.other_way = None  # which keeps the dense block
    if any(forward.away for forward in forwards):
        arrived(bundle.device)


def kept_or(module: nn.Module, forward: PausedForward) -> Callable[..., Any]:
    """The output that a pass has kept, else what `module` makes of the arguments."""

    def output(*args: Any, **kwargs: Any) -> Any:
        if not forward.kept:
            return module(*args, **kwargs)
        return changed(forward.kept.pop(), lambda tensor: tensor.to(forward.bundle.device, non_blocking=True))

    return output


def check_order(bundle: Bundle, called: Sequence[str]) -> None:
    """Raise `NMBenchError` unless the blocks were called once each, in order."""
    names = list(bundle.blocks)
    if list(called) == names:
        return
    again = [name for number, name in enumerate(called) if name in called[:number]]
    if again:
        what = f"calls its block {again[0]} more than once"
    elif list(called) == names[: len(called)]:
        what = f"calls {len(called)} of its {len(names)} blocks"
    else:
        what = "does not call its blocks in order"
    raise NMBenchError(f"{bundle.ref} {what}; it cannot be walked block by block.")
