"""The ranks of a run: shares of windows, and what ranks exchange.

Every rank holds the whole model, draws the same minibatches and the same noise from the same seeds, and computes its
share of the windows. Losses are gathered in the order of the windows, so that every rank goes on with the same numbers
as one process would; gradients, and statistics of layer inputs, are added up. Scalars travel as they are, 4 bytes a
window.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nmbench.errors import FailedAlone, FailedElsewhere, NMBenchError, RankLost, interrupts
from nmbench.runtime.ranks.buckets import buckets
from nmbench.runtime.ranks.launch import Launch
from nmbench.runtime.ranks.watch import Watch, lost

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = datetime.timedelta(days=30)  # a rank may wait while rank 0 does a long row alone; `Watch` sees the dead
GOING_SECONDS = 1.0  # in which a process that has closed its connections is gone
GRACE = {True: datetime.timedelta(minutes=30), False: datetime.timedelta(minutes=1)}  # for the others to end a job too


class Failed(NamedTuple):
    """What a rank says that has failed: its error as a `line`."""

    line: str


class Ranks:
    """The processes that share the work of a row: `size` of them, of which this one is number `rank`.

    With one process nothing is exchanged.
    """

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self.size, self.rank = size, rank
        self.watch = Watch({}, True)
        self.control: Any = None  # a group for what is said, on CPUs
        self.in_step = True  # False after an error amid an exchange, of which the others know nothing

    @property
    def leads(self) -> bool:
        """True for rank 0, which writes and prints."""
        return self.rank == 0

    def part(self, rows: Tensor) -> Tensor:
        """Return the rows of this rank: ranks have neighbouring rows, in their order, and at most one row more."""
        return rows.tensor_split(self.size)[self.rank] if self.size > 1 else rows

    def share(self, tokens: Tensor) -> Tensor:
        """Return the windows of this rank in a minibatch. Raises `NMBenchError` if a rank would have none."""
        if len(tokens) < self.size:
            raise NMBenchError(
                f"{self.size} ranks cannot share a minibatch of {len(tokens)} windows; raise the option minibatch, or "
                f"start fewer ranks."
            )
        return self.part(tokens)

    def gathered(self, values: Tensor, count: int) -> Tensor:
        """Return the `count` values of all ranks, `[count]`, from those of the rows of this rank (`part`)."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        sizes = [len(part) for part in torch.empty(count).tensor_split(self.size)]
        sent = values.new_zeros(sizes[0])  # all of one length, which the backends ask for
        sent[: len(values)] = values
        received = [torch.empty_like(sent) for _ in sizes]
        with self.losing():
            dist.all_gather(received, sent)
        return torch.cat([losses[:size] for losses, size in zip(received, sizes, strict=True)])

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over ranks, in place; the order of the sum depends on their number only."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        with self.losing():
            for bucket in buckets(tensors):
                sums = torch.cat([one.reshape(-1) for one in bucket]) if len(bucket) > 1 else bucket[0].contiguous()
                dist.all_reduce(sums)
                if sums is not bucket[0]:
                    parts = sums.view(-1).split([tensor.numel() for tensor in bucket])
                    for tensor, part in zip(bucket, parts, strict=True):
                        tensor.copy_(part.view(tensor.shape))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace `tensor`, which is contiguous, by that of rank `source`, in place."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        with self.losing():
            dist.broadcast(tensor.view(torch.uint8), source)  # not every backend knows every dtype

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error inside the context on one rank ends the context on all: by `FailedElsewhere`, at their next `said`.

        The ranks exchange once more at the end. An error amid an exchange of tensors ends the run instead.
        """
        try:
            yield
        except (FailedElsewhere, RankLost):
            raise
        except BaseException as error:
            if self.in_step and not interrupts(error):
                kind = "" if isinstance(error, NMBenchError) else f"{type(error).__name__}: "
                self._exchanged(Failed(f"{kind}{error}"))
            raise
        self.said(None)

    def said(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order.

        Raises `FailedElsewhere` if another rank has failed in the context `failing_together`.
        """
        values = self._exchanged(value)
        for rank, found in enumerate(values):
            if isinstance(found, Failed):
                raise FailedElsewhere(f"rank {rank}: {found.line}")
        return values

    def every(self, flag: bool) -> bool:
        """Return True if `flag` is true on every rank."""
        return all(self.said(flag))

    def decided(self, value: Any) -> Any:
        """Return the value of rank 0, which decides by a clock or a file."""
        return self.said(value)[0]

    def check_same(self, value: str, what: str) -> None:
        """Raise `NMBenchError` if the ranks hold different values; `what` names them."""
        values = self.said(value)
        other = next((rank for rank, found in enumerate(values) if found != values[0]), None)
        if other is not None:
            raise NMBenchError(
                f"ranks 0 and {other} hold different {what}: {values[0][:12]} and {values[other][:12]}; ranks need the "
                f"same files, versions and kind of device."
            )

    def tell(self, text: str | None) -> None:
        """Say something to all other ranks, which ask by `told`."""
        self._heard(text)

    def told(self) -> Any:
        """Wait for what rank 0 says; return that."""
        return self._heard(None)

    def end(self, error: BaseException | None) -> None:
        """Wait until every rank has ended the job; `error`: its end on this rank, None if it ended well.

        Raises `RankLost` if it failed on some ranks only, which are then no longer in step, and `FailedAlone` if this
        rank did and the others do not answer.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        line = None if error is None else f"{type(error).__name__}: {error}"
        try:
            dist.monitored_barrier(self.control, timeout=GRACE[error is None])
        except RuntimeError as failure:
            if line is None:
                raise RankLost(self._gone(failure)) from failure
            raise FailedAlone(f"rank {self.rank} failed alone: {line}") from failure
        lines = self.said(line)
        self.in_step = True
        if None in lines and any(lines):
            rank = next(rank for rank, found in enumerate(lines) if found)
            raise RankLost(f"rank {rank} failed alone: {lines[rank]}")

    @contextlib.contextmanager
    def losing(self) -> Iterator[None]:
        """Raise `RankLost` in place of an error of communication inside the context."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError:
            self.in_step = False
            raise
        except RuntimeError as error:
            raise RankLost(self._gone(error)) from error

    def _gone(self, error: RuntimeError) -> str:
        """Return a text on the ranks that have ended; on the error of communication if all are there."""
        self.watch.outlasted(GOING_SECONDS)
        gone = self.watch.gone()
        return lost(gone, "" if gone else str(error).strip().partition("\n")[0])

    def _exchanged(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.size
        with self.losing():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def _heard(self, value: Any) -> Any:
        """Return the value of rank 0."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        with self.losing():
            dist.broadcast_object_list(values, group=self.control)
        return values[0]


ALONE = Ranks()
_joined = _sharing = ALONE  # of this process: the group of torch.distributed is of the process, too


def joined_ranks() -> Ranks:
    """Return the ranks that this process has joined; `ALONE` without torchrun."""
    return _joined


def sharing() -> Ranks:
    """Return the ranks that share the job at work; `ALONE` if this process does the job by itself."""
    return _sharing


@contextlib.contextmanager
def sharing_by(ranks: Ranks) -> Iterator[None]:
    """Let `ranks` share the work of learners while the context is open."""
    global _sharing
    before, _sharing = _sharing, ranks
    try:
        yield
    finally:
        _sharing = before


@contextlib.contextmanager
def joined(launch: Launch | None, device: str) -> Iterator[Ranks]:
    """Join the processes of `launch` while the context is open; None: there is only this one.

    `device`: auto, cpu or cuda, as of the run. Raises `NMBenchError` if the host has fewer GPUs than ranks, or if this
    process has used CUDA before, so that it cannot have a GPU of its own.
    """
    if launch is None:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if launch.has_gpu(device) else "gloo"
    import torch.distributed as dist

    ranks = Ranks(launch.size, launch.rank)
    with ranks.losing():
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.size, timeout=PATIENCE)
        ranks.control = dist.new_group(backend="gloo", timeout=PATIENCE)
    global _joined
    _joined = ranks
    try:
        with watched(ranks):
            yield ranks
            ranks.every(True)  # no rank leaves before the last one is done
    finally:
        _joined = ALONE
    dist.destroy_process_group()


@contextlib.contextmanager
def watched(ranks: Ranks) -> Iterator[None]:
    """Watch the ranks of this host while the context is open: rank 0 watches all others, every other one rank 0."""
    host, others = platform.node(), dict[int, int]()
    for rank, (node, process) in enumerate(ranks.said((host, os.getpid()))):
        if node == host and rank != ranks.rank and (ranks.leads or rank == 0) and os.name == "posix":
            others[rank] = process
    ranks.watch = Watch(others, ranks.leads)
    with ranks.watch:
        yield
