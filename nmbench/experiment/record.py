"""What a record says besides its figures: whose it is, what it was made from, and what went wrong."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nmbench.evaluation.comparison import paired
from nmbench.evaluation.subject import DenseSubject, Subject
from nmbench.experiment.jobs import Job
from nmbench.experiment.setup import Experiment
from nmbench.methods import MaskLearner
from nmbench.results.records import Record
from nmbench.runtime.cost import Cost


def described(job: Job, experiment: Experiment) -> Record:
    """What a record says of its job, whether it ends well or not."""
    return {
        "label": job.label,
        "method": job.contender.name if job.contender else None,
        "options": dict(job.contender.options) if job.contender else {},
        "content": dict(job.contender.content) if job.contender else {},
        "started_from": job.contender.init.label if learns(job) and job.contender and job.contender.init else None,
        "pattern": str(job.pattern) if job.pattern else None,
        "pattern_for": {glob: str(pattern) for glob, pattern in experiment.spec.pattern_for} if job.pattern else {},
        "seed": job.seed,
        "model": experiment.bundle.ref,
        "coverage": experiment.bundle.coverage() if job.contender else None,
        "calibration": experiment.spec.calibration if job.contender else None,
        "calibration_digest": experiment.calibration_digest(job.seed) if job.seed is not None else None,
        "pool_digest": experiment.pools[job.seed].digest if job.seed is not None and learns(job) else None,
        "job_digest": job.digest,
        "spec_digest": experiment.spec.digest,
        "protocol_digest": experiment.protocol_digest,
        "environment": experiment.environment(),
    }


def failed(job: Job, experiment: Experiment, message: str, trace: str) -> Record:
    """The row of a job that failed: the same fields as any other, without figures."""
    return {
        **described(job, experiment),
        "status": "failed",
        "error": message,
        "traceback": trace,
        "strict": None,
        "proof": None,
        "measured_digest": None,
        "weights_changed": None,
        "metrics": {},
        "against_dense": {},
        "seconds": {"prune": None, "evaluate": None, "total": None},
        "peak_bytes": {"host": None, "device": None},
        "cost": dict.fromkeys(asdict(Cost())),
        "notes": {},
    }


def learns(job: Job) -> bool:
    """Whether the job is a mask learner's, which reads the whole pool."""
    return job.contender is not None and isinstance(job.contender.method, MaskLearner)


def against_dense(subject: Subject, dense: DenseSubject) -> dict[str, dict[str, Any]]:
    """Paired differences of losses to the dense model, by text and window."""
    return {name: asdict(paired(losses, dense.cached[name])) for name, losses in subject.cached.items()}
