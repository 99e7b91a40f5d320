"""A census of the memory of tensors, for laws about a device that the machine need not have."""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmbench.calibration import waiting
from nmbench.methods import Pruned
from nmbench.models import keeping


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is open that are still there, and their peak.

    Tensors made in the context `elsewhere` are taken to be on another device. They do not count, and neither do those
    that were there `before`.
    """

    def __init__(self, before: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, weakref.finalize] = {}
        self.counting = True
        with self.elsewhere():
            for tensor in before:
                self.note(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        known = self.known.get(storage._cdata)
        if known is None or not known.alive:
            size = storage.nbytes() if self.counting else 0
            self.now += size
            self.peak = max(self.peak, self.now)
            self.known[storage._cdata] = weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.now -= size

    def streaming(self, patch) -> None:
        """Take what a streamed walk copies to the host to be elsewhere; `patch` is a monkeypatch of pytest."""
        to_host = waiting.stored_on_host

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            with self.elsewhere():
                return to_host(tensor)

        live = self

        class Late(Future):
            """A result that leaves when it is asked for: as late as it may."""

            def __init__(self, work: Callable[[], Pruned]) -> None:
                super().__init__()
                self.work: Callable[[], Pruned] | None = work

            def result(self, timeout: float | None = None) -> Pruned:
                if self.work is not None:
                    with live.elsewhere():
                        pruned = self.work()
                        weight = None if pruned.weight is None else pruned.weight.clone()
                        self.set_result(dataclasses.replace(pruned, mask=pruned.mask.clone(), weight=weight))
                    self.work = None
                return super().result(timeout)

        class Thread:
            """In place of the thread that brings results to the host."""

            def submit(self, work: Callable[..., Pruned], *given: object) -> Late:
                return Late(functools.partial(work, *given))

            def shutdown(self, cancel_futures: bool) -> None:
                """Do nothing."""

        patch.setattr(waiting, "stored_on_host", copied)
        patch.setattr(keeping, "ThreadPoolExecutor", lambda *given, **named: Thread())

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        self.counting = False
        try:
            yield
        finally:
            self.counting = True
