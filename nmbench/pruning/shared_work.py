"""The part of a task that the ranks of torchrun share: losses of a minibatch, and proofs that all go the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from nmbench.plain_data import digest
from nmbench.runtime.ranks import sharing
from nmbench.verification.strict import masks_digest


class SharedWork:
    """Base of a task. `ranks`: the processes that share its work, as a rule one (`nmbench.runtime.ranks.Ranks`)."""

    def __init__(self) -> None:
        self.ranks = sharing()

    def count_forward(self, tokens: int) -> None:
        """Count tokens that a learner ran through the model."""
        raise NotImplementedError

    def shared(self, tokens: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the losses of the windows `tokens` `[n, window_tokens]`, each measured by one rank: `[n]`.

        `measure` returns the losses of windows as `loss` does, and counts their tokens; those of other ranks are
        counted here. Without other ranks this is `measure(tokens)`.
        """
        own = self.ranks.part(tokens)
        losses = measure(own) if len(own) else tokens.new_zeros(0).float()
        self.count_forward(tokens.numel() - own.numel())
        return self.ranks.gathered(losses, len(tokens))

    def check_same(self, masks: Mapping[str, Tensor]) -> None:
        """Raise `NMBenchError` if ranks hold different masks."""
        if self.ranks.size > 1:
            self.ranks.check_same(masks_digest(masks), "masks")

    def check_same_checkpoint(self, state: Mapping[str, Any] | None) -> None:
        """Raise `NMBenchError` if ranks go on from different checkpoints, as where a file system is not shared."""
        if self.ranks.size > 1:
            plain = {name: value for name, value in (state or {}).items() if isinstance(value, (int, float, str))}
            self.ranks.check_same(digest(plain) if state is not None else "no checkpoint", "checkpoints")
