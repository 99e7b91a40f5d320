"""Layers whose input is the very same tensor, as the projections of an attention: its statistics are gathered once.

Shared inputs are observed, not known of an architecture: the second layer gets the same tensor object, not written to
since. A layer that shares its inputs in some batches only has no leader; its statistics are gathered again, alone.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from torch import Tensor


class CommonInputs:
    """Passes inputs on to the statistics of a layer, unless the layer before has the same inputs.

    `alone`: layers that have statistics of their own in any case.
    """

    def __init__(self, alone: Collection[str] = ()) -> None:
        self.alone = alone
        self.gathered: Counter[str] = Counter()
        self.followed: dict[str, Counter[str]] = {}  # follower -> leader -> how often
        self._latest: tuple[str, weakref.ref[Tensor], int] | None = None

    def once(self, name: str, callback: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """The callback for layer `name`: `callback`, unless another layer has just had the same inputs."""

        def observe(inputs: Tensor) -> None:
            leader = None if name in self.alone else self._leader_of(inputs)
            if leader in (None, name):
                self.gathered[name] += 1
                self._latest = (name, weakref.ref(inputs), inputs._version)
                callback(inputs)
            else:
                self.followed.setdefault(name, Counter())[str(leader)] += 1

        return observe

    @property
    def counts(self) -> tuple[Counter[str], dict[str, Counter[str]]]:
        """How often each layer was gathered, and followed each other layer."""
        return self.gathered, self.followed

    def pool(self, counts: Iterable[tuple[Counter[str], dict[str, Counter[str]]]]) -> None:
        """Replace the counts by the sums of `counts`, those of this and of other processes."""
        self.gathered, self.followed = Counter(), {}
        for gathered, followed in counts:
            self.gathered.update(gathered)
            for name, times in followed.items():
                self.followed.setdefault(name, Counter()).update(times)

    def _leader_of(self, inputs: Tensor) -> str | None:
        """The layer whose callback was last called with this very tensor, as the tensor is now."""
        if self._latest is None:
            return None
        name, tensor, version = self._latest
        return name if tensor() is inputs and inputs._version == version else None

    def leaders(self) -> dict[str, str] | None:
        """The leader of every layer that always followed it; None if a layer followed at some times only."""
        found = {}
        for name, times in self.followed.items():
            leader = next(iter(times))
            if name in self.gathered or times != {leader: self.gathered[leader]}:
                return None
            found[name] = leader
        return found
