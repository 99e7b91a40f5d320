"""The table a run ends in: rows, means over seeds, and which rows can be told apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nmbench.results.doubt_lines import doubt_lines, is_unranked, unranked_texts
from nmbench.results.format import Interval, Record
from nmbench.results.pareto import cost_of, pareto, quality, row_key
from nmbench.results.records import Rows
from nmbench.results.table_width import fitted
from nmbench.sources import ValueRecord
from nmbench.spec import DENSE

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

    from nmbench.evaluation.comparison import Difference

MEBIBYTE = 2**20


def render(results: Rows, width: int | None = None) -> str:
    """The whole text for a terminal: one row per job, means over seeds, rankings, failures, doubts.

    Of tables wider than `width` columns the least important columns are left out; None: nothing is.
    """
    parts = [fitted(rows(results.records), width)]
    if len({record["seed"] for record in results.records if record["seed"] is not None}) > 1:
        parts.append("Mean over seeds (± standard deviation)\n" + fitted(means(results), width))
    parts += [comparisons(results), fallbacks(results.records), failures(results.records)]
    parts.append("\n".join(doubt_lines(results.records)))
    return "\n\n".join(filter(None, parts))


def fallbacks(records: Sequence[Record]) -> str:
    """One line for every row that is a copy, or whose statistics are not, or hardly, what its method asks for."""
    lines = []
    for r in records:
        unreached, few = r["experts"].get("never_reached", []), r["experts"].get("under_calibrated", {})
        parts = [
            f"no token was routed to {len(unreached)} weights of experts, as {unreached[0]}: pruned by the "
            f"statistics of all tokens"
            for _ in unreached[:1]
        ]
        parts += [
            f"fewer tokens than inputs were routed to {len(few)} weights of experts, as {tokens} to {name}"
            for name, tokens in sorted(few.items(), key=lambda item: item[1])[:1]
        ]
        if r["copied_from"]:
            parts.append(f"the same work as {r['copied_from']}, done once; all figures are copied from there")
        if parts:
            lines.append(f"NOTE {r['label']} {r['pattern']} seed {r['seed']}: {'; '.join(parts)}.")
    return "\n".join(lines)


def rows(records: Sequence[Record]) -> pandas.DataFrame:
    """One row per job, every figure as people read it."""
    import pandas

    lines = [{**row(record), **fronts} for record, fronts in zip(records, front_columns(records), strict=True)]
    columns = dict.fromkeys(name for line in sorted(lines, key=len, reverse=True) for name in line)
    return pandas.DataFrame(lines, columns=list(columns)).fillna("-")


def row(record: Record) -> dict[str, str]:
    """What the table says of one record. Differences are nats per token, with their paired 95 % interval."""
    failed = record["status"] != "ok"
    return {
        **({"run": record["directory"]} if "directory" in record else {}),
        "label": record["label"],
        "pattern": pattern_of(record),
        "seed": "-" if record["seed"] is None else str(record["seed"]),
        "strict": "FAILED" if failed else strictness(record),
        **{name: figure(value) for name, value in record["metrics"].items()},
        **{f"nats over dense, {name}": interval(value) for name, value in record.get("against_dense", {}).items()},
        "in N:M": "-" if record["coverage"] is None else f"{record['coverage']['share_of_decoder']:.1%}",
        "weights": "-" if failed else "updated" if record["weights_changed"] else "dense",
        "seconds": "-" if failed else f"{record['seconds']['total']:.1f}",
        "peak MiB": "-" if failed else peak(record),
        "tokens": "-" if failed else tokens(record),
    }


def figure(value: ValueRecord) -> str:
    """A metric's value, and what it is of where the metric says so."""
    return f"{value['value']:.4f} {value.get('where', '')}".rstrip()


def tokens(record: Record) -> str:
    """Tokens run forward, and backward if there are any."""
    forward, backward = record["cost"]["forward_tokens"], record["cost"].get("backward_tokens", 0)
    return f"{forward} + {backward} back" if backward else str(forward)


def front_columns(records: Sequence[Record]) -> list[dict[str, str]]:
    """For every record the costs on whose Pareto front it is; nothing if there are not two rows to compare."""
    fronts = pareto(records)
    if len({key[:2] for key in fronts}) < 2:
        return [{} for _ in records]
    return [{"pareto": " ".join(fronts.get(row_key(record), ())) or "-"} for record in records]


def pattern_of(record: Record) -> str:
    """The pattern of a row, with the layers that have another one: `2:4, mlp.* 4:8`."""
    special = [f"{layers} {pattern}" for layers, pattern in record.get("pattern_for", {}).items()]
    return ", ".join([record["pattern"] or "-", *special])


def strictness(record: Record) -> str:
    """The proof in a few characters: how many groups were checked."""
    return f"yes, {record['proof']['groups']} groups" if record["proof"] else "-"


def interval(value: Interval) -> str:
    return f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"


def peak(record: Record) -> str:
    """Host and, where there is one, device memory at its highest."""
    sizes = [record["peak_bytes"]["host"], record["peak_bytes"]["device"]]
    return " + ".join(f"{size / MEBIBYTE:.0f}" for size in sizes if size is not None)


def means(results: Rows) -> pandas.DataFrame:
    """Mean and standard deviation of every metric over seeds, by run, label and pattern."""
    import pandas

    lines = []
    groups = (item for directory in results.directories for item in grouped(of_run(results, directory)).items())
    for (label, _), group in groups:
        names = dict.fromkeys(name for record in group for name in record["metrics"])
        values = {name: pandas.Series([r["metrics"][name]["value"] for r in group]) for name in names}
        shown = {n: f"{v.mean():.4f}" + (f" ± {v.std():.4f}" if len(v) > 1 else "") for n, v in values.items()}
        run = {"run": group[0]["directory"]} if "directory" in group[0] else {}
        lines.append({**run, "label": label, "pattern": pattern_of(group[0]), "seeds": str(len(group)), **shown})
    return pandas.DataFrame(lines)


def summary(results: Rows) -> pandas.DataFrame:
    """One row per label and pattern: `means`, whether weights changed, mean seconds and tokens, Pareto fronts."""
    import pandas

    fronts = pareto(results.records)
    lines = []
    groups = (group for directory in results.directories for group in grouped(of_run(results, directory)).values())
    for group in groups:
        costs = [cost_of(record) for record in group]
        lines.append(
            {
                "weights": "updated" if group[0]["weights_changed"] else "dense",
                "prune seconds": f"{sum(cost['seconds'] for cost in costs) / len(costs):.1f}",
                "tokens": tokens(group[0]),
                "pareto": " ".join(fronts.get(row_key(group[0]), ())) or "-",
            }
        )
    return pandas.concat([means(results), pandas.DataFrame(lines)], axis=1).fillna("-")


def of_run(results: Rows, directory: Path) -> list[Record]:
    """The records of one run directory."""
    return [record for record in results.records if record.get("directory", str(directory)) == str(directory)]


def grouped(records: Sequence[Record]) -> dict[tuple[str, str | None], list[Record]]:
    """The records that ended well, by label and pattern, over all seeds."""
    groups: dict[tuple[str, str | None], list[Record]] = {}
    for record in records:
        if record["status"] == "ok":
            groups.setdefault((record["label"], record["pattern"]), []).append(record)
    return groups


def comparisons(results: Rows) -> str:
    """Rankings by pattern and text, best first: `<` where neighbours can be told apart, `~` where they cannot."""
    several = len(results.directories) > 1
    lines = [
        f"  {directory} {line}" if several else f"  {line}"
        for directory in results.directories
        for pattern in dict.fromkeys(r["pattern"] for r in of_run(results, directory) if r["pattern"])
        for line in ranking(of_run(results, directory), pattern, directory)
    ]
    if not lines:
        return ""
    head = "Ranking by loss, best first; '<': told apart by a paired 95 % bootstrap interval, '~': not, '=': the same"
    return "\n".join([head, *lines, *pareto_note(results.records)])


def pareto_note(records: Sequence[Record]) -> list[str]:
    """What the Pareto column means, where there is one."""
    if not any(front_columns(records)):
        return []
    return [
        f"Pareto: costs (seconds to prune; forward + 2 x backward tokens; peak bytes) at which no row of the same "
        f"pattern is both better by {quality(records)} and cheaper"
    ]


def ranking(records: Sequence[Record], pattern: str, directory: Path) -> Iterator[str]:
    """The ranking of one pattern on every text, and what each learner gained over its initial mask."""
    groups = {key: group for key, group in grouped(records).items() if key[1] in (pattern, None)}
    shown = next(pattern_of(record) for record in records if record["pattern"] == pattern)
    figures = {label: seed_losses(group, directory) for (label, _), group in groups.items()}
    seeds = {label: [record["seed"] for record in group] for (label, _), group in groups.items()}
    starts = {label: group[0]["started_from"] for (label, _), group in groups.items()}
    changed = {label for (label, _), group in groups.items() if group[0].get("weights_changed")}
    metrics = {
        name: value for group in groups.values() for record in group for name, value in record["metrics"].items()
    }
    for name in dict.fromkeys(name for found in figures.values() for name in found):
        here = {label: found[name] for label, found in figures.items() if name in found}
        metric = metrics.get(name, {"lower_is_better": True, "unit": "nats"})  # what is no metric is a loss
        if is_unranked(name, unranked_texts(records)):
            yield f"{shown} {name}: no ranking, because the dense model does not predict this text (DOUBT below)"
        else:
            yield f"{shown} {name}: {chain(here, metric['lower_is_better'])}"
        for label in here:
            start = starts[label]
            if start in here and start not in changed and set(seeds[label]) <= set(seeds[start]):
                same = [seeds[start].index(seed) for seed in seeds[label]]
                gained = difference(here[label], here[start][same])
                unit = metric.get("unit", "")
                yield f"{shown} {name}: {label} against its initial mask {gained} {unit} ({gained.windows} windows)"


def seed_losses(group: Sequence[Record], directory: Path) -> dict[str, Tensor]:
    """Per-window losses of one row by text, and other figures by metric: `[seeds, windows]`."""
    import torch

    from nmbench.results.files import read_tensors

    found: dict[str, list[Tensor]] = {}
    for record in group:
        path = directory / "losses" / f"{file_name(record)}.safetensors"
        if path.exists():
            for name, losses in read_tensors(path)[0].items():
                found.setdefault(name, []).append(losses)
    return {name: torch.stack(tensors) for name, tensors in found.items()}


def file_name(record: Record) -> str:
    """The name of a job's files, from its record."""
    if record["label"] == DENSE:
        return DENSE
    return f"{record['label']}--{str(record['pattern']).replace(':', '-')}--seed{record['seed']}"


def chain(figures: dict[str, Tensor], lower_is_better: bool = True) -> str:
    """`dense < sparsegpt < wanda ~ magnitude`, best first; `=` joins rows of the very same figures."""
    losses = figures if lower_is_better else {label: -values for label, values in figures.items()}
    order = sorted(losses, key=lambda label: float(losses[label].mean()))
    text = order[0]
    for better, worse in itertools.pairwise(order):
        found = difference(losses[worse], losses[better])
        sign = "<" if found.clear else "=" if found.low == found.high == 0 else "~"
        text += f" {sign} {worse}"
    return text


def difference(losses: Tensor, reference: Tensor) -> Difference:
    """Paired over windows, each row averaged over its seeds."""
    from nmbench.evaluation.comparison import paired

    return paired(losses.mean(dim=0), reference.mean(dim=0))


def failures(records: Sequence[Record]) -> str:
    """One line for every job that failed."""
    return "\n".join(
        f"FAILED {r['label']} {r['pattern']} seed {r['seed']}: {r['error']} (traceback: {r['traceback']})"
        for r in records
        if r["status"] != "ok"
    )
