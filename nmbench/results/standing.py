"""The rows of one protocol and pattern on one text, best first, with the paired differences of all pairs.

`ranking` prints the order of neighbours; a `Standing` holds the figures, for reports that compare every pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nmbench.comparison import Difference, Resampled, resampled
from nmbench.results.doubt_lines import is_unranked, unranked_texts
from nmbench.results.format import Record
from nmbench.results.ranking import LOSS, Row, common_seeds, difference, pattern_of, remark, rows_of
from nmbench.results.records import Rows
from nmbench.spec import DENSE


@dataclass(frozen=True)
class Standing:
    """Rows on one text, best first, the dense row among them.

    `losses` float64 `[rows, windows]`: averaged over `seeds`, which all rows have, and negated if higher is better.
    `shown`: the pattern with the layers that have another one. `unit`: that of the differences. `ranked`: False if the
    dense model does not predict this text.
    """

    protocol: str
    pattern: str
    shown: str
    text: str
    unit: str
    ranked: bool
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    losses: Tensor

    @cached_property
    def resampled(self) -> Resampled:
        """The losses under the resamples of the bootstrap; computed when first used."""
        return resampled(self.losses)

    @property
    def dense(self) -> int | None:
        """The position of the dense row; None if it has no losses."""
        return next((place for place, row in enumerate(self.rows) if row.record["label"] == DENSE), None)

    def difference(self, row: int, reference: int) -> Difference:
        """Return the paired difference of two rows by their positions; positive: `row` is worse."""
        return self.resampled.difference(row, reference)

    @property
    def remark(self) -> str:
        """The seeds that count, where some row has more; else empty."""
        return remark(self.rows, self.seeds)

    def over_dense(self, row: int) -> Difference | None:
        """Return the paired difference of a row to the dense row; None without a dense row."""
        return None if self.dense is None else self.difference(row, self.dense)

    def own_over_dense(self, row: int) -> Difference | None:
        """Return the same over all seeds of the row, also those that other rows lack."""
        if row not in self._own:
            self._own[row] = self._computed_over_dense(row)
        return self._own[row]

    @cached_property
    def _own(self) -> dict[int, Difference | None]:
        return {}

    def _computed_over_dense(self, row: int) -> Difference | None:
        if self.dense is None:
            return None
        seeds = sorted(self.rows[row].seeds) or list(self.seeds)
        own, dense = (self.rows[place].on(self.text, seeds) for place in (row, self.dense))
        return None if own is None or dense is None else difference(own, dense)


def standings(results: Rows) -> list[Standing]:
    """Return the standing of every protocol, pattern and text.

    Rows whose run directory lacks their losses, and rows without a common seed, have none.
    """
    found: list[Standing] = []
    for protocol in dict.fromkeys(record.get("protocol_digest", "") for record in results.records):
        records = [record for record in results.records if record.get("protocol_digest", "") == protocol]
        for pattern in dict.fromkeys(record["pattern"] for record in records if record["pattern"]):
            found += standings_of(records, results, pattern, protocol)
    return found


def standings_of(records: Sequence[Record], results: Rows, pattern: str, protocol: str) -> Iterator[Standing]:
    """Yield the standing of one pattern on every text."""
    rows = list(rows_of(records, results, pattern))
    seeds, unranked = common_seeds(rows), unranked_texts(records)
    shown = next(pattern_of(record) for record in records if record["pattern"] == pattern)
    texts = dict.fromkeys(text for row in rows for losses in row.losses.values() for text in losses)
    for text in texts if seeds else ():
        metric = next((row.record["metrics"][text] for row in rows if text in row.record["metrics"]), LOSS)
        ordered = in_order(rows, text, seeds, metric["lower_is_better"])
        if len(ordered) > 1:
            about = (protocol, pattern, shown, text, metric.get("unit", ""), not is_unranked(text, unranked))
            losses = torch.stack([values for _, values in ordered])
            yield Standing(*about, tuple(seeds), tuple(row for row, _ in ordered), losses)


def in_order(rows: Sequence[Row], text: str, seeds: Sequence[int], lower_is_better: bool) -> list[tuple[Row, Tensor]]:
    """Return the rows that have losses on a text, best first, each with its losses `[windows]`, lower is better."""
    found = [(row, losses.double().mean(dim=0)) for row in rows if (losses := row.on(text, seeds)) is not None]
    turned = [(row, losses if lower_is_better else -losses) for row, losses in found]
    return sorted(turned, key=lambda item: float(item[1].mean()))
