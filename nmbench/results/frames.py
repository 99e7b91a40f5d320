"""Results as pandas frames for one's own statistics, every column with its unit.

results = nmbench.load_results("runs/a", "runs/b")
results.tidy()      one row per job and metric, for grouping and plotting
results.frame()     one row per job, every field of its record
results.details()   one row per job, metric and item, for example the error of every layer
results.summary()   one row per label and pattern, as text: mean and standard deviation over seeds
results.table()     one row per job, as text: the table of the terminal
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nmbench.results.pareto import COSTS, pareto, row_key

if TYPE_CHECKING:
    import pandas

Record = Mapping[str, Any]

TIDY = {
    "directory": "run directory",
    "label": "name of the row; dense is the reference",
    "method": "registered name of the method",
    "pattern": "N:M, N of every M weights kept; none for dense",
    "seed": "seed of calibration and learning; none for dense",
    "weights_changed": "whether the method repaired weights besides choosing a mask",
    "metric": "full name of the metric, protocol included",
    "value": "value of the metric, in `unit`",
    "stderr": "standard error of the value over its n units, in `unit`",
    "n": "windows, layers or items that the value is the mean of",
    "lower_is_better": "direction of the metric",
    "unit": "unit of the value; none: as the metric's name defines it",
    "where": "place of the value, for example the layer of a maximum",
    "prune_seconds": "wall-clock seconds spent pruning or learning, device synchronised",
    "evaluate_seconds": "wall-clock seconds spent on all metrics of the row together",
    "prune_cpu_seconds": "processor seconds of all threads in prune_seconds; far fewer: the process waited for others",
    "evaluate_cpu_seconds": "processor seconds of all threads in evaluate_seconds",
    "forward_tokens": "tokens run forward through the whole model by the method",
    "backward_tokens": "tokens run backward through the whole model by the method",
    "unique_tokens": "distinct calibration tokens read",
    "selection_tokens": "distinct selection tokens read",
    "peak_host_bytes": "peak resident memory of the process",
    "peak_device_bytes": "peak memory allocated on the device; none on a CPU",
    "pareto_seconds": "on the front of the first metric against prune_seconds",
    "pareto_tokens": "on the front of the first metric against forward + 2 x backward tokens",
    "pareto_bytes": "on the front of the first metric against peak device bytes; never on a CPU",
}
WIDE = {
    "directory": TIDY["directory"] + ", where several were read",
    "row_directory": "first run directory with a seed of the row, where several hold some",
    **{name: TIDY[name] for name in ("label", "method", "pattern", "seed", "weights_changed")},
    "options.*": "options of the method as they were resolved",
    "pattern_for.*": "layers with another pattern",
    "started_from": "label of the row that a learner or a repair began with",
    "repairs": "label of the repair, which rows with several starts share",
    "kept_bytes": "size of the file of repaired weights; none if they were not kept",
    "model": "reference of the model",
    "status": "ok or failed",
    "error": "why a row failed",
    "traceback": "file with the traceback, in the run directory",
    "strict": "true: proven strictly N:M; none for dense",
    "proof": "none for dense",
    "proof.*": "what was checked: groups and zeros counted, digest of the masks",
    "coverage": "none for dense",
    "coverage.*": "how much of the decoder is pruned: layers, weights, share of its parameters, weights by kind",
    "against_dense.*": "paired difference to dense of the mean loss in nats per token, 95 % interval, windows",
    "seconds.prune": TIDY["prune_seconds"],
    "seconds.evaluate": TIDY["evaluate_seconds"],
    "seconds.total": "wall-clock seconds of both",
    "seconds.prune_cpu": TIDY["prune_cpu_seconds"],
    "seconds.evaluate_cpu": TIDY["evaluate_cpu_seconds"],
    "seconds.cpu_share": "processor seconds per second of pruning, in the process that ended the job",
    "peak_bytes.host": TIDY["peak_host_bytes"],
    "peak_bytes.host_growth": "growth of resident memory over the loaded model",
    "peak_bytes.device": TIDY["peak_device_bytes"],
    **{f"cost.{name}": text for name, text in TIDY.items() if name.endswith("_tokens") and name != "pareto_tokens"},
    "calibration": "data set of the calibration",
    "ranks": "processes of torchrun that shared the work, as a rule 1",
    "sampled": "none for real calibration text, and for dense",
    "sampled.*": "calibration text sampled from the dense model: options, windows, and its cost, which all rows share",
    "streamed": "none unless blocks were streamed from disk, or to a GPU",
    "streamed.*": "blocks read ahead: where from, GiB, seconds of reading, and seconds for which the work waited",
    "*_digest": "16 hex digits that name tokens, job, run or protocol; equal digests: equal content",
    "environment.*": "versions, device, threads, dtypes",
    "notes.*": "JSON values that the method notes of its work",
    "layer_notes.*": "the note of a layer, such as a raised damping",
    "figures.*": "figures of a layer, averaged over layers",
    "experts.*": "experts of a mixture that no, or few, calibration tokens were routed to",
    "copied_from": "label of the row that did the same work, whose figures these are",
    "doubts": "reasons to distrust the figures of the row",
    "unranked": "texts that the dense model does not predict, by which rows are not ranked; of the dense row",
    "sliding_window": "tokens that the attention of some or all blocks sees, if less than a test window",
    "format": "version of the record",
    **{f"pareto.{kind}": TIDY[f"pareto_{kind}"] for kind in COSTS},
    "*:*": "a metric: its value under its name, stderr, n, lower_is_better, unit, where after a dot",
}


def tidy(records: Sequence[Record]) -> pandas.DataFrame:
    """Return one row per job that ended well and metric; columns and units are those of `TIDY`."""
    import pandas

    fronts = pareto(records)
    lines = [
        {**job_fields(record, fronts), "metric": name, **{k: v for k, v in figures.items() if k in TIDY}}
        for record in records
        for name, figures in record["metrics"].items()
    ]
    return with_whole_counts(pandas.DataFrame(lines, columns=list(TIDY)), lines)


def with_whole_counts(frame: pandas.DataFrame, lines: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Return `frame`, made of `lines`, with counts as whole numbers, which pandas makes floats if one is missing."""
    import pandas

    for name in frame.columns:
        values = [line.get(name) for line in lines]
        if {type(value) for value in values} == {int, type(None)}:
            frame[name] = pandas.array(values, dtype="Int64")
    return frame


def job_fields(record: Record, fronts: Mapping[tuple[Any, ...], list[str]]) -> dict[str, Any]:
    """Return the columns of `TIDY` that all metrics of a job share."""
    shared = ("directory", "label", "method", "pattern", "seed", "weights_changed")
    fields = {name: record.get(name) for name in shared}
    fields.update(
        {f"{kind}_seconds": record["seconds"][kind] for kind in ("prune", "evaluate", "prune_cpu", "evaluate_cpu")}
    )
    fields.update(record["cost"])
    fields.update({f"peak_{where}_bytes": record["peak_bytes"][where] for where in ("host", "device")})
    on = fronts.get(row_key(record))
    return {**fields, **{f"pareto_{kind}": None if on is None else kind in on for kind in COSTS}}


def wide(records: Sequence[Record]) -> pandas.DataFrame:
    """Return one row per job, nested fields as dotted columns; columns and units are those of `WIDE`."""
    import pandas

    fronts = pareto(records)
    lines = []
    for record in records:
        on = fronts.get(row_key(record))
        fields = {name: content for name, content in record.items() if name not in ("metrics", "curve")}
        fields |= metric_columns(record)
        fields |= {f"pareto.{kind}": None if on is None else kind in on for kind in COSTS}
        lines.append(dict(dotted(fields)))
    return with_whole_counts(pandas.DataFrame(lines), lines)


def dotted(fields: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested fields under names such as `seconds.prune`; an empty mapping yields nothing."""
    for name, content in fields.items():
        if isinstance(content, Mapping):
            yield from dotted(content, f"{before}{name}.")
        else:
            yield f"{before}{name}", content


def metric_columns(record: Record) -> dict[str, Any]:
    """Return the value of each metric under the metric's name, other figures but details under `name.figure`."""
    return {
        name if figure == "value" else f"{name}.{figure}": content
        for name, values in (record.get("metrics") or {}).items()
        for figure, content in values.items()
        if figure != "detail"
    }


def details(records: Sequence[Record]) -> pandas.DataFrame:
    """Return one row per job, metric and item, for metrics with details; `value` is in the unit of the metric."""
    import pandas

    columns = ("directory", "label", "pattern", "seed", "metric", "item", "value")
    lines = [
        {**{name: record.get(name) for name in columns[:4]}, "metric": name, "item": item, "value": value}
        for record in records
        for name, figures in record["metrics"].items()
        for item, value in figures.get("detail", {}).items()
    ]
    return pandas.DataFrame(lines, columns=list(columns))


def describe(column: str) -> str | None:
    """Return the content and unit of a column of `frame()`; None for a column that is not documented."""
    return next((text for pattern, text in WIDE.items() if fnmatch.fnmatchcase(column, pattern)), None)
