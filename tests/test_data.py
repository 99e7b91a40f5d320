"""Laws of the calibration pool, the evaluation windows, and the proof that they do not overlap.

Every document is written in words that are numbers, each used once in a test, so that a token says where it is from.
"""

import re
from dataclasses import dataclass

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.data import (
    SHINGLE,
    Pool,
    adds_bos,
    begun,
    calibration_pool,
    cut,
    draw,
    encode,
    refuse_overlap,
    shingles,
    tokens_digest,
)
from nmbench.data import test_text as joined_text  # pytest takes what is named test_ for a test
from nmbench.errors import NMBenchError
from nmbench.sources import Dataset

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


@dataclass(frozen=True)
class Numbers:
    """A tokenizer that reads words as numbers; `adds` says whether it begins a text with BOS."""

    bos_token_id: int | None = None
    adds: bool = False

    def __call__(self, text, verbose):
        return {"input_ids": [self.bos_token_id] * self.adds + [int(word) for word in text.split()]}

    def decode(self, tokens):
        return " ".join(map(str, tokens))


tokenizer = Numbers()
BOS = 9_999_999


def document(index, length):
    """Text of `length` tokens in a row that no other document has, with a gap to the next one's."""
    return " ".join(str(10_000 * index + word) for word in range(length))


def documents(lengths, first=0):
    return [document(first + index, length) for index, length in enumerate(lengths)]


@dataclass(frozen=True)
class Texts(Dataset):
    """Texts as plain tuples."""

    calibration: tuple = ()
    selection: tuple = ()
    test: tuple = ()

    def texts(self, split):
        return iter(getattr(self, split))


def pool(calibration, selection=(), window=10, tokens=30, held_back=20, seed=0):
    dataset = Texts("", tuple(documents(calibration)), tuple(documents(selection, first=500)))
    return calibration_pool(dataset, "acme", tokenizer, window, tokens, held_back, seed)


def origin(windows):
    """The document of every token."""
    return windows // 10_000


@st.composite
def decks(draw_, short=True):
    """Lengths of documents, a window length, and how many windows are asked for."""
    lengths = draw_(st.lists(st.integers(0 if short else 12, 60), min_size=1, max_size=12))
    return lengths, draw_(st.integers(1, 12)), draw_(st.integers(1, 40))


# The pool


@quick
@given(decks(), seeds)
def test_windows_never_overlap(deck, seed):
    """No token of the texts is drawn twice, and at most the requested number of windows comes back."""
    lengths, window, count = deck
    windows = draw(documents(lengths), tokenizer, count, window, seed)
    assert windows.dtype == torch.int64
    assert windows.shape[1] == window
    assert len(windows) <= count
    assert windows.unique().numel() == windows.numel()


@quick
@given(decks(short=False), seeds)
def test_windows_are_consecutive_runs(deck, seed):
    """Every window is an unbroken run of tokens of one document, if all documents are long enough."""
    lengths, window, count = deck
    windows = draw(documents(lengths), tokenizer, count, window, seed)
    assert (windows.diff(dim=1) == 1).all()
    assert (windows % 10_000 < torch.tensor(lengths)[origin(windows)]).all()


@quick
@given(decks(short=False), seeds)
def test_first_crops_come_from_different_documents(deck, seed):
    """Each long document gives one crop before any gives a second, and so on, round after round."""
    lengths, window, count = deck
    dealt = origin(draw(documents(lengths), tokenizer, count, window, seed)[:, 0]).tolist()
    assert len(dealt) >= min(count, len(lengths))
    for place in range(len(dealt)):
        earlier = dealt[:place].count(dealt[place])
        behind = {d for d in dealt if dealt[:place].count(d) < earlier}
        assert not behind & set(dealt[place:])  # later documents have had as many crops


@quick
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 12), seeds)
def test_little_is_left_over(lengths, window, seed):
    """If asked for all it has, a document gives all its windows but at most one."""
    long = [length for length in lengths if length >= window]
    windows = draw(documents(long), tokenizer, 10_000, window, seed)
    assert sum(length // window - 1 for length in long) <= len(windows) <= sum(length // window for length in long)


@quick
@given(decks(), seeds, st.integers(1, 40))
def test_fewer_windows_are_the_first_of_more(deck, seed, more):
    """Asking for more windows adds some at the end: statistics and learners share the first ones."""
    lengths, window, count = deck
    few = draw(documents(lengths), tokenizer, count, window, seed)
    many = draw(documents(lengths), tokenizer, count + more, window, seed)
    assert torch.equal(many[: len(few)], few)


@quick
@given(decks(), seeds)
def test_short_documents_are_joined_only_when_needed(deck, seed):
    """Windows of short documents come after all others, and run through whole documents, one after another."""
    lengths, window, count = deck
    windows = draw(documents(lengths), tokenizer, count, window, seed)
    short = torch.tensor([length < window for length in lengths])
    joined = short[origin(windows)]
    assert (joined.all(1) | ~joined.any(1)).all()  # a window is of one kind or the other
    kinds = joined[:, 0].tolist() if len(windows) else []
    assert kinds == sorted(kinds)
    if any(kinds):
        only_long = [text for text, is_short in zip(documents(lengths), short, strict=True) if not is_short]
        assert kinds.count(False) >= len(only_long)
    for row in windows[joined[:, 0]] if len(windows) else []:
        for here, there in row.unfold(0, 2, 1).tolist():
            ends = here % 10_000 == lengths[here // 10_000] - 1 and there % 10_000 == 0
            assert there == here + 1 or ends


def test_short_documents_alone_suffice():
    """Verses each shorter than a window still give windows when they are joined."""
    assert len(draw(documents([4] * 20), tokenizer, 7, 10, seed=0)) == 7


def test_first_crop_starts_anywhere():
    """A document's first crop starts at each possible place equally often."""
    starts = torch.cat([draw([document(0, 12)], tokenizer, 1, 4, seed)[:, 0] for seed in range(1800)])
    counts = starts.bincount(minlength=9).double()
    assert len(counts) == 9
    assert float(((counts - 200) ** 2 / 200).sum()) < 26.1  # chi-square of 8 degrees of freedom: 1 in 1000


@quick
@given(decks(), seeds)
def test_drawing_is_a_function_of_the_seed(deck, seed):
    """The same seed gives the same windows, whatever the global random state, and leaves that state alone."""
    lengths, window, count = deck
    first = draw(documents(lengths), tokenizer, count, window, seed)
    torch.manual_seed(seed + 1)
    state = torch.get_rng_state()
    assert torch.equal(draw(documents(lengths), tokenizer, count, window, seed), first)
    assert torch.equal(torch.get_rng_state(), state)


@quick
@given(seeds)
def test_pool_has_a_seed_and_a_digest(seed):
    """The same seed gives a pool of the same digest, another seed other tokens and another digest."""
    lengths = [200, 300, 250, 400]
    assert pool(lengths, seed=seed).digest == pool(lengths, seed=seed).digest
    assert not torch.equal(pool(lengths, seed=seed).calibration, pool(lengths, seed=seed + 1).calibration)
    assert pool(lengths, seed=seed).digest != pool(lengths, seed=seed + 1).digest


@quick
@given(st.integers(1, 20), st.integers(1, 100), st.integers(1, 100), st.booleans(), seeds)
def test_pool_has_the_size_asked_for(window, tokens, held_back, own, seed):
    """A pool has as many whole windows as its tokens allow, at least one, and calibration never meets selection."""
    made = pool([120] * 4, [150] * 3 if own else [], window, tokens, held_back, seed)
    assert made.calibration.shape == (max(1, tokens // window), window)
    assert made.selection.shape == (max(1, held_back // window), window)
    assert not torch.isin(made.selection, made.calibration).any()
    assert (origin(made.selection) >= 500).all() == own
    assert (origin(made.calibration) < 500).all()
    assert ("own selection texts" in made.notes, "held back" in made.notes) == (own, not own)


@pytest.mark.parametrize(("own", "needed"), [(True, 30), (False, 40)])
def test_too_little_text_is_refused(own, needed):
    """Too little calibration text is an error of one line with what there is, what is needed, and the remedies."""
    with pytest.raises(NMBenchError) as caught:
        pool([100], [500] if own else [], window=10, tokens=300, held_back=100)
    text = str(caught.value)
    assert "calibration text acme gives " in text
    assert f" windows of 10 tokens, {needed} are needed; lower --windows, --window-tokens or, for a mask" in text
    assert "\n" not in text


def test_too_short_selection_text_is_refused():
    """Selection texts with fewer windows than asked for are an error that names the data set and the window length."""
    with pytest.raises(NMBenchError, match=r"acme \(its selection texts\) gives 0 windows of 10 tokens"):
        pool([100], [9])


# The test text


def test_test_texts_are_joined():
    """The test texts are tokenised as one text, in their order, with the data set's separator between them."""
    seen = []

    def recording(text, verbose):
        seen.append(text)
        return tokenizer(text, verbose)

    tokens = encode(recording, joined_text(Texts(test=("1 2", "3", "4 5")), "acme"))
    assert tokens.tolist() == [1, 2, 3, 4, 5]
    assert tokens.dtype == torch.int64
    assert seen == ["1 2\n\n3\n\n4 5"]


@quick
@given(st.integers(0, 100), st.integers(1, 30))
def test_cut_drops_only_the_tail(count, window):
    """Cutting gives all whole windows in order; a text shorter than one is an error with both lengths and a remedy."""
    tokens = torch.arange(count)
    if count < window:
        with pytest.raises(NMBenchError, match=f"acme has {count} tokens, .* one window of {window}; .* after the @"):
            cut(tokens, window, "acme")
        return
    windows = cut(tokens, window, "acme")
    assert windows.flatten().tolist() == list(range(count // window * window))
    assert windows.shape == (count // window, window)


# Overlap


def split(calibration, selection):
    return Pool(calibration, selection, "by hand")


def unique_windows(count, window, first):
    return torch.arange(first, first + count * window).view(count, window)


@st.composite
def planted(draw_, shared):
    """A pool whose one window shares exactly `shared` consecutive tokens with the test text, at any offset."""
    window, length = draw_(st.integers(SHINGLE, 2 * SHINGLE)), draw_(st.integers(SHINGLE, 400))
    test = torch.arange(length) + 1_000_000
    parts = {"calibration": unique_windows(3, window, 0), "selection": unique_windows(2, window, 100_000)}
    which = draw_(st.sampled_from(sorted(parts)))
    row = draw_(st.integers(0, len(parts[which]) - 1))
    here, there = draw_(st.integers(0, window - shared)), draw_(st.integers(0, length - shared))
    parts[which][row, here : here + shared] = test[there : there + shared]
    return split(**parts), test, which


@quick
@given(planted(SHINGLE))
def test_any_shared_run_of_64_is_found(case):
    """A window that shares 64 tokens with the test text, wherever in either, is refused, naming split and texts."""
    made, test, which = case
    with pytest.raises(NMBenchError) as caught:
        refuse_overlap(made, "mine", test, "theirs", tokenizer)
    text = str(caught.value)
    assert text.startswith(f"1 of {3 if which == 'calibration' else 2} {which} windows of mine share 64 or more")
    assert text.endswith("...'; calibrate on another text, or leave its --metric out.")
    assert "\n" not in text
    row, here, there, quote = re.search(
        r"tokens with the test text theirs, first window (\d+) from its token (\d+) and the test text from its token "
        r"(\d+), both '(.{80})\.\.\.'",
        text,
    ).groups()
    run = test[int(there) : int(there) + SHINGLE]
    assert torch.equal(getattr(made, which)[int(row), int(here) : int(here) + SHINGLE], run)
    assert tokenizer.decode(run.tolist()).startswith(quote)


@quick
@given(planted(SHINGLE - 1))
def test_shorter_runs_are_no_overlap(case):
    """Sharing 63 tokens in a row is accepted: phrases repeat in any language."""
    made, test, _ = case
    refuse_overlap(made, "mine", test, "theirs", tokenizer)


@quick
@given(st.integers(2, 100), st.integers(100, 400), seeds)
def test_unrelated_texts_are_accepted(window, length, seed):
    """Random tokens over a large vocabulary never count as overlap, however short the windows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(50_000, generator=generator)
    made = split(tokens[: 6 * window].view(6, window), tokens[6 * window : 8 * window].view(2, window))
    refuse_overlap(made, "mine", tokens[-length:], "theirs", tokenizer)


@quick
@given(st.integers(2, SHINGLE - 1), st.data())
def test_short_windows_overlap_as_a_whole(window, data):
    """Windows shorter than 64 tokens overlap when a whole window occurs in the test text."""
    test = torch.arange(300)
    at = data.draw(st.integers(0, len(test) - window))
    calibration = unique_windows(2, window, 1000)
    calibration[1] = test[at : at + window]
    with pytest.raises(NMBenchError, match=f"1 of 2 calibration windows of mine share {window} or more"):
        refuse_overlap(split(calibration, unique_windows(1, window, 9000)), "mine", test, "theirs", tokenizer)


@st.composite
def repeating(draw_):
    """Documents of two windows or so, some of which hold one and the same boilerplate."""
    window = draw_(st.integers(4, 2 * SHINGLE))
    width = min(SHINGLE, window)
    boilerplate = " ".join(str(5_000_000 + word) for word in range(width))
    texts = []
    for index in range(draw_(st.integers(8, 20))):
        plain = document(index, 3 * window)
        texts.append(f"{boilerplate} {plain}" if draw_(st.booleans()) else plain)
    return texts, window, width


@quick
@given(repeating(), st.integers(1, 4), st.integers(1, 4), seeds, st.booleans(), st.booleans())
def test_selection_never_repeats_calibration(case, wanted, held_back, seed, own, bos):
    """Calibration and selection windows share no run of 64 tokens, whatever the texts repeat; the pool has its size."""
    texts, window, width = case
    dataset = Texts("", tuple(texts), tuple(texts[::-1]) if own else ())
    made = calibration_pool(
        dataset, "acme", Numbers(BOS), window + bos, wanted * (window + bos), held_back * (window + bos), seed, bos
    )
    calibration, selection = made.calibration[:, bos:], made.selection[:, bos:]
    assert (len(calibration), len(selection)) == (wanted, held_back)
    assert not torch.isin(shingles(selection, width), shingles(calibration, width)).any()


@quick
@given(repeating(), st.integers(1, 4), st.integers(1, 4), seeds)
def test_windows_that_repeat_nothing_are_dealt_as_ever(case, wanted, held_back, seed):
    """The pool is what is dealt, in its order, without the windows left out; the notes count these."""
    texts, window, width = case
    made = calibration_pool(
        Texts("", tuple(texts)), "acme", tokenizer, window, wanted * window, held_back * window, seed
    )
    dealt = draw(texts, tokenizer, 1000, window, seed)
    assert torch.equal(made.calibration, dealt[:wanted])
    fresh = [
        row for row in dealt[wanted:] if not torch.isin(shingles(row, width), shingles(dealt[:wanted], width)).any()
    ]
    assert torch.equal(made.selection, torch.stack(fresh[:held_back]))
    places = [next(i for i, row in enumerate(dealt) if torch.equal(row, last)) for last in made.selection[-1:]]
    passed = places[0] + 1 - wanted - held_back
    note = f"; {passed} left out that repeat text of calibration windows" if passed else ""
    assert made.notes == f"selection windows held back from the calibration texts{note}"


def test_text_of_repeats_alone_is_refused():
    """A text whose windows all repeat each other is refused, with the number of windows left out."""
    texts = (document(0, 64),) * 9
    with pytest.raises(NMBenchError) as caught:
        calibration_pool(Texts("", texts), "acme", tokenizer, 64, 2 * 64, 64, seed=0)
    assert "gives 2 windows of 64 tokens; 7 left out that repeat text of calibration windows, 3 are needed" in str(
        caught.value
    )


# BOS


@quick
@given(decks(short=False), seeds, st.booleans())
def test_bos_takes_the_room_of_one_token(deck, seed, adds):
    """With BOS every window has its length, BOS in front once, and the tokens of a shorter window behind it."""
    lengths, window, _ = deck
    dataset = Texts("", tuple(documents([length + window for length in lengths])))
    made = calibration_pool(dataset, "acme", Numbers(BOS, adds), window + 1, window + 1, 0, seed, bos=True)
    plain = calibration_pool(dataset, "acme", tokenizer, window, window, 0, seed)
    assert made.calibration.shape == (1, window + 1)
    assert (made.calibration == BOS).sum() == 1
    assert torch.equal(made.calibration[:, 1:], plain.calibration)
    assert made.notes.endswith("; BOS begins every window")


def test_bos_is_no_part_of_a_shared_run():
    """Short windows that begin with BOS still overlap with the test text when all their text occurs there."""
    test = torch.arange(300)
    pool_ = Pool(begun(test[None, 10:20], Numbers(BOS), "acme"), test[:0, None].expand(0, 11), "by hand", bos=True)
    with pytest.raises(NMBenchError, match="1 of 1 calibration windows of mine share 10 or more"):
        refuse_overlap(pool_, "mine", test, "theirs", tokenizer)


def test_bos_needs_a_token():
    """A tokenizer without BOS cannot begin windows with it."""
    with pytest.raises(NMBenchError, match=r"ppl:x@8.bos asks for windows that begin with BOS, .* has no BOS token"):
        begun(torch.zeros(2, 3, dtype=torch.int64), tokenizer, "ppl:x@8+bos")


@pytest.mark.parametrize(("bos", "adds"), [(None, False), (BOS, False), (BOS, True)])
def test_added_bos_is_noticed(bos, adds):
    """A tokenizer adds BOS if it begins a text with the token that it calls so."""

    def digits(text, verbose):
        return Numbers(bos, adds)(text.replace("a", "1"), verbose)

    digits.bos_token_id = bos
    assert adds_bos(digits) == adds


# Texts that are none


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "document 0 of acme is None of type NoneType, not text; leave it out."),
        (["1 2"], "document 0 of acme is ['1 2'] of type list, not text; leave it out."),
        (float("nan"), "document 0 of acme is nan of type float, not text; leave it out."),
        (
            "1 \ud83d",
            "document 0 of acme holds a lone surrogate, U+D83D at character 2, which is no text; mend or drop",
        ),
        ("one", "the tokenizer failed on document 0 of acme: ValueError: invalid literal for int"),
    ],
)
def test_what_is_no_text_is_refused(text, said):
    """A document that is no text is one line that names it, in whatever split it is."""
    with pytest.raises(NMBenchError, match=f"^{re.escape(said)}"):
        calibration_pool(Texts("", (text,)), "acme", tokenizer, 4, 4, 0, 0)
    with pytest.raises(NMBenchError, match=" acme"):
        encode(tokenizer, joined_text(Texts(test=(text,)), "acme"), "the test text acme")


def test_real_panic_is_one_line():
    """A damaged normaliser makes the library tokenizers panic; the text that it was given is named."""
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    damaged = tokenizers.Tokenizer(model)
    damaged.normalizer = tokenizers.normalizers.Precompiled(b"\x04\x00\x00\x00\xff\xff\xff\xff")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=damaged)
    with pytest.raises(NMBenchError, match=r"the tokenizer failed on document 0 of acme: PanicException: index out of"):
        calibration_pool(Texts("", ("abc",)), "acme", fast, 4, 4, 0, 0)


def test_panic_of_the_tokenizer_is_one_line():
    """A panic of a library in Rust, which is no `Exception`, is an error like others; an interrupt stays one."""
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    def broken(error):
        def call(text, verbose):
            raise error

        return call

    with pytest.raises(NMBenchError, match="the tokenizer failed on a text: PanicException: no such entry"):
        encode(broken(panic("no such\nentry")), "1")
    with pytest.raises(KeyboardInterrupt):
        encode(broken(KeyboardInterrupt()), "1")


@quick
@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 8))
def test_hashes_are_equal_exactly_for_equal_runs(tokens, width):
    """Two runs of tokens have the same hash exactly if they are the same run of tokens, of token 0 too."""
    width = min(width, len(tokens))
    hashes = shingles(torch.tensor([tokens]), width)[0].tolist()
    runs = [tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)]
    assert len(hashes) == len(runs)
    assert len(set(hashes)) == len(set(runs)) == len(set(zip(hashes, runs, strict=True)))


# Digests


@quick
@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_digest_names_tokens(rows, window, data):
    """A digest of tokens ignores layout and changes with any token, shape, or place of the border between parts."""
    tokens = unique_windows(rows + 1, window, 5)
    digest = tokens_digest(tokens[:rows], tokens[rows:])
    assert digest == tokens_digest(tokens[:rows].t().contiguous().t(), tokens[rows:].int())
    changed = tokens.clone()
    changed[data.draw(st.integers(0, rows)), data.draw(st.integers(0, window - 1))] += 1
    others = [
        tokens_digest(changed[:rows], changed[rows:]),
        tokens_digest(tokens),
        tokens_digest(tokens[rows:], tokens[:rows].flatten()),
        tokens_digest(tokens[:rows, None], tokens[rows:]),
    ]
    assert digest not in others


def test_pool_digest_names_both_parts():
    """The digest of a pool changes when a single token of either part does."""
    calibration, selection = unique_windows(3, 8, 0), unique_windows(2, 8, 100)
    digests = {split(calibration, selection).digest, split(calibration + 1, selection).digest}
    digests |= {split(calibration, selection + 1).digest, split(selection, calibration).digest}
    assert len(digests) == 4
