"""What the embedded demo promises: small, offline, splits that share nothing, a model as good as logged."""

import functools
import json
import logging
import warnings
from pathlib import Path

import pytest
import torch

from nmbench import data
from nmbench.data import encode
from nmbench.evaluation.subject import Subject
from nmbench.models.bundle import Bundle
from nmbench.sources import SPLITS
from nmbench_plugins.demo import ASSETS, WINDOW, DemoModel, DemoPlays

LOG = Path(__file__).parents[2] / "benchmarks" / "demo_model" / "train-log.jsonl"
RUN = 13  # words


@functools.cache
def demo() -> Bundle:
    return DemoModel().load("")


def plays(split: str) -> list[str]:
    return [path.name for path in DemoPlays().files(split)]


def runs(split: str) -> set[tuple[str, ...]]:
    """Every run of 13 words in the texts of a split, case and line breaks aside."""
    found = set()
    for text in DemoPlays().texts(split):
        words = text.lower().split()
        found.update(zip(*(words[start:] for start in range(RUN)), strict=False))
    return found


def test_splits_are_whole_plays():
    """Every split has plays, each play is in one split only, and each text is a long one."""
    names = [name for split in SPLITS for name in plays(split)]
    assert {split: len(plays(split)) for split in SPLITS} == {"calibration": 12, "selection": 2, "test": 2}
    assert len(set(names)) == len(names)
    assert all(len(text) > 50_000 for split in SPLITS for text in DemoPlays().texts(split))


def test_splits_share_no_run_of_words():
    """The test plays share no run of 13 words with any other split, nor the selection with the calibration plays."""
    calibration, selection, test = map(runs, SPLITS)
    assert min(map(len, (calibration, selection, test))) > 30_000
    assert not test & calibration
    assert not test & selection
    assert not selection & calibration


def test_default_pool_does_not_overlap_with_the_test_text():
    """The pool of the default run can be drawn, and passes the check for overlap that every run makes."""
    dataset, tokenizer, defaults = DemoPlays(), demo().tokenizer, demo().defaults
    pool = data.calibration_pool(
        dataset, "demo", tokenizer, WINDOW, defaults.pool_tokens, defaults.selection_tokens, seed=0
    )
    data.refuse_overlap(pool, "demo", data.encode(tokenizer, data.test_text(dataset, "demo")), "demo", tokenizer)
    assert tuple(pool.calibration.shape) == (defaults.pool_tokens // WINDOW, WINDOW)
    assert tuple(pool.selection.shape) == (defaults.selection_tokens // WINDOW, WINDOW)
    assert defaults.windows <= len(pool.calibration)


def test_the_default_metric():
    """A run without other wishes measures the perplexity of 335 windows of the test plays."""
    assert demo().defaults.metrics == ("ppl:demo@256",)
    assert len(data.encode(demo().tokenizer, data.test_text(DemoPlays(), "demo"))) // 256 == 335


def test_assets_are_small():
    """Everything the demo brings weighs less than 12 MB."""
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert 16 < len(files) < 40
    assert sum(path.stat().st_size for path in files) < 12e6


def test_provenance_names_every_file():
    """The manifest gets a digest of every text, by split."""
    provenance = DemoPlays().provenance()
    assert {split: list(files) for split, files in provenance.items()} == {split: plays(split) for split in SPLITS}
    assert all(len(digest) == 64 for files in provenance.values() for digest in files.values())


def test_tokenizer_round_trip():
    """A document begins with the special token and its text comes back from its tokens."""
    text = next(iter(DemoPlays().texts("test")))[:2000]
    tokens = encode(demo().tokenizer, text)
    assert tokens[0] == demo().tokenizer.bos_token_id == 0
    assert demo().tokenizer.decode(tokens[1:]) == text
    assert int(tokens.max()) < demo().model.config.vocab_size


def test_model_is_what_it_says():
    """Four blocks of seven layers in float32, every width a multiple of 32, and another dtype on demand."""
    bundle = demo()
    assert (len(bundle.blocks), len(bundle.layers), bundle.dtype) == (4, 28, torch.float32)
    assert all(layer.shape[1] % 32 == 0 for layer in bundle.layers.values())
    assert DemoModel(dtype="bfloat16").load("").dtype == torch.bfloat16
    assert DemoModel().load("").digest() == bundle.digest()


def logged_loss() -> float:
    """The last selection loss in the training log."""
    if not LOG.exists():
        pytest.skip("the training log is not beside these tests")
    lines = [json.loads(line) for line in LOG.read_text().splitlines()]
    return [line["selection"] for line in lines if "selection" in line][-1]


@pytest.mark.slow
def test_loss_is_as_logged():
    """On the selection plays the dense model has the loss that its training log ends with, to 0.02 nats."""
    expected = logged_loss()
    tokens = torch.cat([encode(demo().tokenizer, text) for text in DemoPlays().texts("selection")])
    losses = Subject(demo(), {"selection": tokens}).losses("selection", WINDOW)
    assert float(losses.mean()) == pytest.approx(expected, abs=0.02)


def test_generation_config_is_quiet(tmp_path, caplog):
    """The model generates and is saved without a warning of any kind."""
    prompt = encode(demo().tokenizer, "KING. ")[None]
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            tokens = demo().model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4)
            demo().model.save_pretrained(tmp_path)
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert tokens.shape[1] > prompt.shape[1]
    assert (tmp_path / "model.safetensors").exists()
    assert caplog.messages == []
