"""Text to tokens: the seeded calibration pool, the evaluation windows, and the proof that they do not overlap.

One pool per (model, data set, seed) serves every method of a run. In seeded order, every document of at least one
window gives one random crop. Further rounds give further crops, which never overlap the earlier ones. The first one is
the protocol of the SparseGPT lineage: draw a document, keep it if longer than the window, take a random crop. Documents
shorter than a window are joined, and used if the long ones do not suffice.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmbench.errors import NMBenchError, failing_as
from nmbench.sources import Dataset

SHINGLE = 64  # two texts overlap if they share this many consecutive tokens
QUOTED = 80  # characters of a shared text that a message shows
SELECTION = {False: "held back from the calibration texts", True: "from the data set's own selection texts"}


@dataclass(frozen=True)
class Pool:
    """The tokens that a run may read besides the test text: int64 `[windows, window_tokens]` each.

    Statistics use the first windows of `calibration`, learners all of them. Learners may select masks by `selection`.
    `notes` describes the origin of the selection windows. `bos`: the first token of every window is BOS.
    """

    calibration: Tensor
    selection: Tensor
    notes: str
    bos: bool = False

    @property
    def digest(self) -> str:
        """The digest of all tokens that a learner may read."""
        return tokens_digest(self.calibration, self.selection)

    def statistics_digest(self, windows: int) -> str:
        """Return the digest of the first `windows` windows, those of the statistics."""
        return tokens_digest(self.calibration[:windows])


def calibration_pool(
    dataset: Dataset,
    name: str,
    tokenizer: Any,
    window_tokens: int,
    pool_tokens: int,
    selection_tokens: int,
    seed: int,
    bos: bool = False,
    least: int | None = None,
) -> Pool:
    """Draw the pool of `dataset` for one seed; with `selection_tokens` 0 it has no selection windows.

    The first windows do not depend on the sizes. With `bos` every window begins with the BOS token and has one token
    less of the text. Selection windows that repeat text of a calibration window are left out, and the next ones take
    their place. Raises `NMBenchError` if the text is too short: with `least`, if beside the selection windows it has
    fewer calibration windows than that.
    """
    wanted = max(1, pool_tokens // window_tokens)
    held_back = max(1, selection_tokens // window_tokens) if selection_tokens else 0
    own = list(dataset.texts("selection")) if held_back else []
    length, chosen_by = window_tokens - bos, f"{name} (its selection texts)"
    dealt = windows_of(dataset.texts("calibration"), tokenizer, length, seed, name, bos)
    after = held_back * (not own)  # selection windows that come from the calibration texts, too
    found = list(itertools.islice(dealt, wanted + after))
    if least is not None:
        wanted = max(least, min(wanted, len(found) - after))
    calibration, dealt = stacked(found[:wanted], length), itertools.chain(found[wanted:], dealt)
    if own:
        enough(len(calibration), wanted, window_tokens, name)
        dealt = windows_of(own, tokenizer, length, seed, chosen_by, bos)
    selection, repeats = without_repeats(dealt, held_back, calibration)
    if own:
        enough(len(selection), held_back, window_tokens, chosen_by, repeats)
    else:
        enough(len(calibration) + len(selection), wanted + held_back, window_tokens, name, repeats)
    notes = f"selection windows {SELECTION[bool(own)]}{left_out(repeats)}"
    if not bos:
        return Pool(calibration, selection, notes)
    calibration, selection = (begun(windows, tokenizer, "--bos always") for windows in (calibration, selection))
    return Pool(calibration, selection, f"{notes}; BOS begins every window", bos)


def enough(found: int, count: int, window_tokens: int, name: str, repeats: int = 0) -> None:
    """Raise `NMBenchError` if the texts give fewer than `count` windows."""
    if found < count:
        raise NMBenchError(
            f"calibration text {name} gives {found} windows of {window_tokens} tokens{left_out(repeats)}, {count} "
            f"are needed; lower --windows, --window-tokens or, for a mask learner, --pool-tokens and "
            f"--selection-tokens, or bring more text."
        )


def left_out(repeats: int) -> str:
    """Return the clause on selection windows that were left out, or nothing if none was."""
    return f"; {repeats} left out that repeat text of calibration windows" if repeats else ""


def without_repeats(dealt: Iterator[Tensor], count: int, calibration: Tensor) -> tuple[Tensor, int]:
    """Return the first `count` windows that share no run of `SHINGLE` tokens with calibration windows `[n, length]`.

    They are `[count or fewer, length]`; beside them stands the number of windows that were left out.
    """
    width = min(SHINGLE, calibration.shape[1])
    seen = shingles(calibration, width).unique() if count else calibration
    kept, repeats = list[Tensor](), 0
    while len(kept) < count and (window := next(dealt, None)) is not None:
        if among(shingles(window, width), seen).any():
            repeats += 1
        else:
            kept.append(window)
    return stacked(kept, calibration.shape[1]), repeats


def among(values: Tensor, known: Tensor) -> Tensor:
    """Return for each of `values` whether it is one of `known`, which are sorted: bool of the same shape."""
    if not len(known):
        return torch.zeros_like(values, dtype=torch.bool)
    return known[torch.searchsorted(known, values).clamp(max=len(known) - 1)] == values


def draw(texts: Iterable[str], tokenizer: Any, count: int, window_tokens: int, seed: int) -> Tensor:
    """Draw up to `count` non-overlapping windows int64 `[n, window_tokens]` from documents in seeded order."""
    return stacked(itertools.islice(windows_of(texts, tokenizer, window_tokens, seed), count), window_tokens)


def windows_of(
    texts: Iterable[str], tokenizer: Any, window_tokens: int, seed: int, name: str = "the text", bos: bool = False
) -> Iterator[Tensor]:
    """Yield windows int64 `[window_tokens]` of documents in seeded order; with `bos`, without their own BOS."""
    generator = torch.Generator().manual_seed(seed)
    documents = list(texts)
    order = torch.randperm(len(documents), generator=generator).tolist()
    encoded = (encode(tokenizer, documents[index], f"document {index} of {name}") for index in order)
    if bos:
        encoded = (tokens[1:] if begins_with_bos(tokens, tokenizer) else tokens for tokens in encoded)
    return crops_in_rounds(encoded, window_tokens, generator)


def stacked(windows: Iterable[Tensor], window_tokens: int) -> Tensor:
    """Return windows `[window_tokens]`, or none, as one tensor int64 `[n, window_tokens]`."""
    return torch.stack([torch.empty(window_tokens, dtype=torch.int64), *windows])[1:]


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


def encode(tokenizer: Any, text: str, where: str = "a text") -> Tensor:
    """Return the tokens of a text, with the special tokens that the tokenizer adds: int64 `[n]`.

    Raises `NMBenchError`, naming `where` the text is from, for what is no text, and if the tokenizer fails.
    """
    check_text(text, where)
    with failing_as(f"the tokenizer failed on {where}"):
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def check_text(text: object, where: str) -> None:
    """Raise `NMBenchError` for what is no text: another type, or a character that is half of a pair."""
    if not isinstance(text, str):
        raise NMBenchError(f"{where} is {text!r:.60} of type {type(text).__name__}, not text; leave it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NMBenchError(
            f"{where} holds a lone surrogate, U+{ord(text[error.start]):04X} at character {error.start}, which is no "
            f"text; mend or drop it."
        ) from None


def bos_of(tokenizer: Any) -> int | None:
    """Return the BOS token of a tokenizer, if it has one."""
    token = getattr(tokenizer, "bos_token_id", None)
    return token if isinstance(token, int) else None


def begins_with_bos(tokens: Tensor, tokenizer: Any) -> bool:
    """Return True if tokens `[n]` begin with the BOS token."""
    return len(tokens) > 0 and int(tokens[0]) == bos_of(tokenizer)


def adds_bos(tokenizer: Any) -> bool:
    """Return True if the tokenizer by itself puts BOS before every text."""
    return bos_of(tokenizer) is not None and any(begins_with_bos(encode(tokenizer, t), tokenizer) for t in ("", "a"))


def begun(windows: Tensor, tokenizer: Any, what: str) -> Tensor:
    """Return windows with the BOS token before each: `[n, window]` -> `[n, 1 + window]`.

    Raises `NMBenchError` if the tokenizer has no BOS token; `what` asks for it.
    """
    bos = bos_of(tokenizer)
    if bos is None:
        raise NMBenchError(f"{what} asks for windows that begin with BOS, and the tokenizer has no BOS token.")
    return torch.cat([torch.full_like(windows[:, :1], bos), windows], dim=1)


def test_text(dataset: Dataset, name: str) -> str:
    """Return the test texts, joined by the data set's separator. Raises `NMBenchError` for what is no text."""
    texts = list(dataset.texts("test"))
    for index, text in enumerate(texts):
        check_text(text, f"test document {index} of {name}")
    return dataset.separator.join(texts)


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


def refuse_overlap(pool: Pool, calibration: str, test: Tensor, name: str, tokenizer: Any) -> None:
    """Raise `NMBenchError` if a calibration or selection window shares `SHINGLE` consecutive tokens with a test text.

    The message quotes the first shared text, by the tokenizer, and says where it is.
    """
    for split, windows in (("calibration", pool.calibration), ("selection", pool.selection)):
        windows = windows[:, pool.bos :]
        width = min(SHINGLE, windows.shape[1], len(test))
        runs, theirs = shingles(windows, width), shingles(test, width)
        shared = torch.isin(runs, theirs.unique())  # [windows, places]
        if not shared.any():
            continue
        row, place = shared.nonzero()[0].tolist()
        there = int((theirs == runs[row, place]).nonzero()[0])
        said = quoted(test[there : there + width], tokenizer)
        raise NMBenchError(
            f"{int(shared.any(dim=-1).sum())} of {len(windows)} {split} windows of {calibration} share {width} or more "
            f"consecutive tokens with the test text {name}, first window {row} from its token {place} and the test "
            f"text from its token {there}, both {said}; calibrate on another text, or leave its --metric out."
        )


def quoted(tokens: Tensor, tokenizer: Any) -> str:
    """Return the first `QUOTED` characters of the text of tokens `[n]`, in quotes on one line."""
    with failing_as("the tokenizer failed to decode tokens"):
        text = " ".join(str(tokenizer.decode(tokens.tolist())).split())
    return repr(text if len(text) <= QUOTED else f"{text[:QUOTED]}...")


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
