"""Laws of streamed passes that wait: on the host, so that the device holds one batch, or where there is room."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from nmbench.calibration import block_visit, waiting
from nmbench.calibration.paused_forward import go_on, paused_forwards
from nmbench.calibration.trial import writing_blocks
from nmbench.calibration.walk import walk
from nmbench.methods import Stat
from nmbench.models.bundle import Bundle
from nmbench_plugins.tiny import FAMILIES, TinyModel
from reference.live import Live
from reference.tiers import tiered
from reference.toys import Toy, plain, toy

WINDOW_TOKENS = 32
AT_ONCE = 4  # windows of a batch


def windows_of(count: int) -> Tensor:
    return torch.randint(64, (count, WINDOW_TOKENS), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def device_bytes(bundle: Bundle, windows: Tensor, monkeypatch) -> tuple[list[int], int]:
    """The bytes on the device while all passes wait, at the entry of every block, and the peak in between."""
    at_entries = []
    with Live([windows, *bundle.tensors().values()]) as live, monkeypatch.context() as patch:
        live.streaming(patch)
        with paused_forwards(bundle, windows.split(AT_ONCE)) as passes:
            for index in range(len(bundle.blocks)):
                at_entries.append(live.now)
                if index + 1 < len(bundle.blocks):
                    go_on(bundle, passes)
    return at_entries, live.peak


@pytest.mark.parametrize(  # tensors on "cuda" say that they are on "cuda:0"
    ("family", "device"),
    tiered(sorted(FAMILIES), ["cpu", "cpu:0"], fast=lambda family, device: device == "cpu:0" or family == "llama"),
)
def test_what_is_on_the_device_does_not_grow_with_the_windows(family, device, monkeypatch):
    """However many passes wait, the device holds nothing of theirs, and in between what one batch needs."""
    found = []
    for count in (8, 32):
        bundle = TinyModel().load(family)
        bundle.stream(torch.device(device))
        found.append(device_bytes(bundle, windows_of(count), monkeypatch))
    (few, few_peak), (many, many_peak) = found
    assert few == many == [0] * len(few)
    assert many_peak == few_peak


def test_passes_leave_where_there_is_no_room(monkeypatch):
    """What passes hold stays on the device if the room is enough for both paths; the statistics are the same."""
    windows, found, away = windows_of(8), [], []
    stored = waiting.stored_on_host
    monkeypatch.setattr(waiting, "stored_on_host", lambda tensor: away.append(tensor) or stored(tensor))
    for spare in (0, -1):
        bundle = TinyModel().load("llama")
        bundle.stream(torch.device("cpu"))
        writing_blocks(bundle, windows)  # whose passes always leave
        away.clear()
        bundle.streaming.room = waiting.hidden_bytes(bundle, windows.numel(), paths=2) + spare
        steps = walk(bundle, windows, Stat.GRAM | Stat.DRIFT)
        found.append([stats.gram for step in steps for stats in step.stats.values()])
        assert bool(away) == (spare < 0)
    assert all(torch.equal(stay, left) for stay, left in zip(*found, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("room", [0, 2**30], ids=["away", "stay"])
def test_statistics_are_those_of_a_model_on_the_gpu(room):
    """Wherever passes wait, on the way to pinned memory and back too, every bit of the statistics is the same."""
    windows, found, device = windows_of(64), [], torch.device("cuda")
    for streamed in (False, True):
        bundle = TinyModel().load("llama")
        if streamed:
            bundle.stream(device)
            bundle.streaming.room = room
        else:
            bundle.to(device)
        steps = walk(bundle, windows, Stat.GRAM | Stat.DRIFT | Stat.LAG, tokens_at_once=4 * WINDOW_TOKENS)
        found.append([(it.gram, it.drift, it.lag) for step in steps for it in step.stats.values()])
    for plain_one, streamed in zip(*found, strict=True):
        for one, other in zip(plain_one, streamed, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_one_dense_block_at_a_time(monkeypatch):
    """When a block is visited, the dense copy of the block before it is gone."""
    copies: list[weakref.ref[nn.Module]] = []
    dense_copy = block_visit.dense_copy

    def noted(*args) -> nn.Module:
        made = dense_copy(*args)
        copies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(block_visit, "dense_copy", noted)
    bundle = toy("plain")
    for step in walk(bundle, windows_of(4), Stat.GRAM | Stat.DRIFT):
        assert [copy() is not None for copy in copies] == [False] * step.index + [True]


@torch.no_grad()
def test_tables_of_a_module_stay():
    """A tensor that a module made once and keeps is shared by all passes: it stays on the device."""
    kept: list[Tensor] = []

    def join(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
        if not hasattr(model, "table"):
            model.table = {"positions": torch.arange(ids.shape[1]).float()[:, None]}
        table = model.table["positions"]
        kept.append(table)
        for block in model.blocks:
            hidden = block(hidden + table)
        return hidden

    bundle, windows = Bundle.of("toy", Toy(plain, join), None), windows_of(8)
    bundle.stream(torch.device("cpu"))
    bundle.model(windows)
    places = {kept[0].data_ptr()}
    with paused_forwards(bundle, windows.split(AT_ONCE)) as passes:
        go_on(bundle, passes)
        assert {table.data_ptr() for table in kept} == places


@torch.no_grad()
def test_views_made_while_a_tensor_waits_now_and_then():
    """A view that a pass takes of a tensor that has waited before still is a view of that tensor."""

    def join(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
        first, second, third = model.blocks
        held = hidden.clone()
        hidden = first(hidden)
        view = held[:, 1:]
        hidden = second(hidden)
        held.mul_(2)
        return third(hidden) + view.sum()

    bundle, windows = Bundle.of("toy", Toy(plain, join), None), windows_of(2)
    plainly = bundle.model(windows)
    bundle.stream(torch.device("cpu"))
    ends: list[Tensor] = []
    bundle.model.register_forward_hook(lambda model, args, output: ends.append(output))
    with paused_forwards(bundle, [windows]) as passes:
        for _ in bundle.blocks:
            go_on(bundle, passes)
    assert torch.equal(ends[0], plainly)
