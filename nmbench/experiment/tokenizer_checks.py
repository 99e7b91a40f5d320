"""Checks of a tokenizer against texts and model, before anything is measured.

A text round-trips if decode(encode(text)) is the text, up to the normalisation that the tokenizer declares: whitespace
at the edges; what its normaliser does, such as lower case or NFKC; whitespace, if its pre-tokenizer drops it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import pre_tokenizers
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.experiment.doubts import Doubt
from nmbench.models.bundle import Bundle

SUBJECT = "tokenizer"
PIECES, PIECE = 8, 2000  # pieces of a text that are checked, and the characters of each
WORDS = 1000  # entries of a vocabulary that has words, not only characters or bytes
MOST_OVER_LONGEST = 1.3  # tokens to those of the longest matches; BPE needs a few hundredths more
LONGEST = 32  # characters of the longest match that is tried
QUOTED = 16  # characters quoted before and after the first difference
MARKS = {"Ġ": "byte-level", "▁": "sentencepiece"}  # the first character of a word


def check_ids(bundle: Bundle, texts: Mapping[str, Tensor]) -> None:
    """Raise `NMBenchError` if a token of a text, int64 of any shape, has no row in the embeddings of the model."""
    rows = embedding_rows(bundle)
    for name, tokens in texts.items():
        largest = int(tokens.max()) if tokens.numel() else 0
        if rows is not None and largest >= rows:
            raise NMBenchError(
                f"{name} has token {largest}, and the embeddings of {bundle.ref} have {rows} rows: the tokenizer is "
                f"another model's, or has tokens that the model was not resized for; bring the model's own tokenizer."
            )


def embedding_rows(bundle: Bundle) -> int | None:
    """Return the number of token ids that the model can read and predict; None if the model does not tell."""
    found = (rows_of(bundle, name) for name in ("get_input_embeddings", "get_output_embeddings"))
    return min((rows for rows in found if rows is not None), default=None)


def rows_of(bundle: Bundle, getter: str = "get_input_embeddings") -> int | None:
    """Return the number of rows of the embeddings that a method of the model names; None if it names none."""
    try:
        part = getattr(bundle.model, getter)()
    except (AttributeError, NotImplementedError):  # a model without them, or code that does not name its own
        return None
    weight = getattr(part, "weight", None)
    return None if weight is None else int(weight.shape[0])


def tokenizer_doubts(bundle: Bundle, samples: Mapping[str, str], texts: Mapping[str, Tensor]) -> list[Doubt]:
    """Return the doubts on the tokenizer of `bundle`.

    `samples`: text name -> the text in characters; `texts`: name -> all tokens that the run reads, of any shape.
    """
    said = [*beyond_embedding(bundle), *other_special_tokens(bundle), *unknown_tokens(bundle.tokenizer, samples, texts)]
    for name, text in samples.items():
        pieces = list(pieces_of(text))
        said += [*lost_text(bundle.tokenizer, pieces, name), *too_many_tokens(bundle.tokenizer, pieces, name)]
    return [Doubt(SUBJECT, text) for text in said]


def pieces_of(text: str) -> Iterator[str]:
    """Yield up to `PIECES` pieces of a text, evenly spread, cut between words."""
    step = max(PIECE, len(text) // PIECES)
    for start in range(0, len(text), step)[:PIECES]:
        piece = text[start : start + PIECE]
        first, last = piece.find(" ") if start else 0, piece.rfind(" ")
        cut = piece[first:last] if 0 <= first < last and len(text) > PIECE else piece
        if cut.strip():
            yield cut


def beyond_embedding(bundle: Bundle) -> Iterator[str]:
    """Yield a doubt on a vocabulary of more tokens than the model has embeddings of, none of them in the texts."""
    rows, entries = embedding_rows(bundle), vocabulary_of(bundle.tokenizer)
    largest = max(entries.values(), default=0)
    if rows is not None and largest >= rows:
        yield (
            f"its largest token is {largest}, and the embeddings of {bundle.ref} have {rows} rows; the texts of this "
            f"run have none of the tokens beyond. Is it this model's tokenizer?"
        )


def other_special_tokens(bundle: Bundle) -> Iterator[str]:
    """Yield a doubt for each special token that is another in the configuration than in the tokenizer."""
    config = getattr(bundle.model, "config", None)
    parts = [config, getattr(config, "text_config", None)]
    for name in ("bos_token_id", "eos_token_id"):
        stated = next((found for part in parts if (found := getattr(part, name, None)) is not None), None)
        own = getattr(bundle.tokenizer, name, None)
        if stated is None or own is None or own in (stated if isinstance(stated, (list, tuple)) else [stated]):
            continue
        yield (
            f"{name} is {own} in the tokenizer and {stated} in the configuration of {bundle.ref}: one of the two is "
            f"another model's."
        )


def unknown_tokens(tokenizer: Any, samples: Mapping[str, str], texts: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a doubt for each text with unknown tokens that do not stand in the text itself."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")):
        return  # GPT-2's unknown token separates documents
    for name, tokens in texts.items():
        count = int((tokens == unknown).sum()) - samples.get(name, "").count(str(tokenizer.unk_token))
        if count > 0:
            yield (
                f"{count} of the {tokens.numel()} tokens of {name} are unknown ({count / tokens.numel():.2%}): what "
                f"they stand for is neither read nor predicted."
            )


def lost_text(tokenizer: Any, pieces: Iterable[str], name: str) -> Iterator[str]:
    """Yield a doubt on the first piece of a text that does not round-trip, if there is one."""
    if not hasattr(tokenizer, "decode"):
        return
    for piece in pieces:
        tokens = plain_tokens(tokenizer, piece)
        if getattr(tokenizer, "unk_token_id", None) in tokens:
            continue  # counted as unknown
        back = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        if not same_text(tokenizer, piece, back):
            yield f"{name} does not come back from its tokens: {first_difference(plain(piece), plain(back))}."
            return


def too_many_tokens(tokenizer: Any, pieces: Iterable[str], name: str) -> Iterator[str]:
    """Yield a doubt on a text in more tokens than a vocabulary of words gives, by characters or by longest matches."""
    text, entries = "\n".join(pieces), vocabulary_of(tokenizer)
    if len(entries) <= WORDS or not text:
        return
    count = len(plain_tokens(tokenizer, text))
    if count >= len(text):
        yield (
            f"{count} tokens for {len(text)} characters of {name}, and its vocabulary has {len(entries)} entries: it "
            f"was loaded without its merges, or is for other languages."
        )
    elif (longest := longest_matches(tokenizer, text, entries)) and count > MOST_OVER_LONGEST * longest:
        yield (
            f"{count} tokens for {len(text)} characters of {name}, where the longest matches in its own vocabulary "
            f"give {longest}: it was converted wrongly; compare it with the model's original tokenizer."
        )


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text without special tokens at its ends."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def vocabulary_of(tokenizer: Any) -> dict[str, int]:
    """Return the entries of a tokenizer and their ids; none if the tokenizer does not tell."""
    return dict(tokenizer.get_vocab()) if hasattr(tokenizer, "get_vocab") else {}


def same_text(tokenizer: Any, text: str, back: str) -> bool:
    """Return True if `back` is `text`, up to the normalisation that the tokenizer declares."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # Python code, which declares nothing; sentencepiece does NFKC and joins whitespace
        return words(unicodedata.normalize("NFKC", text)) == words(unicodedata.normalize("NFKC", back))
    expected = {plain(text), plain(normalised(backend, text))}
    if plain(back) in expected:
        return True
    return drops_whitespace(backend) and unspaced(plain(back)) in {unspaced(text) for text in expected}


def normalised(backend: Any, text: str) -> str:
    """Return a text after the normaliser of a tokenizer."""
    return text if backend.normalizer is None else str(backend.normalizer.normalize_str(text))


def drops_whitespace(backend: Any) -> bool:
    """Return True if the pre-tokenizer cuts at whitespace and leaves no mark of it, as BERT's."""
    pre = backend.pre_tokenizer
    return pre is not None and "".join(piece for piece, _ in pre.pre_tokenize_str("a b")) == "ab"


def plain(text: str) -> str:
    """Return a text with spaces for the marks of sentencepiece, and without whitespace at its edges."""
    return text.replace("▁", " ").strip()


def words(text: str) -> str:
    """Return a text with one space for every run of whitespace."""
    return " ".join(plain(text).split())


def unspaced(text: str) -> str:
    """Return a text without whitespace."""
    return "".join(text.split())


def first_difference(text: str, back: str) -> str:
    """Return a quotation of both texts around their first difference."""
    pairs = enumerate(zip(text, back, strict=False))
    at = next((index for index, (a, b) in pairs if a != b), min(len(text), len(back)))
    shown = slice(max(0, at - QUOTED), at + QUOTED)
    return f"{text[shown]!r} became {back[shown]!r}"


def longest_matches(tokenizer: Any, text: str, entries: Mapping[str, int]) -> int | None:
    """Return the number of tokens of `text` if always the longest entry is taken; None for an unknown kind of entries.

    Characters without an entry count as one token for each of their bytes.
    """
    kind = kind_of(entries)
    if kind is None:
        return None
    if kind == "byte-level":
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        text = "".join(piece for piece, _ in pieces)
    else:
        text = text.replace(" ", "▁")
    count = at = 0
    while at < len(text):
        size = next((n for n in range(LONGEST, 0, -1) if text[at : at + n] in entries), 0)
        count += 1 if size else len(text[at].encode())
        at += size or 1
    return count


def kind_of(entries: Iterable[str]) -> str | None:
    """Return how a vocabulary marks words, by the mark that most entries begin with; None if too few have one."""
    counts = dict.fromkeys(MARKS, 0)
    for entry in entries:
        if entry[:1] in counts:
            counts[entry[:1]] += 1
    mark = max(counts, key=lambda mark: counts[mark])
    return MARKS[mark] if counts[mark] > WORDS // 10 else None
