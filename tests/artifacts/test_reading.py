"""Every readable format gives the same masks; damaged and hostile files give an error of one line."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.artifacts.artifact import Unreadable
from nmbench.artifacts.bit_archive import read_bit_archive
from nmbench.artifacts.reading import open_artifact
from nmbench.pattern import Pattern
from nmbench.results.files import save_masks
from nmbench.testing.strategies import masks, patterns

quick = settings(max_examples=40, deadline=None)
TWO_FOUR = Pattern(2, 4)
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")


def two_four(rows=6, columns=16, seed=0):
    return TWO_FOUR.top(torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)))


def some_masks():
    return {name: two_four(4 + 2 * i, 16, i) for i, name in enumerate(NAMES)}


# One function for each format: writes masks of 2:4 layers, as the tool it is named after does.


def nmbench_packed(folder, chosen):
    save_masks(folder / "masks.safetensors", chosen, dict.fromkeys(chosen, TWO_FOUR), {"label": "acme"})
    return folder / "masks.safetensors"


def bool_safetensors(folder, chosen):
    safetensors.torch.save_file({f"{n}.weight.mask": mask for n, mask in chosen.items()}, folder / "m.safetensors")
    return folder / "m.safetensors"


def maskllm_npz(folder, chosen):
    packed = {f"{name}.weight.mask": np.packbits(mask.numpy()) for name, mask in chosen.items()}
    np.savez_compressed(folder / "m.npz", **packed)
    return folder / "m.npz"


def patch_npz(folder, chosen, **meta):
    """The form of Paramathic/patch: bits and a shape for every weight, and one JSON text."""
    bits = {f"{name}.weight": np.packbits(mask.numpy()) for name, mask in chosen.items()}
    shapes = {f"{name}.weight.__shape__": np.array(mask.shape, dtype=np.int64) for name, mask in chosen.items()}
    np.savez_compressed(folder / "m.npz", __meta__=np.array(json.dumps(meta)), **bits, **shapes)
    return folder / "m.npz"


def maskllm_raw(folder, chosen):
    torch.save({f"{name}.weight.mask": mask.half() for name, mask in chosen.items()}, folder / "m.pt")
    return folder / "m.pt"


def maskpro_folder(folder, chosen):
    for name, mask in chosen.items():
        torch.save(mask, folder / f"{name}.pt")
    return folder


def state_dict(folder, chosen):
    torch.save({"model": {f"{name}.mask": mask for name, mask in chosen.items()}}, folder / "m.bin")
    return folder / "m.bin"


FORMATS = (nmbench_packed, bool_safetensors, maskllm_npz, patch_npz, maskllm_raw, maskpro_folder, state_dict)


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_masks_written(write, tmp_path):
    """Masks are read with layer names without endings, shapes, and every bit; flat masks take the shape of a layer."""
    chosen = some_masks()
    artifact = open_artifact(str(write(tmp_path, chosen)))
    assert set(artifact.masks) == set(chosen)
    assert not artifact.weights
    for name, mask in chosen.items():
        matrix = artifact.masks[name].shaped(tuple(mask.shape))
        assert matrix.shape == tuple(mask.shape)
        assert torch.equal(matrix.whole(), mask)


@quick
@given(st.data(), st.sampled_from(FORMATS[:5]), st.integers(1, 80))
def test_slices_are_the_whole_in_order(tmp_path_factory, data, write, weights):
    """Slices of any size, put together, equal the matrix; each comes with its first row and column."""
    pattern = data.draw(patterns(max_group=8))
    mask = data.draw(masks(pattern))
    matrix = open_artifact(str(write(tmp_path_factory.mktemp("slices"), {NAMES[0]: mask}))).masks[NAMES[0]]
    shaped = matrix.shaped(tuple(mask.shape))
    parts = list(shaped.slices(pattern.group, weights))
    assert torch.equal(torch.cat([part for _, _, part in parts]), mask)
    assert [row for row, _, _ in parts] == list(range(0, len(mask), max(1, weights // mask.shape[1])))
    if matrix.flat:
        pieces = list(matrix.slices(pattern.group, weights))
        assert torch.equal(torch.cat([part for _, _, part in pieces], dim=1)[0, : mask.numel()], mask.view(-1))
        assert all(column % pattern.group == 0 for _, column, _ in pieces)


def test_a_mask_of_another_size_does_not_take_a_shape(tmp_path):
    """Too many or too few packed bits for a layer are refused, with the name of the layer."""
    matrix = open_artifact(str(maskllm_npz(tmp_path, {NAMES[0]: two_four(4, 16)}))).masks[NAMES[0]]
    for shape in ((4, 20), (2, 16), (4, 12)):
        with pytest.raises(Unreadable, match=f"{NAMES[0]} has 64 entries"):
            matrix.shaped(shape)


def weights_of(chosen):
    return {f"{name}.weight": torch.randn(mask.shape).masked_fill(~mask, 0.0) for name, mask in chosen.items()}


def sharded(folder, weights, suffix="safetensors", stem="model"):
    """A checkpoint in two shards with an index, as transformers writes it."""
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    index = {}
    for number, name in enumerate(weights):
        file = f"{stem}-{1 + number % 2:05d}-of-00002.{suffix}"
        index[name] = file
    for file in set(index.values()):
        save({name: weights[name] for name in weights if index[name] == file}, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize(("suffix", "stem"), [("safetensors", "model"), ("bin", "pytorch_model")])
def test_shards_are_one_checkpoint(tmp_path, suffix, stem):
    """All shards of an index, safetensors or bin, give the weights of one artifact."""
    weights = weights_of(some_masks())
    artifact = open_artifact(str(sharded(tmp_path, weights, suffix, stem)))
    assert {f"{name}.weight": True for name in artifact.weights} == dict.fromkeys(weights, True)
    assert all(torch.equal(artifact.weights[n].whole(), weights[f"{n}.weight"]) for n in artifact.weights)


def test_safetensors_come_before_bin(tmp_path):
    """Of a folder with both, the file that transformers would load is read, and `form` names that file."""
    weights = weights_of(some_masks())
    torch.save({}, tmp_path / "pytorch_model.bin")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    assert open_artifact(str(tmp_path)).form == "folder with model.safetensors"


# Damaged and hostile files


def read_all(path):
    """Open a file and read every matrix of it."""
    artifact = open_artifact(str(path))
    for matrix in (*artifact.weights.values(), *artifact.masks.values()):
        assert sum(part.numel() for _, _, part in matrix.slices()) == matrix.weights


def refused(path, *pieces):
    """Open and read a file; return the one line of the error."""
    with pytest.raises(Unreadable) as caught:
        read_all(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    for piece in pieces:
        assert piece in text
    return text


@pytest.mark.parametrize("content", [b"", b"x", b"hello, world" * 10, b"\x00" * 64, b"PK\x03\x04", b"\x80", b"{}"])
def test_files_of_no_format(tmp_path, content):
    """A file of no known format gives an error of one line with the name of the file."""
    (tmp_path / "file.bin").write_bytes(content)
    refused(tmp_path / "file.bin", "file.bin")


def test_what_is_not_there(tmp_path):
    """A missing path and an empty folder are refused; the error names the formats expected."""
    refused(tmp_path / "nothing", "does not exist; expected safetensors")
    refused(tmp_path, "holds neither model.safetensors")


@pytest.mark.parametrize("write", FORMATS[:5])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_truncated_files(write, share, tmp_path):
    """A file that ends early is refused, wherever it ends."""
    path = write(tmp_path, some_masks())
    content = path.read_bytes()
    path.write_bytes(content[: max(int(len(content) * share), 0)])
    refused(path, path.name)


@quick
@given(st.sampled_from(FORMATS[:5]), st.data())
def test_flipped_bytes_never_crash(tmp_path_factory, write, data):
    """A file with any byte changed gives masks or `Unreadable`, never another exception."""
    path = write(tmp_path_factory.mktemp("flipped"), {NAMES[0]: two_four()})
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        for matrix in open_artifact(str(path)).masks.values():
            matrix.whole()
    except Unreadable as error:
        assert "\n" not in str(error)  # noqa: PT017 (both ends are good)


class Evil:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [True, False])
def test_pickled_code_is_never_run(tmp_path, legacy):
    """A torch file, old or new, that holds code is refused with the name of the code, and the code does not run."""
    torch.save({"a.weight": Evil(tmp_path / "owned")}, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "m.pt", "asks for code", "mkdir")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    refused(tmp_path / "plain.pt", "plain.pt")
    assert not (tmp_path / "owned").exists()


def test_pickles_in_an_archive_are_not_run(tmp_path):
    """An object array in an .npz is refused, as is any array that is not packed bits."""
    np.savez(tmp_path / "m.npz", a=np.array([Evil(tmp_path / "owned")], dtype=object))
    refused(tmp_path / "m.npz", "a.npy", "not a packed mask")
    assert not (tmp_path / "owned").exists()
    np.savez(tmp_path / "f.npz", a=np.ones(8))
    refused(tmp_path / "f.npz", "not a packed mask: float64 (8,)")


def test_a_header_that_claims_too_much(tmp_path):
    """An array header with a shape beyond the stored bytes is refused before an array of that shape is made."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("a.npy", header.getvalue() + b"\x00" * 8)
    refused(tmp_path / "m.npz", "a.npy", "not a packed mask")


def test_a_bomb(tmp_path):
    """A large entry that unpacks to very much more than its compressed size is refused unread."""
    np.savez_compressed(tmp_path / "m.npz", **{"a.weight.mask": np.zeros(2**22, np.uint8)})
    with pytest.raises(Unreadable, match="refused as a bomb"):
        read_bit_archive(tmp_path / "m.npz", large=2**20)
    assert read_bit_archive(tmp_path / "m.npz", large=2**23).masks


def test_a_torch_file_that_is_compressed(tmp_path):
    """A compressed torch archive is refused, since torch stores tensors uncompressed."""
    torch.save({"a.weight": torch.zeros(512, 512)}, tmp_path / "m.pt")
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as old,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(tmp_path / "z.pt", "unpacks to more than it is")


def test_a_tensor_that_repeats_its_storage(tmp_path):
    """A few bytes that claim to be a large matrix, by a stride of 0, are refused."""
    torch.save({"a.weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "a.weight", "claims shape (1000000, 1000000)")


@pytest.mark.parametrize(
    "header",
    [
        {"a.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 10**12]}},
        {"a.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [32, 96]}},
        {"a.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}},
        {"a.weight": {"dtype": "F99", "shape": [4, 4], "data_offsets": [0, 64]}},
        {"a.weight": 3},
        [],
    ],
)
def test_safetensors_with_wrong_offsets(tmp_path, header):
    """Offsets outside the file, gaps, shapes that do not fit and unknown dtypes are refused."""
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\x00" * 64)
    refused(tmp_path / "m.safetensors", "m.safetensors")


def test_safetensors_with_a_huge_header(tmp_path):
    """A header length beyond the file, or beyond reason, is refused."""
    for size in (2**63, 10**9, 100):
        (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", size) + b"{" + b" " * 20)
        refused(tmp_path / "m.safetensors", "m.safetensors")


@pytest.mark.parametrize(
    "layers",
    [
        "nonsense",
        {},
        {NAMES[0]: {"shape": [6, 16], "pattern": "2:4"}, "other": {"shape": [6, 16], "pattern": "2:4"}},
        {NAMES[0]: {"shape": [6, 160], "pattern": "2:4"}},
        {NAMES[0]: {"shape": [-6, -16], "pattern": "2:4"}},
        {NAMES[0]: {"shape": [6, 16], "pattern": "9:4"}},
        {NAMES[0]: {"shape": [6, 16]}},
        {NAMES[0]: {"shape": "ab", "pattern": "2:4"}},
        {NAMES[0]: None},
    ],
)
def test_packed_masks_that_contradict_themselves(tmp_path, layers):
    """Packed masks whose metadata do not fit their bits are refused."""
    path = nmbench_packed(tmp_path, {NAMES[0]: two_four()})
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, bits = dict(file.metadata()), file.get_tensor(NAMES[0])
    safetensors.torch.save_file({NAMES[0]: bits}, path, {**metadata, "layers": json.dumps(layers)})
    refused(path, "is damaged")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/m.safetensors", "..", "missing", "", 3])
def test_an_index_that_points_elsewhere(tmp_path, file):
    """An index that names a file outside its folder, or a missing file, is refused."""
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": file}}))
    refused(folder, "model.safetensors.index.json")


@pytest.mark.parametrize("where", [None, "model-00002-of-00002.safetensors"])
def test_an_index_that_disagrees_with_its_shards(tmp_path, where):
    """A tensor that the index omits, or places in another shard, is refused, with the name of the tensor."""
    sharded(tmp_path, weights_of(some_masks()))
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())["weight_map"]
    content[f"{NAMES[0]}.weight"] = where
    index.write_text(json.dumps({"weight_map": {name: file for name, file in content.items() if file}}))
    refused(tmp_path, "disagree on where", f"{NAMES[0]}.weight")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "{", "\x00", "[" * 100000]
)
def test_an_index_that_is_none(tmp_path, content):
    """An index of another form is refused."""
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, "model.safetensors.index.json")


def test_a_mask_that_is_none(tmp_path):
    """Numbers besides 0 and 1 under the name of a mask are refused when they are read."""
    torch.save({"a.weight.mask": torch.tensor([[0.0, 1.0, 0.5, 1.0]])}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "a.weight.mask is no mask")


@pytest.mark.parametrize("name", ["a\nSTRICT 2:4\n", "a\x1b[2Jb", "a\u202eb"])
def test_names_that_a_terminal_would_obey(tmp_path, name):
    """A layer's name with line breaks or control characters is refused, and printed escaped."""
    safetensors.torch.save_file({f"{name}.weight": torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    assert refused(tmp_path / "m.safetensors", "such names are not printed").isprintable()
    np.savez(tmp_path / "m.npz", **{name: np.ones(3)})
    assert refused(tmp_path / "m.npz", "not a packed mask").isprintable()


def test_two_masks_of_one_layer(tmp_path):
    """Two masks of one layer, as `a.mask` and `a.weight.mask`, are refused."""
    mask = two_four()
    torch.save({"a.mask": mask, "a.weight.mask": mask}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "two matrices for layer a")


def test_a_folder_of_masks_with_something_else(tmp_path):
    """A file of weights in a folder of masks is refused, with the name of the file."""
    maskpro_folder(tmp_path, some_masks())
    torch.save({"x": torch.zeros(3)}, tmp_path / "optimizer.pt")
    refused(tmp_path, "optimizer.pt", "not the mask of one layer")
