"""Laws of the checks of a tokenizer: each doubt has a tokenizer that provokes it, and sound ones provoke none."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from nmbench.data import encode
from nmbench.errors import NMBenchError
from nmbench.experiment.tokenizer_checks import (
    check_ids,
    embedding_rows,
    longest_matches,
    lost_text,
    other_special_tokens,
    pieces_of,
    tokenizer_doubts,
    too_many_tokens,
    unknown_tokens,
)
from nmbench_plugins.demo import DemoModel, DemoPlays
from nmbench_plugins.tiny import TinyModel


@pytest.fixture(scope="module")
def play():
    return next(iter(DemoPlays().texts("test")))[:40000]


@pytest.fixture(scope="module")
def demo():
    return DemoModel().load("")


def changed(tokenizer, change):
    """A tokenizer whose description went through `change`."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


def wrapped(tokenizer, **special):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def doubts(bundle, text):
    return [str(d) for d in tokenizer_doubts(bundle, {"a": text}, {"a": encode(bundle.tokenizer, text)})]


@pytest.mark.parametrize("load", [lambda: DemoModel().load(""), lambda: TinyModel().load("llama")])
@pytest.mark.parametrize("extra", ["", " naïve ☃ 北京 𝄞\u00a0\r\n\t  x\n\n\n"])
def test_sound_tokenizers_raise_no_doubt(load, extra, play):
    """The tokenizers of the demo and of the tiny models are sound on a play and on odd characters."""
    assert doubts(load(), play + extra) == []


def test_pieces_are_spread_and_whole_words(play):
    """Pieces come from everywhere in the text; a short text is one piece."""
    pieces = list(pieces_of(play))
    assert len(pieces) == 8
    starts = [play.index(piece) for piece in pieces]
    assert starts == sorted(starts)
    assert starts[-1] > 0.8 * len(play)
    words = set(play.split())
    assert {word for piece in pieces for word in piece.split()} <= words
    assert list(pieces_of("a b c")) == ["a b c"]
    assert list(pieces_of("")) == []
    assert list(pieces_of("北" * 5000)) == ["北" * 2000] * 2 + ["北" * 1000]


def test_text_that_does_not_come_back(demo, play):
    """A tokenizer that loses characters is quoted at the first difference."""
    loses = changed(demo.tokenizer, lambda content: content["decoder"].update(type="Fuse"))
    (said,) = lost_text(loses, pieces_of(play), "a")
    assert said.startswith("a does not come back from its tokens: ")
    assert "Ġ" in said


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Lowercase(),
        normalizers.NFKC(),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ],
    ids=["lower case", "NFKC", "sentencepiece"],
)
def test_declared_normalisation_is_no_doubt(normalizer):
    """Lower case, NFKC and the marks of sentencepiece are what the tokenizer says of itself."""
    text = "Fine ﬁle, Two  Words ½"
    letters = set(text) | set(text.lower()) | set(normalizer.normalize_str(text)) | {"▁"}
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(letters))}, merges=[]))
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoders.Fuse()
    assert list(lost_text(wrapped(tokenizer), [text], "a")) == []


def test_whitespace_that_a_tokenizer_drops():
    """BERT's cutting at whitespace is declared; a tokenizer that keeps spaces and loses them is doubted."""
    words = {word: i for i, word in enumerate(("[UNK]", "to", "be", ",", "or"))}
    tokenizer = Tokenizer(models.WordPiece(vocab=words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    assert list(lost_text(wrapped(tokenizer), ["to be, or"], "a")) == []
    letters = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("tober, ")}, merges=[]))
    letters.decoder = decoders.Replace(" ", "")
    (said,) = lost_text(wrapped(letters), ["to be, or"], "a")
    assert said == "a does not come back from its tokens: 'to be, or' became 'tobe,or'."


def test_lost_merges(demo, play):
    """Without its merges a vocabulary of words gives a token a character; with half of them too many tokens."""
    pieces = list(pieces_of(play))
    assert list(too_many_tokens(demo.tokenizer, pieces, "a")) == []
    none = changed(demo.tokenizer, lambda content: content["model"].update(merges=[]))
    (said,) = too_many_tokens(none, pieces, "a")
    assert "was loaded without its merges" in said
    few = changed(demo.tokenizer, lambda content: content["model"].update(merges=content["model"]["merges"][:150]))
    (said,) = too_many_tokens(few, pieces, "a")
    assert "it was converted wrongly" in said


def test_longest_matches():
    """The longest entry is always taken; a character without entry counts its bytes."""
    sentencepiece = {**{f"▁{'w' * n}": n for n in range(200)}, "▁to": 500, "to": 501, "m": 502}
    assert longest_matches(None, " to tom", sentencepiece) == 3
    assert longest_matches(None, " to☃", sentencepiece) == 4
    assert longest_matches(None, "to", {"to": 1}) is None


def test_unknown_tokens():
    """Unknown tokens are counted, but for those that the text itself spells, and for GPT-2's, which ends documents."""
    tokenizer = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "to": 1, "be": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = wrapped(tokenizer, unk_token="<unk>")
    texts = {"a": encode(fast, "to be or <unk>"), "b": encode(fast, "to be")}
    (said,) = unknown_tokens(fast, {"a": "to be or <unk>", "b": "to be"}, texts)
    assert said.startswith("1 of the 4 tokens of a are unknown (25.00%)")
    assert list(unknown_tokens(wrapped(tokenizer, unk_token="<unk>", eos_token="<unk>"), {}, texts)) == []


def test_tokens_beyond_the_embedding():
    """A token without a row in the embeddings is an error with both numbers; an entry that no text uses, a doubt."""
    bundle = TinyModel().load("llama")
    assert embedding_rows(bundle) == 257
    check_ids(bundle, {"a": torch.tensor([[0, 256]]), "b": torch.empty(0, 4, dtype=torch.int64)})
    with pytest.raises(NMBenchError, match="a has token 257, and the embeddings of tiny:llama have 257 rows"):
        check_ids(bundle, {"a": torch.tensor([3, 257])})
    bundle.tokenizer.add_tokens(["<more>"])
    (said,) = doubts(bundle, "to be")
    assert "its largest token is 257, and the embeddings of tiny:llama have 257 rows" in said


def test_special_tokens():
    """BOS and EOS of the configuration are those of the tokenizer; a list holds one of them, None says nothing."""
    bundle = TinyModel().load("llama")
    config = bundle.model.config
    for eos in (256, [7, 256], None):
        config.eos_token_id = eos
        assert list(other_special_tokens(bundle)) == []
    config.eos_token_id = [1, 2]
    (said,) = other_special_tokens(bundle)
    assert said.startswith("eos_token_id is 256 in the tokenizer and [1, 2] in the configuration of tiny:llama")
