"""Laws of the files that survive a kill: packed masks, atomic writes, checkpoints."""

import contextlib
import errno
import io
import os
import re

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import CannotWrite, NMBenchError
from nmbench.pattern import Pattern
from nmbench.results.files import (
    FileCheckpoints,
    MemoryCheckpoints,
    load_masks,
    pack,
    read_tensors,
    save_masks,
    unpack,
    write_atomic,
    write_tensors,
)
from nmbench.testing.strategies import masks, patterns, values

quick = settings(max_examples=40, deadline=None)
STATE = {"logits": torch.randn(3, 4), "codes": torch.arange(5, dtype=torch.uint8), "step": 7, "best": [0, 3.5, None]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples of a law."""
    return tmp_path_factory.mktemp("store")


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


# Bits


@quick
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 2**31))
def test_pack_round_trip(shape, seed):
    """Any bool mask, strict or not, comes back from its bits, one bit a weight."""
    mask = values("normal", tuple(shape), seed) > 0
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack(packed, tuple(shape)), mask)
    assert torch.equal(pack(mask.transpose(0, -1)), pack(mask.transpose(0, -1).contiguous()))


def test_bit_order_of_the_format():
    """Entry i is bit i % 8 of byte i // 8, lowest bit first: files of today can be read tomorrow."""
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    assert pack(mask).tolist() == [0b00100001, 0b00001001]


@quick
@given(st.integers(1, 40), st.integers(0, 6))
def test_wrong_number_of_bytes_is_refused(count, size):
    """Bits that are too few or too many bytes for the shape are an error that gives both numbers."""
    needed = -(-count // 8)
    packed = torch.zeros(size, dtype=torch.uint8)
    if size == needed:
        assert unpack(packed, (count,)).shape == (count,)
        return
    with pytest.raises(NMBenchError, match=f"has {needed} bytes, not {size}"):
        unpack(packed, (count,))


@quick
@given(st.data())
def test_mask_files_round_trip(folder, data):
    """Masks read from a file are the masks written, layer by layer."""
    chosen = {name: data.draw(patterns()) for name in data.draw(st.sets(st.sampled_from(["a", "b.c", "d"])))}
    kept = {name: data.draw(masks(pattern)) for name, pattern in chosen.items()}
    save_masks(folder / "masks.safetensors", kept, chosen, {"label": "acme"})
    found = load_masks(folder / "masks.safetensors")
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], mask) for name, mask in kept.items())


def test_mask_files_say_what_they_hold(folder):
    """Pattern, shape, owner and format are in the file, and a mask takes one bit a weight."""
    mask = Pattern(2, 4).top(torch.randn(64, 512))
    save_masks(folder / "m.safetensors", {"a": mask}, {"a": Pattern(2, 4)}, {"label": "acme", "model_digest": "f00"})
    tensors, about = read_tensors(folder / "m.safetensors")
    assert about["layers"] == {"a": {"shape": [64, 512], "pattern": "2:4"}}
    assert (about["label"], about["model_digest"]) == ("acme", "f00")
    assert tensors["a"].numel() * 8 == mask.numel()


def test_other_tensors_are_no_masks(folder):
    """A file of tensors that are no packed masks is refused by name."""
    write_tensors(folder / "losses.safetensors", {"a": torch.zeros(3)}, {"label": "acme"})
    with pytest.raises(NMBenchError, match=r"losses\.safetensors does not hold masks packed by nmbench"):
        load_masks(folder / "losses.safetensors")


# Atomic writes


def test_write_makes_folders_and_replaces(tmp_path):
    """A write makes the folders it needs, replaces what was there, and leaves nothing else behind."""
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"old and longer")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("old", [b"old", None])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step, old):
    """When the disk refuses, the old file stays as it was, no other is left, and the user gets one line."""
    path = tmp_path / "file"
    if old is not None:
        write_atomic(path, old)
    monkeypatch.setattr(os, step, refuse(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(
        NMBenchError, match=r"cannot write .*file: No space left on device\. Nothing finished"
    ) as caught:
        write_atomic(path, b"new")
    assert "same command again" in one_line(caught)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == ({"file": old} if old else {})


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_interrupt_leaves_the_old_file(tmp_path, monkeypatch, step):
    """Ctrl-C in the middle of a write passes through, and leaves the old file and no other."""
    write_atomic(tmp_path / "file", b"old")
    monkeypatch.setattr(os, step, refuse(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def refuse(error):
    def raise_it(*args):
        raise error

    return raise_it


def test_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    """The content is synced before the rename: a crash between the two cannot leave an empty file under the name."""
    calls = []
    for step in ("fsync", "replace"):
        real = getattr(os, step)
        monkeypatch.setattr(os, step, lambda *args, step=step, real=real: (calls.append(step), real(*args)))
    write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the last makes the new name durable


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    """A folder that cannot be made, because a file has its name, is an error of one line that names the path."""
    (tmp_path / "out").write_text("I am a file")
    with pytest.raises(NMBenchError, match=r"cannot write .*out/masks/a") as caught:
        write_atomic(tmp_path / "out" / "masks" / "a", b"new")
    one_line(caught)


# Tensors and metadata


def test_equal_contents_are_equal_files(tmp_path):
    """Files of the same tensors and metadata are the same bytes, whatever the order that a library hashes them in."""
    about = {name: [name, '\u00e9 "quoted"'] for name in "abcdefghij"}
    tensors = {"b": torch.arange(3), "a": torch.arange(2)}
    write_tensors(tmp_path / "one", tensors, about)
    write_tensors(tmp_path / "two", dict(sorted(tensors.items())), about)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_tensors(tmp_path / "one")[1] == about


@quick
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
    st.dictionaries(st.text(min_size=1), st.none() | st.integers() | st.text() | st.lists(st.booleans())),
)
def test_tensor_files_round_trip(folder, dtype, metadata):
    """Tensors of any dtype and layout, and any JSON metadata, come back as they were."""
    tensors = {"plain": torch.randn(3, 4).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    tensors |= {"view": tensors["plain"].t(), "empty": torch.zeros(0, 2, dtype=dtype)}
    write_tensors(folder / "t.safetensors", tensors, metadata)
    found, about = read_tensors(folder / "t.safetensors")
    assert about == metadata
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


@quick
@given(st.data())
def test_torn_file_is_refused(folder, data):
    """A tensor file cut off at any byte is refused in one line with the remedy, never read as something else."""
    whole, torn = folder / "whole.safetensors", folder / "torn.safetensors"
    write_tensors(whole, {"a": torch.arange(10)}, {"label": "acme"})
    content = whole.read_bytes()
    torn.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(NMBenchError, match=r"cannot read .*torn\.safetensors: .*Remove it and run again") as caught:
        read_tensors(torn)
    one_line(caught)


@pytest.mark.parametrize("content", [b"", b"not a tensor file at all", b"\0" * 100])
def test_other_file_is_refused(folder, content):
    """A file that is not of this kind is refused in one line with the remedy."""
    (folder / "other").write_bytes(content)
    with pytest.raises(NMBenchError, match=r"cannot read .*other: .*Remove it and run again") as caught:
        load_masks(folder / "other")
    one_line(caught)


# Checkpoints


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    return MemoryCheckpoints() if request.param == "memory" else FileCheckpoints(tmp_path / "c.safetensors", "job 1")


def test_checkpoint_round_trip(store):
    """A checkpoint store has nothing at first, then the state saved last: tensors and plain values by name."""
    assert store.load() is None
    store.save({"old": torch.zeros(2), "step": 6})
    store.save(STATE)
    for _ in range(2):  # loading does not use it up
        found = store.load()
        assert found.keys() == STATE.keys()
        assert (found["step"], found["best"]) == (7, [0, 3.5, None])
        assert torch.equal(found["logits"], STATE["logits"])
        assert torch.equal(found["codes"], STATE["codes"])


def test_checkpoint_keeps_what_was_saved(store):
    """Changing a tensor after it was saved does not change the checkpoint."""
    logits = torch.zeros(4)
    store.save({"logits": logits})
    logits += 1
    assert store.load()["logits"].sum() == 0


def test_checkpoint_of_another_job_is_ignored(tmp_path):
    """A job starts anew where the file holds the checkpoint of a job of another digest."""
    path = tmp_path / "c.safetensors"
    FileCheckpoints(path, "job 1").save(STATE)
    other = FileCheckpoints(path, "job 2")
    assert other.load() is None
    other.save({"step": 1})
    assert other.load() == {"step": 1}
    assert FileCheckpoints(path, "job 1").load() is None


def test_cleared_checkpoint_is_gone(tmp_path):
    """Clearing removes the file, and clearing again does no harm."""
    checkpoints = FileCheckpoints(tmp_path / "c.safetensors", "job 1")
    checkpoints.save(STATE)
    checkpoints.clear()
    checkpoints.clear()
    assert checkpoints.load() is None
    assert os.listdir(tmp_path) == []


@quick
@given(st.data())
def test_a_torn_checkpoint_is_not_taken_up(folder, data):
    """A checkpoint cut off at any byte is neither taken up nor silently dropped: a notice names the file."""
    path = folder / "c.safetensors"
    FileCheckpoints(path, "job 1").save(STATE)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    check_dropped(path)


def check_dropped(path):
    """A checkpoint of `job 1` is left out, with a notice of one line."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert FileCheckpoints(path, "job 1").load() is None
    assert re.fullmatch(rf"NOTICE cannot read {re.escape(str(path))}: .* Its work is done again\.\n", said.getvalue())


@quick
@given(st.data())
def test_a_flipped_bit_is_found(folder, data):
    """After one wrong bit anywhere in a file of tensors or its metadata, nothing is read, or what was written.

    The latter is so where the name of the checksums themselves is damaged.
    """
    path = folder / "flipped.safetensors"
    FileCheckpoints(path, "job 1").save(STATE)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        found = FileCheckpoints(path, "job 1").load()
    assert ("NOTICE" in said.getvalue()) == (found is None)
    assert found is None or all(torch.equal(found[name], STATE[name]) for name in ("logits", "codes"))
    assert found is None or (found["step"], found["best"]) == (STATE["step"], STATE["best"])


def test_disk_that_fills_up_in_the_middle_of_a_checkpoint(tmp_path, monkeypatch):
    """A disk that is full before all tensors are written leaves the last checkpoint in force, and no other file."""
    checkpoints = FileCheckpoints(tmp_path / "c.safetensors", "job 1")
    checkpoints.save({"step": 1})
    error = safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", refuse(error))
        with pytest.raises(CannotWrite, match=r"cannot write .*c\.safetensors: I/O error: No space left") as caught:
            checkpoints.save({"step": 2, "logits": torch.zeros(3)})
    one_line(caught)
    assert checkpoints.load() == {"step": 1}
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    """A checkpoint that cannot be written leaves the one before it in force."""
    checkpoints = FileCheckpoints(tmp_path / "c.safetensors", "job 1")
    checkpoints.save({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(NMBenchError, match="No space left"):
            checkpoints.save({"step": 2})
    assert checkpoints.load() == {"step": 1}


def test_files_are_for_others_to_read(tmp_path):
    """Every written file has the permissions of a new file, whichever library wrote it."""
    path = tmp_path / "masks.safetensors"
    write_tensors(path, {"a": torch.ones(2)}, {})
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
