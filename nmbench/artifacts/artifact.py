"""The result of every reader: matrices by layer, in the canonical view `[out, in]`, read a few rows at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor

SLICE_WEIGHTS = 2**19  # a few megabytes, whatever the size of the model
LARGEST_STACK = 2**12
SUFFIXES = (".weight.mask", ".weight_mask", ".mask", ".weight")

Rows = Callable[[int, int], "Tensor"]  # first row, last row + 1 -> [rows, in]


class Unreadable(NMBenchError):
    """A file that is damaged, hostile or of an unknown format, so that its masks cannot be judged.

    Unprintable characters of the message become "?": tensor names come from the file and may hold control sequences.
    """

    def __init__(self, text: str) -> None:
        super().__init__("".join(character if character.isprintable() else "?" for character in text))


@dataclass(frozen=True)
class Matrix:
    """One weight or mask `[out, in]`, groups along `in`. `open` opens the file and returns a function that reads rows.

    Rows of a mask are bool. `flat` marks a matrix whose shape the file does not store: `shape` is then `(1, entries)`,
    and rows read are single entries, `[stop - start, 1]`. `bits` is the size of an entry in the file.
    """

    name: str
    shape: tuple[int, int]
    mask: bool
    open: Callable[[], Rows]
    bits: int
    flat: bool = False

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of the matrix in the file, before compression."""
        return self.weights * self.bits // 8

    def slices(self, group: int = 1, weights: int = SLICE_WEIGHTS) -> Iterator[tuple[int, int, Tensor]]:
        """The matrix from top to bottom in parts of about `weights` entries: first row, first column, part.

        Parts hold whole rows. The parts of a flat matrix are `[1, entries]` and hold whole groups of `group`.
        """
        read = self.open()
        if self.flat:
            step = max(1, weights // group) * group
            for start in range(0, self.weights, step):
                yield 0, start, read(start, min(start + step, self.weights)).view(1, -1)
            return
        step = max(1, weights // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield start, 0, read(start, min(start + step, self.shape[0]))

    def whole(self) -> Tensor:
        """The whole matrix in memory, `[out, in]`."""
        return self.open()(0, self.weights if self.flat else self.shape[0]).view(self.shape)

    def transposed(self) -> Matrix:
        """The transposed matrix, for a layer that is stored `[in, out]`; opening the matrix reads all of it."""

        def open_transposed() -> Rows:
            transposed = self.whole().t().contiguous()
            return lambda start, stop: transposed[start:stop]

        return dataclasses.replace(self, shape=(self.shape[1], self.shape[0]), open=open_transposed)

    def shaped(self, shape: tuple[int, int]) -> Matrix:
        """A flat matrix in the `shape` of its layer; a matrix that is not flat is returned unchanged.

        Raises `Unreadable` if the file has too few or too many entries for `shape`.
        """
        if not self.flat:
            return self
        rows, columns = shape
        if not 0 <= self.weights - rows * columns < 8:  # packed bits fill whole bytes
            raise Unreadable(f"{self.name} has {self.weights} entries, not the {rows * columns} of its shape {shape}.")

        def open_shaped() -> Rows:
            read = self.open()
            return lambda start, stop: read(start * columns, stop * columns).view(stop - start, columns)

        return dataclasses.replace(self, shape=shape, open=open_shaped, flat=False)


@dataclass(frozen=True)
class Artifact:
    """A checkpoint, a mask file, or both in one folder.

    `form` names the format. `weights` and `masks` hold matrices by layer name, without `.weight` or `.mask`. `stacked`
    holds the matrices inside 3-D tensors, which may be fused experts, as `stored_name[3]`. `tensors` has the shape of
    every stored tensor by its stored name, `patterns` the patterns that the file claims, by layer. `config` is the path
    of the transformers configuration beside the weights, `about` the other metadata of the file. `at_most` marks masks
    that are the non-zeros of weights, so that a kept weight that is zero counts as dropped.
    """

    path: str
    form: str
    weights: Mapping[str, Matrix] = field(default_factory=dict)
    masks: Mapping[str, Matrix] = field(default_factory=dict)
    stacked: Mapping[str, Matrix] = field(default_factory=dict)
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    config: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    at_most: bool = False


def layer_name(stored: str) -> str:
    """The layer name in a stored name: `model.layers.0.mlp.up_proj.weight.mask` without `.weight.mask`."""
    return next((stored.removesuffix(ending) for ending in SUFFIXES if stored.endswith(ending)), stored)


def is_weight(stored: str) -> bool:
    """True if a stored name is the name of a module's weight."""
    return stored == "weight" or stored.endswith(".weight")


def stack_size(shape: tuple[int, ...]) -> int:
    """The number of matrices in a stack of `shape`; 0 for a tensor that cannot be fused experts."""
    return shape[0] if len(shape) == 3 and min(shape[1:]) > 1 and shape[0] <= LARGEST_STACK else 0


def by_layer(path: str, found: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """Matrices by layer name, from matrices by stored name. Raises `Unreadable` if two matrices are of one layer."""
    result: dict[str, Matrix] = {}
    for stored, matrix in found.items():
        if result.setdefault(layer_name(stored), matrix) is not matrix:
            raise Unreadable(f"{path} holds two matrices for layer {layer_name(stored)}.")
    return result


def one_line(error: Exception, limit: int = 200) -> str:
    """The text of an exception on one line of at most `limit` characters, without its full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= limit else f"{text[: limit - 3]}...").rstrip(".")
