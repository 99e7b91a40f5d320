"""One call of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) with a model in memory."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nmbench
from nmbench.runtime import hub_or_cache, keeping_random_states, offline
from nmbench_plugins.zeroshot.items import KNOWN, TASKS, read

BATCH = 8
FIGURES = ("acc", "acc_norm")
WORDS = "word_perplexity"


@dataclass(frozen=True)
class Answers:
    """Scores by figure, float64 `[items]` of 1 and 0, in the order of the items; versions of task and harness.

    `cut`: the number of items that were longer than the `context` of the model, in tokens, and lost their beginning.
    """

    scores: Mapping[str, Tensor]
    versions: Mapping[str, Any]
    cut: int
    context: int


@dataclass(frozen=True)
class Pages:
    """Log-likelihoods of documents in nats, and their numbers of words, both float64 `[documents]`; versions."""

    log_likelihoods: Tensor
    words: Tensor
    versions: Mapping[str, Any]


def evaluate(bundle: nmbench.Bundle, task: str, folder: Path | None, limit: int | None) -> Answers:
    """Evaluate the live model of a bundle on one task.

    Raises `NMBenchError` if the harness does not know the task, has no accuracy for the task, or cannot load its items.
    """
    found, model = called(bundle, task, folder, limit)
    samples = samples_of(found, task)
    figures = [name for name in FIGURES if samples and name in samples[0]]
    if not figures:
        raise nmbench.NMBenchError(
            f"task {task} of lm-evaluation-harness has no accuracy; give one of {', '.join(TASKS)}."
        )
    scores = {name: torch.tensor([float(sample[name]) for sample in samples]).double() for name in figures}
    cut = sum(any(tuple(asked) in model.too_long for asked in sample["arguments"]) for sample in samples)
    return Answers(scores, versions(found, task), cut, model.max_length)


def pages(bundle: nmbench.Bundle, task: str, folder: Path | None, limit: int | None) -> Pages:
    """Compute the log-likelihoods of the documents of one task with the live model of a bundle.

    One BOS token stands before a document: that of the harness, to which the tokenizer adds none, as in the versions of
    the harness that published figures come from. Raises `NMBenchError` if the harness has no word perplexity for the
    task, or cannot load its documents.
    """
    found, _ = called(bundle, task, folder, limit, {"add_bos_token": False})
    samples = samples_of(found, task)
    if not samples or WORDS not in samples[0]:
        raise nmbench.NMBenchError(f"task {task} of lm-evaluation-harness has no word perplexity; give wikitext.")
    pairs = torch.tensor([sample[WORDS] for sample in samples], dtype=torch.float64)  # [documents, 2]
    return Pages(pairs[:, 0], pairs[:, 1], versions(found, task))


def samples_of(found: Mapping[str, Any], task: str) -> list[Any]:
    """Return the items of one task with their scores, in the order of the task."""
    return sorted(found["samples"].get(task, []), key=lambda sample: sample["doc_id"])


def called(
    bundle: nmbench.Bundle, task: str, folder: Path | None, limit: int | None, settings: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """Return the harness's results of one task, and its view of the model. Raises `NMBenchError`.

    `settings` are options of the harness's model, beside those of `noting_model`.
    """
    from lm_eval import simple_evaluate

    hub = hub_or_cache() if folder is None else offline()
    with restoring_random_states(), tempfile.TemporaryDirectory() as scratch, hub as unreached:
        try:
            model = noting_model(bundle, settings or {})
            found = simple_evaluate(
                model,
                tasks=[task],
                task_manager=None if folder is None else local(task, folder, Path(scratch)),
                num_fewshot=0,
                limit=limit,
                bootstrap_iters=0,  # the standard error is computed from the answers
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        except nmbench.NMBenchError:
            raise
        except Exception as error:  # the harness, datasets and transformers raise many kinds
            cached = f"{unreached}; and from the cache: " if unreached else ""
            message = cached + " ".join(f"{type(error).__name__}: {error}".split())[:300]
            shadow = (
                f"; for the items in the folder {task} write zeroshot:./{task}"
                if folder is None and Path(task).is_dir()
                else ""
            )
            raise nmbench.NMBenchError(f"lm-evaluation-harness cannot evaluate {task}: {message}{shadow}") from error
    assert found is not None
    return found, model


def noting_model(bundle: nmbench.Bundle, settings: Mapping[str, Any]) -> Any:
    """Return the harness's view of the live model, which notes in `too_long` the requests that exceed the context.

    A request is a pair of context and continuation. Without a token for padding, unknown words or the end of text, the
    harness would add one that the model has no embedding for; token 0 pads instead. Padding stands behind the text, so
    a causal model computes the same with any token. Without a token for either end of a text, token 0 stands before
    items that have no context.
    """
    from lm_eval.models.huggingface import HFLM

    class Noting(HFLM):
        def __init__(self, **settings: Any) -> None:
            self.too_long: set[tuple[str, str]] = set()
            super().__init__(**settings)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **settings: Any) -> Any:
            long = (pair for pair, context, asked in requests if len(context) + len(asked) > self.max_length + 1)
            self.too_long.update(long)
            return super()._loglikelihood_tokens(requests, *args, **settings)

    tokenizer = copy.deepcopy(bundle.tokenizer)
    if not any(getattr(tokenizer, f"{name}_token", None) for name in ("pad", "unk", "eos")):
        tokenizer.pad_token_id = 0
    begins = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
    prefix = None if begins else 0  # what stands before an item without a context
    return Noting(pretrained=bundle.model, tokenizer=tokenizer, batch_size=BATCH, prefix_token_id=prefix, **settings)


def local(task: str, folder: Path, scratch: Path) -> Any:
    """Return a task manager with the harness's definition of one task on the items of a folder, in `scratch`."""
    from lm_eval.tasks import TaskManager

    split = KNOWN[task][0]
    items = scratch / "items.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in read(folder)), encoding="utf-8")
    definition = {
        "include": str(stock_definition(task)),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(items)}, "cache_dir": str(scratch / "cache")},
        "training_split": None,
        "validation_split": "validation" if split == "validation" else None,
        "test_split": "test" if split == "test" else None,
    }
    (scratch / f"{task}.yaml").write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML
    return TaskManager(include_path=str(scratch), include_defaults=False)


def stock_definition(task: str) -> Path:
    """Return the file in which the harness defines a task."""
    found = definitions().get(task, [])
    return found[0] if len(found) == 1 else indexed(task)


@functools.cache
def definitions() -> dict[str, list[Path]]:
    """Return the files of the harness that define the tasks of `KNOWN`, found by the line with the name of the task.

    The index of the harness parses all 14,000 files, which takes ten seconds or more.
    """
    line = re.compile(rf"^task: *['\"]?({'|'.join(KNOWN)})['\"]?\s*$", re.MULTILINE)
    import lm_eval.tasks

    found: dict[str, list[Path]] = {}
    for path in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
        if match := line.search(path.read_text(encoding="utf-8")):
            found.setdefault(match[1], []).append(path)
    return found


def indexed(task: str) -> Path:
    """Return the file in which a task is defined, by the index of the harness."""
    from lm_eval.tasks import TaskManager

    entry = TaskManager().task_index[task]
    return Path(entry["yaml_path"] if isinstance(entry, dict) else entry.yaml_path)  # as in 0.4.9, and later


def versions(found: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the versions of task and harness, on which the figures depend."""
    return {"task_version": found["versions"].get(task), "lm_eval": importlib.metadata.version("lm_eval")}


@contextlib.contextmanager
def restoring_random_states() -> Iterator[None]:
    """Keep the harness silent while the context is open, and restore all random states at the end."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with keeping_random_states(), silencing():
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def silencing() -> Iterator[None]:
    """Discard the error stream while the context is open: progress bars, and messages of `git` subprocesses."""
    saved = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
