"""Zero-shot accuracy through the stock lm-evaluation-harness: `zeroshot:<task>[@limit]`.

`<task>` is a task of the harness, whose items then come from the hub, or a folder of items named after the task, as
`zeroshot:./items/arc_easy@200`, which needs no network. A folder is a path that begins with `./`, `../`, `/` or `~`. In
both cases prompts, choices and scoring are those of the harness. A limit takes the first items only and is part of the
metric's name. `acc` is the share of items whose gold choice is the most likely choice; `acc_norm` is the same share
with log-likelihoods divided by the bytes of a choice. Items longer than the context of the model lose their beginning,
as the harness does it; their number stands beside the figure and in the record.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nmbench
from nmbench_plugins.zeroshot.items import TASKS, check, digest

MISSING = "zero-shot metrics need lm-evaluation-harness, which is not installed: pip install 'nmbench[zeroshot]'."


@dataclass(frozen=True)
class ZeroShot(nmbench.Metric):
    """acc and acc_norm of one task of lm-evaluation-harness, without examples in the prompt."""

    def __post_init__(self) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise nmbench.NMBenchError(MISSING)
        if not self.task:
            raise nmbench.NMBenchError(
                f"metric 'zeroshot:{self.argument}' is not of the form zeroshot:<task or folder>[@limit], for example "
                f"zeroshot:arc_easy or zeroshot:./items/arc_easy@200; folders may be named {', '.join(TASKS)}."
            )
        if "/" in self.where and not self.folder:
            raise nmbench.NMBenchError(
                f"metric 'zeroshot:{self.argument}' is neither a task nor a folder of items; a folder begins with ./ "
                f"or /, for example zeroshot:./{self.argument}."
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


@nmbench.hookimpl
def nmbench_register_metrics(register: nmbench.Register) -> None:
    register("zeroshot", ZeroShot)
