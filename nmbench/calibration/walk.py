"""The one walk through the decoder that gathers the statistics of layer inputs.

The calibration windows go through the model in batches, each in one forward pass of the model itself, which is paused
at the entry of every decoder block (`paused_forward`). While all passes wait there, the block runs on every batch and
hooks gather the statistics of its layers; the caller prunes the block; every pass goes on through the pruned block to
the entry of the next one.

Two variations. A sequential walk visits the layers of a block in several steps, in the order in which they are
executed, so that each is pruned before the inputs of the next are gathered. For `Stat.DRIFT` and `Stat.LAG` a second
pass of each batch goes through a copy of every block that stays dense.

A model that is pruned already can be walked as well: the caller gives its dense weights.

Fused experts (`expert_inputs`) have statistics of the tokens routed to them. For an expert without tokens, all tokens
of the block are routed to it once; `Step.fallbacks` names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nmbench.calibration.block_visit import BlockVisit, Rules, undoing
from nmbench.calibration.finite import ONE_BY_ONE, Checks
from nmbench.calibration.paused_forward import PausedForward, go_on, paused_forwards
from nmbench.calibration.statistics import Skip
from nmbench.calibration.step import Step
from nmbench.calibration.trial import writing_blocks
from nmbench.calibration.waiting import leaves
from nmbench.errors import NMBenchError
from nmbench.methods import Stat
from nmbench.models.bundle import Bundle, Layer, hidden_width
from nmbench.models.forward import uncached
from nmbench.runtime.ranks import ALONE, Ranks

BATCH_TOKENS = 4096  # that go through a block at once; more is slower on a CPU
GPU_BATCH_NUMBERS = 2 * 10**7  # of a batch of hidden states; a GPU is not busy with 4096 tokens of a narrow model


@torch.no_grad()
def walk(
    bundle: Bundle,
    windows: Tensor,
    needs: Stat,
    sequential: bool = False,
    skip_tokens: int = 0,
    original: Callable[[Layer], Tensor] | None = None,
    start: int = 0,
    undo: bool = False,
    checks: Checks = ONE_BY_ONE,
    tokens_at_once: int | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Step]:
    """Visit the blocks from first to last; the blocks below see the weights that the caller gives a block.

    `windows` is int64 `[windows, window_tokens]`; the first `skip_tokens` of each are in no statistic. A block is one
    step, or several if `sequential`. `original` gives the dense weight `[out, in]` of a layer, if the live ones are not
    dense. The blocks before `start` are no steps. If `undo`, the prunable weights of a block are put back once its
    outputs have been computed, from a copy beside them; a streamed block is dropped instead. `checks` says when the
    statistics are found to be finite. `tokens_at_once`: tokens of a batch, by default what suits the device. `ranks`
    share the windows, and all of them get the same steps (`across_ranks`). TF32 is off while statistics are gathered.
    Raises `NMBenchError` if no token of a window is left, or if the model cannot be
    paused at its blocks.
    """
    rules = Rules(needs, len(windows), sequential, Skip(skip_tokens, windows.shape[1]), original, checks, ranks)
    check_skip(rules.skip)
    with passes(bundle, windows, rules, tokens_at_once) as (live, dense):
        for index, block in enumerate(bundle.blocks.values()):
            copied = bundle.block_layers(index) if undo and not bundle.streaming else ()  # streamed: the host has them
            with bundle.holding(block, undo), undoing(copied):
                visit = BlockVisit(bundle, index, live, dense, rules)
                if index < start:
                    visit.pass_by()
                else:
                    yield from visit.steps()
                if index + 1 < len(bundle.blocks):
                    go_on(bundle, live)
                    go_on(bundle, dense, visit.dense_block)
                del visit  # the dense copy of the block, before the next one is made


@contextlib.contextmanager
def passes(
    bundle: Bundle, windows: Tensor, rules: Rules, tokens_at_once: int | None
) -> Iterator[tuple[list[PausedForward], list[PausedForward]]]:
    """One paused pass for every batch of this rank, and another through dense weights where a statistic needs it."""
    own = rules.ranks.part(windows)
    batches, away = batches_of(bundle, own, tokens_at_once), leaves(bundle, own.numel(), 1 + rules.beside)
    with (
        uncached(bundle.model),
        paused_forwards(bundle, batches, writing := writing_blocks(bundle, windows), away=away) as live,
        paused_forwards(bundle, batches if rules.beside else (), writing, away=away) as dense,
    ):
        yield live, dense


def check_skip(skip: Skip) -> None:
    if not 0 <= skip.tokens < skip.window_tokens:
        raise NMBenchError(
            f"skip_tokens is {skip.tokens}, but calibration windows have {skip.window_tokens} tokens; skip fewer, or "
            f"give more --window-tokens."
        )


def batch_tokens(bundle: Bundle, device: torch.device) -> int:
    """The number of tokens that go through a block at once on a device; at least one window does."""
    return BATCH_TOKENS if device.type == "cpu" else max(BATCH_TOKENS, GPU_BATCH_NUMBERS // hidden_width(bundle))


def batches_of(bundle: Bundle, windows: Tensor, tokens_at_once: int | None = None) -> Sequence[Tensor]:
    """The windows int64 `[windows, window_tokens]` in batches, where the model computes."""
    if not len(windows):
        return []
    tokens = tokens_at_once or batch_tokens(bundle, bundle.device)
    return windows.to(bundle.device).split(max(1, tokens // windows.shape[1]))
