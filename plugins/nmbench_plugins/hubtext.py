"""Data sets of the Hugging Face hub through `datasets`: C4 (arXiv 1910.10683), WikiText-2 (arXiv 1609.07843)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import nmbench

C4_SHARDS = {"calibration": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}
C4_TEST_DOCUMENTS = 1100  # the first documents, as in the GPTQ and SparseGPT papers


@dataclass(frozen=True)
class HubDataset(nmbench.Dataset):
    """A data set of the hub; an argument, as in `c4:REVISION`, pins a revision of the repository."""

    repository: ClassVar[str]

    def rows(self, split: str, **where: Any) -> Any:
        """Load rows with `datasets`, from its cache if the hub does not answer.

        Raises `NMBenchError` with a remedy if the rows cannot be loaded.
        """
        import datasets

        from nmbench.runtime import hub_or_cache

        with hub_or_cache() as unreached:
            try:
                return datasets.load_dataset(self.repository, split=split, revision=self.argument or None, **where)
            except Exception as error:  # datasets raises many kinds, among them plain OSError and ValueError
                cached = f"{unreached}; and from the cache: " if unreached else ""
                raise nmbench.NMBenchError(
                    f"data set {self.repository} cannot be loaded ({cached}{type(error).__name__}: {first_line(error)})"
                    f"; without a network give local text: --calibration text:FILE --metric ppl:text:OTHERFILE@512."
                ) from error

    def provenance(self) -> Mapping[str, Any]:
        return {"repository": self.repository, "revision": self.argument or "newest"}


@dataclass(frozen=True)
class C4(HubDataset):
    """English C4: documents of train shard 0 to calibrate on, the first 1,100 of validation shard 0 to test on."""

    repository: ClassVar[str] = "allenai/c4"
    separator: ClassVar[str] = " "

    def texts(self, split: str) -> Iterable[str]:
        if split == "selection":
            return []
        rows = self.rows("train", data_files={"train": C4_SHARDS[split]})
        return list(rows["text"] if split == "calibration" else rows[:C4_TEST_DOCUMENTS]["text"])


@dataclass(frozen=True)
class WikiText2(HubDataset):
    """WikiText-2 raw: train rows to calibrate on, test rows (joined by blank lines) to test on."""

    repository: ClassVar[str] = "Salesforce/wikitext"

    def texts(self, split: str) -> Iterable[str]:
        if split == "selection":
            return []
        rows = self.rows("test" if split == "test" else "train", name="wikitext-2-raw-v1")["text"]
        return list(rows) if split == "test" else ["\n\n".join(rows)]


def first_line(error: Exception) -> str:
    """Return the first line of the text of an exception."""
    return (str(error).splitlines() or [""])[0]


@nmbench.hookimpl
def nmbench_register_datasets(register: nmbench.Register) -> None:
    register("c4", C4)
    register("wikitext2", WikiText2)
