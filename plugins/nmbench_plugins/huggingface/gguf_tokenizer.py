"""The tokenizer of a GGUF file: what transformers drops is restored, and the conversion is checked against the file.

The file holds its own vocabulary, merges and the name of its pre-tokenizer. A sound conversion has the same entries
under the same ids, and gives one token for each word that is an entry. A conversion that lost the merges gives pieces
instead, and every figure is then that of a text which the model was never trained to read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nmbench

DIGIT_BY_DIGIT = ("codeshell", "command-r", "refact", "smollm", "starcoder")  # values of tokenizer.ggml.pre
SINGLE_DIGITS = (*DIGIT_BY_DIGIT, "qwen2", "deepseek-r1-qwen", "tekken")  # pre-tokenizers that split numbers like that
WORD = re.compile("[Ġ▁][a-z]{3,10}")  # a space and a word that every pre-tokenizer keeps together
NORMAL = 1  # the type of an entry that is neither special nor a byte
WORDS = 64  # that are tried
FEWEST = 16  # words that a vocabulary needs to be checked by them
LEAST_WHOLE = 0.8  # share of the words that come out as one token; sound conversions give nearly all
NUMBER = "31415926535"


@dataclass(frozen=True)
class Stored:
    """The tokenizer as a GGUF file describes it: `entries` by id, the `kinds` of entries, and the pre-tokenizer."""

    entries: Sequence[str]
    kinds: Sequence[int]
    pre: str


def stored_tokenizer(file: Path) -> Stored:
    """Read the description of the tokenizer in a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: reader.get_field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "pre")}
    found: Mapping[str, Any] = {name: field.contents() for name, field in fields.items() if field is not None}
    return Stored(found.get("tokens", ()), found.get("token_type", ()), found.get("pre", ""))


def restore(tokenizer: Any, file: Path) -> None:
    """Restore what the conversion of a GGUF file lost, and check the rest.

    Raises `NMBenchError` if the tokenizer is not the one that the file describes.
    """
    stored = stored_tokenizer(file)
    split_digits(tokenizer, stored)
    for fault in (other_entries(tokenizer, stored), broken_words(tokenizer, stored), joined_digits(tokenizer, stored)):
        if fault:
            import transformers

            raise nmbench.NMBenchError(
                f"transformers {transformers.__version__} converts the tokenizer of {file} wrongly: {fault}. Give the "
                f"model's own folder or hub name instead of the file, or install another version of transformers, "
                f"which this check then accepts."
            )


def split_digits(tokenizer: Any, stored: Stored) -> None:
    """Restore the tokenizer's rule that splits numbers into digits, which transformers drops from a GGUF file."""
    from tokenizers import pre_tokenizers

    if stored.pre in DIGIT_BY_DIGIT:
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def other_entries(tokenizer: Any, stored: Stored) -> str | None:
    """Return the first word of the file's vocabulary that has another id in the tokenizer, as a sentence."""
    vocabulary = tokenizer.get_vocab()
    other = [word for id_, word in words_of(stored) if vocabulary.get(word) != id_]
    if not other:
        return None
    return f"{len(other)} words of its vocabulary are missing or have another id, first {other[0]!r}"


def broken_words(tokenizer: Any, stored: Stored) -> str | None:
    """Return how many words of the file's vocabulary, frequent and rare, are not one token, as a sentence."""
    words = words_of(stored)
    found = words[:: max(1, len(words) // WORDS)]
    broken = [word for id_, word in found if id_ not in tokens_of(tokenizer, word)]
    if len(found) < FEWEST or len(broken) <= (1 - LEAST_WHOLE) * len(found):
        return None
    return f"{len(broken)} of {len(found)} words of its vocabulary do not come out as one token, first {broken[0]!r}"


def joined_digits(tokenizer: Any, stored: Stored) -> str | None:
    """Return that numbers are not split into digits, though the pre-tokenizer of the file does so, as a sentence."""
    count = len(encoded(tokenizer, NUMBER))
    if stored.pre not in SINGLE_DIGITS or count >= len(NUMBER):
        return None
    return f"its pre-tokenizer {stored.pre} splits numbers into digits, and {NUMBER} comes out as {count} tokens"


def words_of(stored: Stored) -> list[tuple[int, str]]:
    """Return ids and words of the vocabulary, in its order, which is by frequency."""
    kinds = stored.kinds or [NORMAL] * len(stored.entries)
    pairs = zip(stored.entries, kinds, strict=True)
    return [(id_, word) for id_, (word, kind) in enumerate(pairs) if kind == NORMAL and WORD.fullmatch(word)]


def tokens_of(tokenizer: Any, word: str) -> set[int]:
    """Return the tokens that a word of the vocabulary becomes alone, where it is one token: with or without its space.

    Some tokenizers put a space in front of every text.
    """
    found = (encoded(tokenizer, text) for text in (f" {word[1:]}", word[1:]))
    return {tokens[0] for tokens in found if len(tokens) == 1}


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
