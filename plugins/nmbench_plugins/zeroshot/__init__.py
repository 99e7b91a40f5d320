"""Zero-shot accuracy through the stock lm-evaluation-harness: `zeroshot:<task>[@limit]`.

`<task>` is a task of the harness, whose items then come from the hub, or a folder of items named after the task, as
`zeroshot:./items/arc_easy@200`, which needs no network. A folder is a path that begins with `./`, `../`, `/` or `~`. In
both cases prompts, choices and scoring are those of the harness. A limit takes the first items only and is part of the
metric's name. `acc` is the share of items whose gold choice is the most likely choice; `acc_norm` is the same share
with log-likelihoods divided by the bytes of a choice. Items longer than the context of the model lose their beginning,
as the harness does it; their number stands beside the figure and in the record.

`wordppl:<task>[@limit]` is word perplexity through the same harness, another figure than `ppl`: exp of the total loss
of all documents divided by their number of words, each document in windows of the model's whole context.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import nmbench
from nmbench_plugins.zeroshot.items import PAGES, TASKS, check, digest

MOST_NATS = math.log(sys.float_info.max)  # 709.8
MISSING = "zero-shot metrics need lm-evaluation-harness, which is not installed: pip install 'nmbench[zeroshot]'."


@dataclass(frozen=True)
class HarnessMetric(nmbench.Metric):
    """A figure of one task of lm-evaluation-harness, `<word>:<task or folder>[@limit]`."""

    word: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise nmbench.NMBenchError(MISSING)
        example = self.tasks[0]
        if not self.task:
            raise nmbench.NMBenchError(
                f"metric '{self.word}:{self.argument}' is not of the form {self.word}:<task or folder>[@limit], for "
                f"example {self.word}:{example} or {self.word}:./items/{example}@200; folders may be named "
                f"{', '.join(self.tasks)}."
            )
        if "/" in self.where and not self.folder:
            raise nmbench.NMBenchError(
                f"metric '{self.word}:{self.argument}' is neither a task nor a folder of items; a folder begins with "
                f"./ or /, for example {self.word}:./{self.argument}."
            )
        if self.folder:
            check(self.folder)

    @property
    def limit(self) -> int | None:
        """The largest number of items; None: all."""
        tail = self.argument.rpartition("@")[2]
        return int(tail) if "@" in self.argument and tail.isdigit() and int(tail) > 0 else None

    @property
    def where(self) -> str:
        """The task or the folder: the part of the argument before the limit."""
        return self.argument.rpartition("@")[0] if self.limit else self.argument

    @property
    def task(self) -> str:
        """The name of the task."""
        return Path(self.where).name if self.where else ""

    @property
    def folder(self) -> Path | None:
        """The folder of local items; None: the harness loads the items from the hub."""
        return Path(self.where).expanduser() if self.where.startswith(("./", "../", "/", "~")) else None

    def provenance(self) -> Mapping[str, Any]:
        """Return the version of the harness and the digest of local items, on which the answers depend."""
        items = {"items_sha256": digest(self.folder)} if self.folder else {}
        return {"lm_eval": importlib.metadata.version("lm_eval"), **items}


@dataclass(frozen=True)
class ZeroShot(HarnessMetric):
    """acc and acc_norm of one task of lm-evaluation-harness, without examples in the prompt."""

    word: ClassVar[str] = "zeroshot"
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)

    def measure(self, subject: nmbench.Subject, dense: nmbench.DenseSubject) -> Mapping[str, nmbench.Value]:
        from nmbench_plugins.zeroshot.harness import evaluate

        answers = evaluate(subject.bundle, self.task, self.folder, self.limit)
        cut = f"{answers.cut} items cut to the context of {answers.context} tokens" if answers.cut else ""
        about = {**answers.versions, **({"cut_items": answers.cut} if answers.cut else {})}
        found = {}
        for figure, scores in answers.scores.items():  # float64 [items], 1 where right
            name = f"zeroshot:{self.argument} {figure}"
            subject.per_window[name] = scores
            stderr = float(scores.std()) / len(scores) ** 0.5 if len(scores) > 1 else None
            mean = float(scores.mean())
            found[name] = nmbench.Value(mean, len(scores), stderr, False, "share of items", where=cut, about=about)
        return found


@dataclass(frozen=True)
class WordPerplexity(HarnessMetric):
    """Word perplexity of the documents of one task of lm-evaluation-harness: `wordppl:wikitext`."""

    word: ClassVar[str] = "wordppl"
    tasks: ClassVar[tuple[str, ...]] = tuple(PAGES)

    def measure(self, subject: nmbench.Subject, dense: nmbench.DenseSubject) -> Mapping[str, nmbench.Value]:
        from nmbench_plugins.zeroshot.harness import pages

        found = pages(subject.bundle, self.task, self.folder, self.limit)
        words, count = float(found.words.sum()), len(found.words)
        nats = -float(found.log_likelihoods.sum()) / words  # per word
        if nats > MOST_NATS:
            raise nmbench.NumericalFailure(
                f"the mean loss on {self.argument} is {nats:.1f} nats per word, so its word perplexity exceeds the "
                f"largest float64 (a loss of {MOST_NATS:.0f} nats)."
            )
        value = math.exp(nats)
        errors = -found.log_likelihoods - nats * found.words  # [documents], of the ratio of sums
        stderr = value * math.sqrt(float(errors.square().sum()) * count / (count - 1)) / words if count > 1 else None
        about = {**found.versions, "words": int(words)}
        return {f"wordppl:{self.argument}": nmbench.Value(value, count, stderr, unit="per word", about=about)}


@nmbench.hookimpl
def nmbench_register_metrics(register: nmbench.Register) -> None:
    register("zeroshot", ZeroShot)
    register("wordppl", WordPerplexity)
