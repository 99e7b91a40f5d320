"""Pieces of sampled text: a fixed number of windows that one generator draws together, kept in the run directory.

A piece depends on the model, its prompts, the options, the seed and its own number, and on no other piece. So a killed
run goes on with the next piece, and the first windows of a pool do not depend on its size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmbench.data import Pool, tokens_digest
from nmbench.errors import NMBenchError, NumericalFailure, failing_as
from nmbench.experiment.tokenizer_checks import vocabulary_of
from nmbench.models.bundle import Bundle
from nmbench.models.forward import logits_of, run_model
from nmbench.models.sampling import Continuation, continued, drawn
from nmbench.options import resolved
from nmbench.plain_data import digest
from nmbench.results.files import notice, read_tensors, write_tensors
from nmbench.sources import Sampling
from nmbench.spec import LARGEST_SEED

VERSION = 1  # of what a piece is; another version draws other tokens from the same numbers
MOST_ENDING = 0.5  # mean probability of the tokens that end a text, over all places
MOST_DIFFERENCE = 0.1  # of logits with a cache from logits without, root mean square, in spreads of the logits
DONE = ("ending", "forward_tokens", "seconds")


@dataclass(frozen=True)
class Piece:
    """Sampled windows int64 `[batch, window_tokens]` and their cost.

    `ending`: the mean probability of the tokens that end a text, which are never drawn.
    """

    windows: Tensor
    forward_tokens: int
    seconds: float
    ending: float


@dataclass(frozen=True)
class Sampler:
    """The pieces of one seed: prompts are from the windows of `real`; `files`: name of a piece -> its file."""

    bundle: Bundle
    model_digest: str
    sampling: Sampling
    real: Pool
    seed: int
    files: Callable[[str], Path]

    @property
    def prompt_tokens(self) -> int:
        """The tokens that begin a window and are not drawn: those of the prompt, and BOS."""
        return self.sampling.options.prompt + self.real.bos

    def piece(self, index: int, report: Callable[[int], None]) -> Piece:
        """Return a piece from its file, or sample it; `report(drawn)` is called with the tokens that each window got.

        A file that is damaged is not used, and a notice says so. Files of other prompts or options have other names.
        """
        prompts = self.prompts(index)
        key = self.key(index, prompts)
        path = self.files(f"seed{self.seed}.piece{index}.{key}")
        try:
            kept = read_piece(path, key) if path.exists() else None
        except NMBenchError as error:
            notice(f"{error} Its windows are sampled again.")
            kept = None
        if kept is None:
            kept = self.drawn(index, prompts, report)
            about = {"key": key, "digest": piece_digest(kept), **{name: getattr(kept, name) for name in DONE}}
            write_tensors(path, {"windows": kept.windows}, about)
        return kept

    def key(self, index: int, prompts: Tensor) -> str:
        """Return the digest of everything that decides a piece, but device and dtype, which only round differently."""
        options = {name: value for name, value in resolved(self.sampling.options).items() if name != "real"}
        content = {"version": VERSION, "model": self.model_digest, "prompts": tokens_digest(prompts), **options}
        return digest({**content, "window": self.real.calibration.shape[1], "seed": self.seed, "piece": index})

    def prompts(self, index: int) -> Tensor:
        """Return the prompts of a piece int64 `[batch, prompt_tokens]`: a random span of each window in turn."""
        options, windows, bos = self.sampling.options, self.real.calibration, self.real.bos
        rows = torch.arange(index * options.batch, (index + 1) * options.batch) % len(windows)
        last = windows.shape[1] - options.prompt
        starts = torch.randint(int(bos), last + 1, (options.batch,), generator=self.generator("prompts", index, "cpu"))
        places = starts[:, None] + torch.arange(options.prompt)  # [batch, prompt]
        return torch.cat([windows[rows, : int(bos)], windows[rows[:, None], places]], dim=1)

    def generator(self, use: str, index: int, device: torch.device | str) -> torch.Generator:
        """Return the generator of one use in one piece."""
        number = int(digest({"use": use, "seed": self.seed, "piece": index}), 16) & LARGEST_SEED
        return torch.Generator(device).manual_seed(number)

    def drawn(self, index: int, prompts: Tensor, report: Callable[[int], None]) -> Piece:
        """Sample a piece. Raises `NMBenchError` if the model fails, lacks memory, or would end its text at once."""
        started, ref, options = time.perf_counter(), self.bundle.ref, self.sampling.options
        choose = Chooser(self.bundle, self.sampling, self.generator("tokens", index, self.bundle.device))
        length = self.real.calibration.shape[1]
        try:
            with failing_as(f"{ref} fails while text is sampled from it"):
                found = continued(self.bundle.model, prompts.to(self.bundle.device), length, choose, report)
                read = found.forward_tokens + (check_cache(self.bundle, found) if index == 0 else 0)
        except NMBenchError as error:
            if isinstance(error.__cause__, torch.cuda.OutOfMemoryError):
                raise NMBenchError(
                    f"{ref} lacks memory to sample {options.batch} windows of {length} tokens at once; choose a "
                    f"smaller option self.batch."
                ) from error
            raise
        ending = choose.mean_ending()
        check_ending(ending, ref, self.sampling)
        return Piece(found.windows.cpu(), read, round(time.perf_counter() - started, 3), round(ending, 6))


class Chooser:
    """Draws the next tokens, never a token that ends or pads a text, and sums up what probability those have."""

    def __init__(self, bundle: Bundle, sampling: Sampling, generator: torch.Generator) -> None:
        self.options = sampling.options
        self.generator = generator
        self.special = torch.tensor(sorted(special_tokens(bundle)), dtype=torch.int64, device=generator.device)
        self.known = known_tokens(bundle.tokenizer)
        self.ending = torch.zeros((), device=generator.device)
        self.places = 0

    def __call__(self, logits: Tensor) -> Tensor:
        """Return one token for each row of logits float32 `[n, vocabulary]`: int64 `[n]`."""
        special = self.special[self.special < logits.shape[1]]
        self.ending += logits.softmax(dim=-1)[:, special].sum(dim=-1).mean()
        self.places += 1
        barred = logits.index_fill(1, special, -torch.inf)
        if self.known is not None:
            barred[:, self.known :] = -torch.inf
        return drawn(barred, self.options.temperature, self.options.top_p, self.generator)

    def mean_ending(self) -> float:
        """Return the mean probability of the special tokens over all places; NaN if a logit was NaN."""
        return float(self.ending) / max(1, self.places)


def special_tokens(bundle: Bundle) -> set[int]:
    """Return the tokens that end, begin or pad a text, by tokenizer and configurations: no real text holds them."""
    configs = (getattr(bundle.model, "config", None), getattr(bundle.model, "generation_config", None))
    return {token for token in listed_tokens(bundle.tokenizer, configs) if isinstance(token, int) and token >= 0}


def listed_tokens(tokenizer: Any, configs: tuple[Any, ...]) -> Iterator[Any]:
    """Yield what a tokenizer and configurations name as special tokens: numbers, and None."""
    yield from getattr(tokenizer, "all_special_ids", ())
    for config in configs:
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            found = getattr(config, name, None)
            yield from found if isinstance(found, (list, tuple)) else [found]


def known_tokens(tokenizer: Any) -> int | None:
    """Return the number of token ids that have a text; embeddings may have more. None: unknown."""
    entries = vocabulary_of(tokenizer)
    return max(entries.values()) + 1 if entries else None


def check_cache(bundle: Bundle, found: Continuation) -> int:
    """Raise `NMBenchError` if logits with a key-value cache are not those of a plain forward pass.

    Returns the tokens that the model read for the check.
    """
    tokens = found.windows[:1, :-1]
    with torch.no_grad():
        plain = logits_of(run_model(bundle.model, tokens))[0, -1].float()
    difference = (plain - found.last[0]).square().mean().sqrt()
    if float(difference) > MOST_DIFFERENCE * float(plain.std()):
        raise NMBenchError(
            f"{bundle.ref} computes other logits with its key-value cache than without, so no text can be sampled from "
            f"it; calibrate on real text, or mend the cache of the model."
        )
    return tokens.numel()


def check_ending(ending: float, ref: str, sampling: Sampling) -> None:
    """Raise `NMBenchError` for a mean probability of ending tokens that is NaN or leaves no text."""
    if ending != ending:
        raise NumericalFailure(f"logits of {ref} are NaN while text is sampled from it; another --dtype may help.")
    if ending > MOST_ENDING:
        raise NMBenchError(
            f"{ref} ends its text instead of going on: after prompts of {sampling.source} special tokens such as EOS "
            f"have {ending:.0%} of the probability, so no text can be sampled from it; calibrate on real text "
            f"(--calibration {sampling.source})."
        )


def read_piece(path: Path, key: str) -> Piece:
    """Return a piece from its file. Raises `NMBenchError` for a damaged file, and for a piece of another key."""
    tensors, about = read_tensors(path)
    if about.get("key") != key:
        raise NMBenchError(f"{path} is damaged: it holds windows of another model, or of other prompts or options.")
    if "windows" not in tensors or any(name not in about for name in DONE):
        raise NMBenchError(f"{path} is damaged: it lacks its windows or their cost.")
    piece = Piece(tensors["windows"], **{name: about[name] for name in DONE})
    if about.get("digest") != piece_digest(piece):
        raise NMBenchError(f"{path} is damaged: its content does not have its hash.")
    return piece


def piece_digest(piece: Piece) -> str:
    """Return the digest of tokens and cost of a piece."""
    return digest({"windows": tokens_digest(piece.windows), **{name: getattr(piece, name) for name in DONE}})
