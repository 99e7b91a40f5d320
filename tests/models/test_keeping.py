"""Laws of results on their way to the host or its disk: nothing is lost or changed, and few wait on the device."""

import io
import mmap
import threading

import pytest
import torch

from nmbench.errors import CannotWrite
from nmbench.methods import Pruned
from nmbench.models import keeping, mapped, temporary
from nmbench.models.keeping import Keeping
from nmbench_plugins.tiny import TinyModel

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def streamed(device: str = "cpu", from_disk: bool = False):
    bundle = TinyModel().load("llama")
    bundle.stream(torch.device(device), from_disk)
    return bundle


def results(bundle, device: str) -> dict[str, Pruned]:
    """A mask for every layer and, for every second one, a weight; one of them is not contiguous."""
    found = {}
    for number, (name, layer) in enumerate(bundle.layers.items()):
        weight = layer.read().to(device, torch.float32)
        mask = (weight > 0).t().contiguous().t() if number == 1 else weight > 0
        found[name] = Pruned(mask, weight * 2 if number % 2 else None, note=name)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("from_disk", [False, True], ids=["host", "disk"])
@pytest.mark.parametrize("part", [100, 2**26])
def test_results_arrive_as_they_were(device, from_disk, part, monkeypatch):
    """Masks, weights and notes of all layers are on the host as the method gave them, whatever the size of a part."""
    monkeypatch.setattr(keeping, "PART", part)
    bundle = streamed(device, from_disk)
    given = results(bundle, device)
    with Keeping(bundle) as kept:
        for name, pruned in given.items():
            kept.take(name, pruned)
        found = kept.layers()
    assert list(found) == list(given)
    for name, pruned in given.items():
        assert found[name].note == name
        assert found[name].mask.device.type == "cpu"
        assert torch.equal(found[name].mask, pruned.mask.cpu())
        assert (found[name].weight is None) == (pruned.weight is None)
        assert pruned.weight is None or torch.equal(found[name].weight, pruned.weight.cpu())


def test_a_model_that_is_not_streamed_keeps_its_results():
    bundle = TinyModel().load("llama")
    given = results(bundle, "cpu")
    with Keeping(bundle) as kept:
        for name, pruned in given.items():
            kept.take(name, pruned)
        assert all(kept.layers()[name] is pruned for name, pruned in given.items())


def test_few_results_wait(monkeypatch):
    """While a slow thread is at work, taking waits before more than the masks of a block and one layer are there."""
    bundle, go = streamed(), threading.Event()
    waiting, most = [0], [0]
    brought = Keeping._brought

    def slowly(self, pruned, ready):
        go.wait(10)
        found = brought(self, pruned, ready)
        waiting[0] -= pruned.mask.nbytes
        return found

    monkeypatch.setattr(Keeping, "_brought", slowly)
    largest = max(sum(la.read().numel() for la in bundle.block_layers(i)) for i in range(len(bundle.blocks)))
    layer = max(la.read().numel() for la in bundle.layers.values())
    assert len(bundle.blocks) > 1
    with Keeping(bundle) as kept:
        threading.Timer(0.2, go.set).start()
        for name, weight in bundle.layers.items():
            waiting[0] += weight.read().numel()
            kept.take(name, Pruned(weight.read() > 0))
            most[0] = max(most[0], waiting[0])
        assert len(kept.layers()) == len(bundle.layers)
    assert layer < most[0] <= largest + layer


def test_a_disk_that_takes_no_more_is_said():
    """A write that fails is one line with the folder and the remedy."""

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    mapping = mmap.mmap(-1, 64)  # the file is open as long as it lives
    with pytest.raises(CannotWrite, match=r"No space left on device; set TMPDIR"):
        temporary.Filling(mapping, Full()).write(0, [torch.zeros(8, dtype=torch.uint8)])


def test_a_full_disk_is_said(monkeypatch):
    """What the thread met is raised where results are asked for, and the thread ends with the context."""
    bundle = streamed(from_disk=True)
    full = CannotWrite("no room")
    monkeypatch.setattr(mapped, "temporary_mapping", lambda size: (_ for _ in ()).throw(full))
    with Keeping(bundle) as kept:
        kept.take("first", next(iter(results(bundle, "cpu").values())))
        with pytest.raises(CannotWrite, match="no room"):
            kept.layers()
    assert not any(thread.name.startswith("nmbench-keeping") for thread in threading.enumerate())
