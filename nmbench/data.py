"""Text to tokens: the seeded calibration pool, the evaluation windows, and the proof that they do not overlap.

One pool per (model, data set, seed) serves every method of a run. In seeded order, every document of at least one
window gives one random crop. Further rounds give further crops, which never overlap the earlier ones. The first round
is the protocol of the SparseGPT lineage (draw a document, keep it if longer than the window, take a random crop).
Documents shorter than a window are joined, and used if the long documents do not suffice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.sources import Dataset

SHINGLE = 64  # two texts overlap if they share this many consecutive tokens


@dataclass(frozen=True)
class Pool:
    """The tokens that a run may read besides the test text: int64 `[windows, window_tokens]` each.

    Statistics use the first windows of `calibration`, learners all of them. Learners may select masks by `selection`.
    `notes` describes the origin of the selection windows.
    """

    calibration: Tensor
    selection: Tensor
    notes: str

    @property
    def digest(self) -> str:
        """The digest of all tokens that a learner may read."""
        return tokens_digest(self.calibration, self.selection)

    def statistics_digest(self, windows: int) -> str:
        """Return the digest of the first `windows` windows, those of the statistics."""
        return tokens_digest(self.calibration[:windows])


def calibration_pool(
    dataset: Dataset, name: str, tokenizer: Any, window_tokens: int, pool_tokens: int, selection_tokens: int, seed: int
) -> Pool:
    """Draw the pool of `dataset` for one seed; with `selection_tokens` 0 it has no selection windows.

    The first windows do not depend on the sizes. Raises `NMBenchError` if the text is too short.
    """
    wanted = max(1, pool_tokens // window_tokens)
    held_back = max(1, selection_tokens // window_tokens) if selection_tokens else 0
    own = list(dataset.texts("selection")) if held_back else []
    windows = draw_exactly(
        dataset.texts("calibration"), tokenizer, wanted + (0 if own else held_back), window_tokens, seed, name
    )
    if not own:
        return Pool(windows[:wanted], windows[wanted:], "selection windows held back from the calibration texts")
    selection = draw_exactly(own, tokenizer, held_back, window_tokens, seed, f"{name} (its selection texts)")
    return Pool(windows, selection, "selection windows from the data set's own selection texts")


def draw_exactly(texts: Iterable[str], tokenizer: Any, count: int, window_tokens: int, seed: int, name: str) -> Tensor:
    """Draw exactly `count` windows. Raises `NMBenchError` if the texts are too short."""
    windows = draw(texts, tokenizer, count, window_tokens, seed)
    if len(windows) < count:
        raise NMBenchError(
            f"calibration text {name} gives {len(windows)} windows of {window_tokens} tokens, {count} are needed; "
            f"lower --windows, --window-tokens or, for a mask learner, --pool-tokens and --selection-tokens, or bring "
            f"more text."
        )
    return windows


def draw(texts: Iterable[str], tokenizer: Any, count: int, window_tokens: int, seed: int) -> Tensor:
    """Draw up to `count` non-overlapping windows int64 `[n, window_tokens]` from documents in seeded order."""
    generator = torch.Generator().manual_seed(seed)
    documents = list(texts)
    order = torch.randperm(len(documents), generator=generator).tolist()
    encoded = (encode(tokenizer, documents[index]) for index in order)
    windows = []
    for window in crops_in_rounds(encoded, window_tokens, generator):
        windows.append(window)
        if len(windows) == count:
            break
    return torch.stack(windows) if windows else torch.empty(0, window_tokens, dtype=torch.int64)


def crops_in_rounds(documents: Iterable[Tensor], window_tokens: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield one crop of each document, then further crops round by round, then crops of the joined short documents."""
    remaining: list[list[Tensor]] = []  # crops of each document
    short: list[Tensor] = []
    for document in documents:
        if len(document) < window_tokens:
            short.append(document)
            continue
        unused = crops(document, window_tokens, generator)
        yield unused.pop()
        remaining.append(unused)
    while remaining := [unused for unused in remaining if unused]:
        yield from [unused.pop() for unused in remaining]
    if short and (joined := torch.cat(short)).numel() >= window_tokens:
        yield from reversed(crops(joined, window_tokens, generator))


def crops(document: Tensor, window_tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Return non-overlapping crops of one document in random order; the start of the last crop is uniform."""
    start = int(torch.randint(len(document) - window_tokens + 1, (1,), generator=generator))
    grid = document[start % window_tokens :]
    grid = grid[: len(grid) // window_tokens * window_tokens].reshape(-1, window_tokens)  # [crops, window_tokens]
    first = start // window_tokens
    others = torch.randperm(len(grid), generator=generator).tolist()
    return [grid[index] for index in others if index != first] + [grid[first]]


def encode(tokenizer: Any, text: str) -> Tensor:
    """Return the tokens of a text, with the special tokens that the tokenizer adds: int64 `[n]`."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def test_tokens(dataset: Dataset, tokenizer: Any) -> Tensor:
    """Return the test texts, joined by the data set's separator and tokenised once: int64 `[n]`."""
    return encode(tokenizer, test_text(dataset))


def test_text(dataset: Dataset) -> str:
    """Return the test texts, joined by the data set's separator."""
    return dataset.separator.join(dataset.texts("test"))


def cut(tokens: Tensor, window_tokens: int, name: str) -> Tensor:
    """Cut tokens into non-overlapping windows, tail dropped: `[n]` -> `[n // window_tokens, window_tokens]`.

    Raises `NMBenchError` if the text is shorter than one window.
    """
    if len(tokens) < window_tokens:
        raise NMBenchError(
            f"test text {name} has {len(tokens)} tokens, shorter than one window of {window_tokens}; name a shorter "
            f"window after the @."
        )
    return tokens[: len(tokens) // window_tokens * window_tokens].reshape(-1, window_tokens)


def refuse_overlap(pool: Pool, calibration: str, test: Tensor, name: str) -> None:
    """Raise `NMBenchError` if a calibration or selection window shares `SHINGLE` consecutive tokens with a test text,
    or if a calibration and a selection window share as many.
    """
    width = min(SHINGLE, pool.calibration.shape[1], len(test))
    seen = shingles(test, width).unique()
    for split, windows in (("calibration", pool.calibration), ("selection", pool.selection)):
        shared = int(torch.isin(shingles(windows, width), seen).any(dim=-1).sum())
        if shared:
            raise NMBenchError(
                f"{shared} of {len(windows)} {split} windows of {calibration} share {width} or more consecutive "
                f"tokens with the test text {name}; calibrate on another text."
            )
    if torch.isin(shingles(pool.selection, width), shingles(pool.calibration, width)).any():
        raise NMBenchError(
            f"the calibration and selection windows of {calibration} overlap; use a text without repeats."
        )


def shingles(tokens: Tensor, width: int) -> Tensor:
    """Hash every run of `width` consecutive tokens of each row: `[..., n]` -> int64 `[..., n - width + 1]`.

    A polynomial over the integers modulo 2^64, built by Horner's rule for all positions at once.
    """
    count = tokens.shape[-1] - width + 1
    total = torch.zeros_like(tokens[..., :count])
    for offset in range(width):
        total = total * 6364136223846793005 + tokens[..., offset : offset + count] + 1
    return total


def tokens_digest(*parts: Tensor) -> str:
    """Return the SHA-256, 16 hex digits, over the shapes and values of token tensors."""
    total = hashlib.sha256()
    for part in parts:
        total.update(f"{tuple(part.shape)};".encode())
        total.update(part.to(torch.int64).contiguous().numpy().tobytes())
    return total.hexdigest()[:16]
