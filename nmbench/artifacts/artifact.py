"""What every reader makes of a file: matrices by layer, in the canonical view, read a few rows at a time."""

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
    """A file that is damaged, hostile or of a format that nmbench does not know: nothing can be said about it.

    What the file calls its tensors may be anything; the message has no character that a terminal would obey.
    """

    def __init__(self, text: str) -> None:
        super().__init__("".join(character if character.isprintable() else "?" for character in text))


@dataclass(frozen=True)
class Matrix:
    """One weight or mask `[out, in]`, groups along `in`. `open` does what has to be done once, then gives rows.

    A mask's rows are bool. Where the file does not say the shape (`flat`), it is `(1, entries)` and `open` gives
    `[stop - start, 1]`: entries, not rows. `bits` is the size of an entry in the file.
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
        """What the matrix takes in the file, before compression."""
        return self.weights * self.bits // 8

    def slices(self, group: int = 1, weights: int = SLICE_WEIGHTS) -> Iterator[tuple[int, int, Tensor]]:
        """The matrix from top to bottom in parts of about `weights`: row and column where a part begins, and the part.

        A part has whole rows; of a flat matrix it is a piece of the one row that holds whole groups of `group`.
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
        """All of it at once, `[out, in]`."""
        return self.open()(0, self.weights if self.flat else self.shape[0]).view(self.shape)

    def transposed(self) -> Matrix:
        """The matrix the other way round, for a layer that is stored `[in, out]`; it is then read whole."""

        def open_transposed() -> Rows:
            turned = self.whole().t().contiguous()
            return lambda start, stop: turned[start:stop]

        return dataclasses.replace(self, shape=(self.shape[1], self.shape[0]), open=open_transposed)

    def shaped(self, shape: tuple[int, int]) -> Matrix:
        """A flat matrix in the shape that its layer is known to have; any other is returned as it is.

        Raises `Unreadable` if the file has too few or too many entries for it.
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

    `weights` and `masks` hold the matrices by layer name, without `.weight` or `.mask`; `stacked` those inside 3-D
    tensors, which may be fused experts, as `stored_name[3]`; `tensors` the shape of everything that is stored, by its
    stored name; `patterns` what the file itself claims; `config` a transformers configuration that belongs to it;
    `about` what else the file says of itself.
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


def layer_name(stored: str) -> str:
    """The layer that a stored name belongs to: `model.layers.0.mlp.up_proj.weight.mask` without its ending."""
    return next((stored.removesuffix(ending) for ending in SUFFIXES if stored.endswith(ending)), stored)


def is_weight(stored: str) -> bool:
    """Whether a stored name is that of the weight of a module."""
    return stored == "weight" or stored.endswith(".weight")


def stack_size(shape: tuple[int, ...]) -> int:
    """How many matrices a tensor of `shape` is taken for a stack of: 0 for one that cannot be fused experts."""
    return shape[0] if len(shape) == 3 and min(shape[1:]) > 1 and shape[0] <= LARGEST_STACK else 0


def by_layer(path: str, found: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """Matrices of stored names by layer name. Raises `Unreadable` if two are of one layer."""
    result: dict[str, Matrix] = {}
    for stored, matrix in found.items():
        if result.setdefault(layer_name(stored), matrix) is not matrix:
            raise Unreadable(f"{path} holds two matrices for layer {layer_name(stored)}.")
    return result


def one_line(error: Exception, limit: int = 200) -> str:
    """What an exception says, on one line, without an end of its own."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= limit else f"{text[: limit - 3]}...").rstrip(".")
