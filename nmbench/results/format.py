"""The format of a record: one line of `records.jsonl`, one row of the table.

| format | what changed |
|---|---|
| 1 | the first format; lines without the field `format` |
| 2 | `notes` hold only notes of the method; new fields `layer_notes`, `figures`, `experts`, `copied_from`, `curve` |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, cast

from nmbench.errors import NMBenchError
from nmbench.sources import ValueRecord
from nmbench.verification.strict import Proof

FORMAT = 2
IN_EVERY_RECORD: dict[
    str, type | tuple[type, ...]
] = {  # field of every format -> its type; a line without one is no record
    **{"label": str, "status": str, "job_digest": str, "pattern": (str, type(None)), "seed": (int, type(None))},
    **{"notes": dict, "metrics": dict, "seconds": dict, "cost": dict},
}
ADDED: Mapping[str, Any] = {  # fields that came within format 2
    **{"doubts": [], "unranked": [], "sliding_window": None},
    **{"repairs": None, "kept_bytes": None, "sampled": None, "ranks": 1, "streamed": None},
}
NO_CPU = {"prune_cpu": None, "evaluate_cpu": None, "cpu_share": None}  # of records that lack processor seconds


class Interval(TypedDict):
    """A paired difference of losses in nats per token: mean, 95 % bootstrap interval, number of windows."""

    mean: float
    low: float
    high: float
    windows: int


class Seconds(TypedDict):
    """Wall-clock seconds; `prune_cpu` and `evaluate_cpu`: processor seconds of all threads in that time, None: unknown.

    `cpu_share`: processor seconds per second of pruning, in the process that ended the job, without its start.
    """

    prune: float | None
    evaluate: float | None
    total: float | None
    prune_cpu: float | None
    evaluate_cpu: float | None
    cpu_share: float | None


class PeakBytes(TypedDict):
    """Peak memory: resident on the host, its growth over the loaded model, allocated by torch on the device."""

    host: int | None
    host_growth: int | None
    device: int | None


class Streamed(TypedDict):
    """What streaming brought to the device for a row: GiB of blocks, the seconds of reading them on the host, and those
    that computing waited for them. `source`: `host` or `disk`.
    """

    source: str
    gib: float
    read: float
    waited: float


class CostRecord(TypedDict):
    """Tokens read and computed (`nmbench.runtime.Cost`); None where unknown: imported masks, failures."""

    forward_tokens: int | None
    backward_tokens: int | None
    unique_tokens: int | None
    selection_tokens: int | None


class Extent(TypedDict):
    """The pruned part of the decoder: layers, weights, and their share of all parameters of the decoder."""

    layers: int
    weights: int
    share_of_decoder: float


class Coverage(Extent, total=False):
    """The same with `kinds`, the weights in attention, mlp, experts and other layers, which older records lack."""

    kinds: dict[str, int]


class SampledText(TypedDict):
    """The calibration text of one seed that was sampled from the dense model, and its cost, which all rows share.

    `source`: the data set of the prompts; `prompt` to `batch`: the options. `windows` were sampled and `real_windows`
    are of real text; `drawn_tokens` are those of the samples behind their prompts. `forward_tokens` and `seconds` are
    the cost, samples that were left out included; `left_out`: what those repeat -> their number. `looping`: share of
    samples that repeat themselves, and `looping_real` that of real windows. `ending`: mean probability of special
    tokens, which are never drawn. `digest`: of the sampled windows.
    """

    source: str
    prompt: int
    temperature: float
    top_p: float | None
    real: float
    batch: int
    windows: int
    real_windows: int
    drawn_tokens: int
    forward_tokens: int
    seconds: float
    left_out: dict[str, int]
    looping: float
    looping_real: float
    ending: float
    digest: str


class Identity(TypedDict):
    """The part of a record that is known before the job is done.

    `started_from`: the label of the row that a learner or a repair begins with. `repairs`: the label of a repair as the
    user gave it, which its rows share if it begins with several; None for other methods.
    `sliding_window`: the tokens that the attention of some or all blocks sees, if that is less than a test window.
    `sampled`: how calibration text was sampled from the dense model; None if it is real text.
    """

    format: int
    label: str
    method: str | None
    options: dict[str, Any]
    content: dict[str, str]
    started_from: str | None
    repairs: str | None
    pattern: str | None
    pattern_for: dict[str, str]
    seed: int | None
    model: str
    sliding_window: int | None
    coverage: Coverage | None
    calibration: str | None
    calibration_digest: str | None
    sampled: SampledText | None
    pool_digest: str | None
    job_digest: str
    spec_digest: str
    protocol_digest: str
    environment: dict[str, Any]


class Said(TypedDict):
    """The notes of a record on the work of the job.

    `notes`: JSON values that the method chooses; `layer_notes`: layer -> note; `figures`: name -> mean over layers;
    `experts`: `never_reached` (names) and `under_calibrated` (name -> tokens) of a mixture of experts; `copied_from`:
    the label of the row that did the same work; `curve`: the figures that a learner reported, by `step`; `doubts`:
    reasons to distrust the figures, those of the run's inputs first; `unranked`: texts (`demo@256`) by which rows are
    not ranked, in the dense row.
    """

    notes: dict[str, Any]
    layer_notes: dict[str, str]
    figures: dict[str, float]
    experts: dict[str, Any]
    copied_from: str | None
    curve: list[dict[str, float | None]]
    doubts: list[str]
    unranked: list[str]


class Figures(Said):
    """The part of a record that the job makes.

    `kept_bytes`: the size of the file of repaired weights; None if they were not kept.
    `ranks`: the processes that shared the work, each on its own GPU if there are some. Tokens are those of all of
    them; seconds and peaks those of one.
    `streamed`: what was read ahead while blocks computed; None unless blocks are streamed from disk, or to a GPU.
    """

    status: str
    strict: bool | None
    proof: Proof | None
    measured_digest: str | None
    weights_changed: bool | None
    metrics: dict[str, ValueRecord]
    against_dense: dict[str, Interval]
    seconds: Seconds
    peak_bytes: PeakBytes
    cost: CostRecord
    kept_bytes: int | None
    ranks: int
    streamed: Streamed | None


class Record(Identity, Figures, total=False):
    """One row of a run.

    A failed row has `error`, one line, and `traceback`, the path of the traceback file relative to the run directory.
    If several run directories were read together, `directory` is the run directory of the record, and `row_directory`
    the first of those that hold its row, if several do (`nmbench.results.joining`).
    """

    error: str
    traceback: str
    directory: str
    row_directory: str


def record_in(line: Mapping[str, Any], where: str) -> Record:
    """Return the record in a line of a file, `upgraded`. Raises `NMBenchError` if the line lacks fields."""
    odd = [name for name, kind in IN_EVERY_RECORD.items() if not isinstance(line.get(name, ...), kind)]
    if odd and line.get("format", 1) in (1, FORMAT):
        raise NMBenchError(
            f"{where} is not a record: {odd[0]!r} is missing or of a wrong type; remove the line to go on without it."
        )
    for name, found in line.get("metrics", {}).items() if isinstance(line.get("metrics"), dict) else ():
        if not isinstance(found, dict) or not isinstance(found.get("value"), (int, float)):
            raise NMBenchError(f"{where} is not a record: its metric {name!r} has no value; remove the line.")
    return upgraded(line, where)


def upgraded(line: Mapping[str, Any], where: str = "the record") -> Record:
    """Return a record of any format up to `FORMAT` as one of `FORMAT`. Raises `NMBenchError` for a later format."""
    made_in = line.get("format", 1)
    if made_in == FORMAT:
        added = {name: empty for name, empty in ADDED.items() if name not in line}
        return cast(Record, {**line, **added, "seconds": {**NO_CPU, **line.get("seconds", {})}})
    if made_in != 1:
        raise NMBenchError(
            f"{where} has format {made_in!r}; this nmbench reads formats 1 to {FORMAT}: install a newer one."
        )
    notes = dict(line.get("notes", {}))
    copied_from = notes.pop("same_as", None)
    experts = {
        name.removeprefix("experts_"): notes.pop(name)
        for name in ("experts_never_reached", "experts_under_calibrated")
        if name in notes
    }
    added = {
        **ADDED,
        "format": FORMAT,
        "seconds": {**NO_CPU, **line.get("seconds", {})},
        "peak_bytes": {"host_growth": None, **line.get("peak_bytes", {})},
        "notes": notes,
        "layer_notes": {},
        "figures": {},
        "experts": experts,
        "copied_from": copied_from,
        "curve": [],
        "started_from": line.get("started_from", f"{line.get('label')}@init"),  # the first records have no such field
    }
    return cast(Record, {**line, **added})
