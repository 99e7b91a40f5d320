"""The record of a job: its identity, known before the work, and its figures or its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import cast

from nmbench.comparison import paired
from nmbench.evaluation.subject import DenseSubject, Subject
from nmbench.experiment.dense_checks import better_than_dense
from nmbench.experiment.doubts import Doubt
from nmbench.experiment.jobs import Job, dense_digest
from nmbench.experiment.measurement import Measured
from nmbench.experiment.setup import Experiment
from nmbench.methods import PrunedModel
from nmbench.results.format import (
    FORMAT,
    CostRecord,
    Coverage,
    Figures,
    Identity,
    Interval,
    Record,
    Said,
    Seconds,
    Streamed,
)
from nmbench.runtime.cost import Cost, Meter
from nmbench.runtime.ranks import joined_ranks
from nmbench.spec import DENSE

NO_SECONDS = cast(Seconds, dict.fromkeys(Seconds.__annotations__))
NO_COST = cast(CostRecord, dict.fromkeys(asdict(Cost())))


def identity_of(job: Job, experiment: Experiment) -> Identity:
    """Return the part of a record that is known before the work of the job."""
    spec, pool = experiment.spec, experiment.pools[job.seed]
    return {
        **dense_identity(experiment),
        "label": job.label,
        "method": job.contender.name,
        "options": dict(job.contender.options),
        "content": dict(job.contender.content),
        "started_from": job.start,
        "repairs": job.repairs,
        "pattern": str(job.pattern),
        "pattern_for": {glob: str(pattern) for glob, pattern in spec.pattern_for},
        "seed": job.seed,
        "coverage": cast(Coverage, experiment.bundle.coverage()),
        "calibration": spec.calibration,
        "calibration_digest": experiment.calibration_digest(job.seed),
        "sampled": experiment.sampled.get(job.seed),
        "pool_digest": pool.digest if job.learns else None,
        "job_digest": job.digest,
    }


def dense_identity(experiment: Experiment) -> Identity:
    """Return this part of the dense record, which has no method, pattern, seed or calibration."""
    return {
        "format": FORMAT,
        "label": DENSE,
        "method": None,
        "options": {},
        "content": {},
        "started_from": None,
        "repairs": None,
        "pattern": None,
        "pattern_for": {},
        "seed": None,
        "model": experiment.bundle.ref,
        "sliding_window": experiment.sliding_window,
        "coverage": None,
        "calibration": None,
        "calibration_digest": None,
        "sampled": None,
        "pool_digest": None,
        "job_digest": dense_digest(experiment.protocol_digest),
        "spec_digest": experiment.spec.digest,
        "protocol_digest": experiment.protocol_digest,
        "environment": experiment.environment(),
    }


def dense_record(experiment: Experiment, found: Measured, doubts: Mapping[str, Doubt]) -> Record:
    """Return the record of the dense model; `doubts`: those on its losses, by text."""
    figures: Figures = {
        **figures_of(found, meter=Meter(experiment.bundle.device)),
        "streamed": streamed_by(experiment),
        "doubts": list(map(str, (*experiment.doubts, *doubts.values()))),
        "unranked": list(doubts),
    }
    return cast(Record, {**dense_identity(experiment), **figures})


def record_of(
    job: Job,
    experiment: Experiment,
    pruned: PrunedModel,
    cost: Cost | None,
    pruning: Meter,
    found: Measured,
    dense: DenseSubject,
    kept_bytes: int | None = None,
) -> Record:
    """Return the record of a job that ended well; `pruning` includes interrupted processes and the start."""
    differences = against_dense(found.subject, dense)
    figures: Figures = {
        **figures_of(found, pruning),
        "cost": NO_COST if cost is None else cast(CostRecord, asdict(cost)),
        "strict": True,
        "kept_bytes": kept_bytes,
        "ranks": ranks_of(job),
        "streamed": streamed_by(experiment),
        "weights_changed": pruned.weights_changed,
        "against_dense": differences,
        "doubts": list(map(str, (*experiment.doubts, *better_than_dense(differences)))),
        "notes": dict(pruned.notes),
        "layer_notes": dict(pruned.layer_notes),
        "figures": dict(pruned.figures),
        "experts": dict(pruned.experts),
        "curve": [dict(point) for point in pruned.curve],
    }
    return cast(Record, {**identity_of(job, experiment), **figures})


def figures_of(found: Measured, meter: Meter) -> Figures:
    """The figures of a measured row; `meter` measured the pruning, and nothing for the dense model."""
    prune, evaluate = meter.spent, found.meter.spent
    device = max(filter(None, (meter.device_bytes, found.meter.device_bytes)), default=None)
    return {
        "status": "ok",
        "strict": None,
        "proof": found.proof,
        "measured_digest": found.digest,
        "weights_changed": False,
        "metrics": dict(found.metrics),
        "against_dense": {},
        "seconds": {
            "prune": round(prune.seconds, 3),
            "evaluate": round(evaluate.seconds, 3),
            "total": round(prune.seconds + evaluate.seconds, 3),
            "prune_cpu": rounded(prune.cpu_seconds),
            "evaluate_cpu": rounded(evaluate.cpu_seconds),
            "cpu_share": rounded(meter.cpu_share),
        },
        "peak_bytes": {
            "host": max(meter.host_bytes, found.meter.host_bytes),
            "host_growth": max(meter.host_growth, found.meter.host_growth),
            "device": device,
        },
        "cost": cast(CostRecord, asdict(Cost())),
        "kept_bytes": None,
        "ranks": 1,
        "streamed": None,
        **nothing_said(),
    }


def ranks_of(job: Job) -> int:
    """Return the number of processes that share the work of a job."""
    return joined_ranks().size if job.contender.method.data_parallel else 1


def streamed_by(experiment: Experiment) -> Streamed | None:
    """Return what was streamed since the last record; None if nothing is read ahead."""
    streaming = experiment.bundle.streaming
    traffic = streaming.traffic() if streaming else None
    if traffic is None:
        return None
    source = "disk" if experiment.bundle.disk else "host"
    gib, read, waited = traffic.bytes / 2**30, traffic.read, traffic.waited
    return {"source": source, "gib": round(gib, 3), "read": round(read, 3), "waited": round(waited, 3)}


def rounded(figure: float | None) -> float | None:
    """Return a figure with three decimals; None stays None."""
    return None if figure is None else round(figure, 3)


def failed(job: Job, experiment: Experiment, message: str, trace: str) -> Record:
    """Return the record of a job that failed: the fields of any record, without figures."""
    figures: Figures = {
        "status": "failed",
        "strict": None,
        "proof": None,
        "measured_digest": None,
        "weights_changed": None,
        "metrics": {},
        "against_dense": {},
        "seconds": NO_SECONDS,
        "peak_bytes": {"host": None, "host_growth": None, "device": None},
        "cost": NO_COST,
        "kept_bytes": None,
        "ranks": ranks_of(job),
        "streamed": streamed_by(experiment),
        **nothing_said(),
        "doubts": list(map(str, experiment.doubts)),
    }
    return cast(Record, {**identity_of(job, experiment), **figures, "error": message, "traceback": trace})


def nothing_said() -> Said:
    """Return the fields of the notes, empty."""
    return {
        "notes": {},
        "layer_notes": {},
        "figures": {},
        "experts": {},
        "copied_from": None,
        "curve": [],
        "doubts": [],
        "unranked": [],
    }


def against_dense(subject: Subject, dense: DenseSubject) -> dict[str, Interval]:
    """Return the paired differences of losses to the dense model, by text and window length."""
    return {name: cast(Interval, asdict(paired(losses, dense.cached[name]))) for name, losses in subject.cached.items()}
