"""Laws of the calibration pool, the evaluation windows, and the proof that they do not overlap.

Every document is written in words that are numbers, each used once in a test, so that a token says where it is from.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.data import (
    SHINGLE,
    Pool,
    calibration_pool,
    cut,
    draw,
    refuse_overlap,
    shingles,
    tokens_digest,
)
from nmbench.data import test_tokens as joined_tokens  # pytest takes what is named test_ for a test
from nmbench.errors import NMBenchError
from nmbench.sources import Dataset

quick = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31)


def tokenizer(text, verbose):
    """Read words as numbers."""
    return {"input_ids": [int(word) for word in text.split()]}


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

    tokens = joined_tokens(Texts(test=("1 2", "3", "4 5")), recording)
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
        refuse_overlap(made, "mine", test, "theirs")
    text = str(caught.value)
    assert text.startswith(f"1 of {3 if which == 'calibration' else 2} {which} windows of mine share 64 or more")
    assert text.endswith("tokens with the test text theirs; calibrate on another text.")
    assert "\n" not in text


@quick
@given(planted(SHINGLE - 1))
def test_shorter_runs_are_no_overlap(case):
    """Sharing 63 tokens in a row is accepted: phrases repeat in any language."""
    made, test, _ = case
    refuse_overlap(made, "mine", test, "theirs")


@quick
@given(st.integers(2, 100), st.integers(100, 400), seeds)
def test_unrelated_texts_are_accepted(window, length, seed):
    """Random tokens over a large vocabulary never count as overlap, however short the windows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(50_000, generator=generator)
    made = split(tokens[: 6 * window].view(6, window), tokens[6 * window : 8 * window].view(2, window))
    refuse_overlap(made, "mine", tokens[-length:], "theirs")


@quick
@given(st.integers(2, SHINGLE - 1), st.data())
def test_short_windows_overlap_as_a_whole(window, data):
    """Windows shorter than 64 tokens overlap when a whole window occurs in the test text."""
    test = torch.arange(300)
    at = data.draw(st.integers(0, len(test) - window))
    calibration = unique_windows(2, window, 1000)
    calibration[1] = test[at : at + window]
    with pytest.raises(NMBenchError, match=f"1 of 2 calibration windows of mine share {window} or more"):
        refuse_overlap(split(calibration, unique_windows(1, window, 9000)), "mine", test, "theirs")


@quick
@given(st.integers(SHINGLE, 2 * SHINGLE), st.data())
def test_calibration_and_selection_must_not_overlap(window, data):
    """A run of 64 tokens that calibration and selection windows share is refused, at any offset in either."""
    calibration, selection = unique_windows(2, window, 0), unique_windows(2, window, 9000)
    here, there = (data.draw(st.integers(0, window - SHINGLE)) for _ in range(2))
    selection[1, here : here + SHINGLE] = calibration[0, there : there + SHINGLE]
    with pytest.raises(NMBenchError, match="the calibration and selection windows of mine overlap"):
        refuse_overlap(split(calibration, selection), "mine", torch.arange(300) + 50_000, "theirs")


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
