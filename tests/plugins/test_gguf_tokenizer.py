"""Laws of tokenizers made of GGUF files: what is lost is restored, and a wrong conversion is refused."""

import json

import pytest
import transformers
from tokenizers import Tokenizer

from nmbench.errors import NMBenchError
from nmbench_plugins.demo import DemoModel
from nmbench_plugins.huggingface import gguf_tokenizer
from nmbench_plugins.huggingface.gguf_tokenizer import (
    NUMBER,
    Stored,
    broken_words,
    encoded,
    joined_digits,
    other_entries,
    restore,
    stored_tokenizer,
    words_of,
)


@pytest.fixture(scope="module")
def demo():
    return DemoModel().load("").tokenizer


@pytest.fixture
def stored(demo):
    """What a GGUF file of the demo would say of its tokenizer."""
    vocabulary = demo.get_vocab()
    return Stored(sorted(vocabulary, key=vocabulary.get), [1] * len(vocabulary), "default")


def changed(tokenizer, **model):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"].update(model)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


def merges(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def test_a_sound_conversion_passes(demo, stored, monkeypatch):
    """The tokenizer that the file describes has its entries, and its words are single tokens."""
    assert len(words_of(stored)) > 500
    monkeypatch.setattr(gguf_tokenizer, "stored_tokenizer", lambda file: stored)
    restore(demo, "model.gguf")


@pytest.mark.parametrize("keep", [slice(0), slice(600), slice(None, None, -1)], ids=["none", "few", "reversed"])
def test_lost_merges_are_refused(demo, stored, keep, monkeypatch):
    """Without its merges, with a part of them, or in another order, words fall into pieces."""
    monkeypatch.setattr(gguf_tokenizer, "stored_tokenizer", lambda file: stored)
    with pytest.raises(NMBenchError, match=r"transformers \S+ converts the tokenizer of model.gguf wrongly: .* words"):
        restore(changed(demo, merges=merges(demo)[keep]), "model.gguf")


def test_another_vocabulary(demo, stored):
    """Entries under other ids are found, and special entries do not count."""
    assert other_entries(demo, stored) is None
    shifted = Stored(["<new>", *stored.entries], [3, *stored.kinds], stored.pre)
    assert "words of its vocabulary are missing or have another id, first 'Ġ" in other_entries(demo, shifted)


def test_a_small_vocabulary_is_not_judged(demo):
    """Of fewer than 16 words nothing is concluded."""
    assert broken_words(changed(demo, merges=[]), Stored(["Ġthe", "Ġthat"], [], "default")) is None


def test_numbers(demo, stored, monkeypatch):
    """Where the file's pre-tokenizer splits numbers, so does the tokenizer: restored, or refused."""
    bytewise = transformers.PreTrainedTokenizerFast(tokenizer_object=demo.backend_tokenizer)
    bytewise.add_tokens(["314"])
    assert "comes out as 9 tokens" in joined_digits(bytewise, Stored([], [], "qwen2"))
    assert joined_digits(bytewise, Stored([], [], "default")) is None
    assert joined_digits(demo, Stored([], [], "qwen2")) is None
    monkeypatch.setattr(gguf_tokenizer, "stored_tokenizer", lambda file: Stored([], [], "smollm"))
    plain = changed(demo)
    restore(plain, "model.gguf")
    assert "Digits" in plain.backend_tokenizer.to_str()
    assert len(encoded(plain, NUMBER)) == len(NUMBER)


def test_what_a_file_says(tmp_path):
    """Entries, their kinds and the pre-tokenizer are read from the file; a file without a tokenizer has none."""
    gguf = pytest.importorskip("gguf")
    for name, entries in (("full", ["a", "Ġthe"]), ("empty", [])):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        if entries:
            writer.add_tokenizer_pre("smollm")
            writer.add_token_list(entries)
            writer.add_token_types([1] * len(entries))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    assert stored_tokenizer(tmp_path / "full.gguf") == Stored(["a", "Ġthe"], [1, 1], "smollm")
    assert stored_tokenizer(tmp_path / "empty.gguf") == Stored((), (), "")
