"""Layers that are given the very same tensor, as the projections of an attention are: its statistics are gathered once.

That two layers are given the same is seen, not known of an architecture: the second hears the same tensor object, not
written to since. Whoever does so at some times and not at others has no leader, and is listened to again, alone.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection

from torch import Tensor


class CommonInputs:
    """Passes on to every layer what it is given, but for what the layer before it was given already.

    `alone`: layers that have statistics of their own in any case.
    """

    def __init__(self, alone: Collection[str] = ()) -> None:
        self.alone = alone
        self.told: Counter[str] = Counter()
        self.followed: dict[str, Counter[str]] = {}  # follower -> leader -> how often
        self._latest: tuple[str, weakref.ref[Tensor], int] | None = None

    def once(self, name: str, tell: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """What the layer `name` is to be told by: `tell`, unless it is given what another one was just told of."""

        def hear(inputs: Tensor) -> None:
            leader = None if name in self.alone else self._leader_of(inputs)
            if leader in (None, name):
                self.told[name] += 1
                self._latest = (name, weakref.ref(inputs), inputs._version)
                tell(inputs)
            else:
                self.followed.setdefault(name, Counter())[str(leader)] += 1

        return hear

    def _leader_of(self, inputs: Tensor) -> str | None:
        """Who was told of this very tensor, as it is now, last."""
        if self._latest is None:
            return None
        name, tensor, version = self._latest
        return name if tensor() is inputs and inputs._version == version else None

    def leaders(self) -> dict[str, str] | None:
        """The leader of every layer that always followed it; None if one did so now and then only."""
        found = {}
        for name, times in self.followed.items():
            leader = next(iter(times))
            if name in self.told or times != {leader: self.told[leader]}:
                return None
            found[name] = leader
        return found
