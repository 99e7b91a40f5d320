"""Mask files of other tools: one that the tool itself wrote, and hostile ones of the same form."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from nmbench.artifacts.artifact import Unreadable
from nmbench.artifacts.bit_archive import LARGEST_META
from nmbench.artifacts.kept_masks import open_masks
from nmbench.artifacts.reading import open_artifact
from nmbench.artifacts.validation import NONZEROS, validate
from nmbench.pattern import Pattern

PUBLISHED = Path(__file__).parents[1] / "data/published"
SHAPES = {"self_attn.q_proj": (8, 16), "mlp.up_proj": (12, 16), "mlp.down_proj": (16, 12)}
SHORT = ("model.layers.1.mlp.up_proj", 3, 4)  # a kept weight of the checkpoint that is zero
KEY = "model.layers.0.mlp.up_proj.weight"


def rule(rows, columns):
    """The 2:4 mask in the published file: pairs that move by one column a row and a group."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return (column - row - column // 4) % 4 < 2


def expected():
    masks = {f"model.layers.{i}.{name}": rule(*shape) for i in range(2) for name, shape in SHAPES.items()}
    masks[SHORT[0]][SHORT[1:]] = False
    return masks


def test_the_file_of_the_public_writer_is_read():
    """Names, shapes and every bit of `mask.npz` are those of the checkpoint that its writer was given."""
    artifact = open_artifact(str(PUBLISHED / "mask.npz"))
    assert set(artifact.masks) == set(expected())
    for name, mask in expected().items():
        assert artifact.masks[name].shape == tuple(mask.shape)
        assert torch.equal(artifact.masks[name].whole(), mask)
    assert artifact.patterns == dict.fromkeys(expected(), Pattern(2, 4))
    kept = open_masks(str(PUBLISHED / "mask.npz"))
    assert kept.base_model == artifact.about["base_model"] == "example/two-blocks"
    assert kept.at_most


def test_the_published_masks_are_non_zeros():
    """A group whose kept weight is zero has fewer than N and is no fault; one with more than N is named."""
    artifact = open_artifact(str(PUBLISHED / "mask.npz"))
    found = validate(artifact)
    assert (found.strict, found.basis, sum(layer.fewer for layer in found.layers)) == (True, NONZEROS, 1)
    bad = validate(artifact, Pattern(1, 4)).first_problem
    assert bad.problem.endswith("keep 2 instead of at most 1")


def archive(folder, **changes):
    """An archive of one mask of 8 x 16 in the form of PATCH, with some entries replaced; None leaves one out."""
    entries = {KEY: np.packbits(rule(8, 16)), f"{KEY}.__shape__": np.array([8, 16]), "__meta__": np.array("{}")}
    entries |= {name.replace("KEY", KEY): value for name, value in changes.items()}
    np.savez_compressed(folder / "m.npz", **{name: value for name, value in entries.items() if value is not None})
    return str(folder / "m.npz")


def refused(path, message):
    with pytest.raises(Unreadable, match=message) as caught:
        open_artifact(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([8, 12], r"128 bits for .*up_proj.weight, not those of its shape \(8, 12\)"),
        ([2**40, 2**40], "not those of its shape"),
        ([2**63 - 1, 2**63 - 1], "not those of its shape"),
        ([-8, -16], r"not the shape of a matrix: \(-8, -16\)"),
        ([0, 16], "not the shape of a matrix"),
        ([8, 16, 1], "expected two integers"),
        ([8.0, 16.0], "expected two integers"),
        ([[8, 16]], "expected two integers"),
    ],
)
def test_shapes_that_do_not_fit(tmp_path, shape, message):
    """A shape is two positive integers that take the bytes of its mask, however large they claim to be."""
    refused(archive(tmp_path, **{"KEY.__shape__": np.array(shape)}), message)


def test_a_shape_without_a_mask(tmp_path):
    """A shape whose mask is missing is refused: the archive is not whole."""
    refused(archive(tmp_path, **{"other.weight.__shape__": np.array([8, 16])}), "a shape for other.weight, but no mask")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (np.array("no json"), "not JSON"),
        (np.array("[" * 90_000), "not JSON"),
        (np.array("[1]"), "not a JSON object"),
        (np.array(["{}"]), "expected one text"),
        (np.array(b"{}"), "expected one text"),
        (np.array(""), "not JSON|not metadata"),
        (np.array(" " * LARGEST_META), "metadata have a few hundred"),
        (np.frombuffer(b"\xff" * 8, "<U2")[0:1].reshape(()), "not JSON"),
    ],
)
def test_metadata_that_are_none(tmp_path, meta, message):
    """Metadata are one JSON object of modest size."""
    refused(archive(tmp_path, __meta__=meta), message)


class Evil:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("entry", ["__meta__", f"{KEY}.__shape__"])
def test_pickled_code_is_never_run(tmp_path, monkeypatch, entry):
    """An entry that is an array of objects is refused; its pickle is not read."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(archive(tmp_path, **{entry: None}), "a") as file:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.writestr(f"{entry}.npy", header.getvalue() + pickle.dumps(Evil()))
    refused("m.npz", "not metadata: object|not the shape of a matrix: object")
    assert not Path("owned").exists()


@pytest.mark.parametrize(("pattern", "claimed"), [("4:8", 1), ("1:4", 0), ("Dense/2:4 tiles", 0), (7, 0)])
def test_a_pattern_is_a_claim_where_n_has_one_meaning(tmp_path, pattern, claimed):
    """A pattern that keeps half is believed; "1:4" may count pruned weights, so that the masks themselves decide."""
    path = archive(tmp_path, __meta__=np.array(json.dumps({"pattern": pattern, "base_model": "a\x1bb"})))
    assert len(open_artifact(path).patterns) == claimed
    assert open_masks(path).base_model is None  # a name with control characters is not printed


def test_bitmasks_of_compressed_tensors_are_named(tmp_path):
    """A checkpoint whose zeros compressed-tensors left out is refused with what to do, even if only some are."""
    layer = "model.layers.0.mlp.up_proj"
    safetensors.torch.save_file(
        {f"{layer}.bitmask": torch.zeros(8, 2, dtype=torch.uint8), "model.layers.1.mlp.up_proj.weight": torch.eye(8)},
        tmp_path / "model.safetensors",
    )
    refused(str(tmp_path), rf"{layer} and perhaps others as bitmasks of compressed-tensors.*format 'dense'")
