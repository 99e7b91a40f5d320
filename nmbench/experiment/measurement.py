"""The measurement of one row: weights are written, proven strict, evaluated, and proven unchanged by hash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from nmbench.calibration.blockwise import Report, losses_by_blocks
from nmbench.errors import NMBenchError
from nmbench.evaluation.losses import losses_in_parts
from nmbench.evaluation.measure import measure_all
from nmbench.evaluation.subject import DenseSubject, InParts, Subject
from nmbench.experiment.loading import dtype_of
from nmbench.experiment.setup import Experiment
from nmbench.methods import PrunedModel
from nmbench.models.applying import apply
from nmbench.models.bundle import Bundle
from nmbench.models.dense_view import DenseView
from nmbench.pattern import Pattern
from nmbench.runtime.cost import Meter
from nmbench.sources import ValueRecord
from nmbench.verification.strict import Proof, check_strict


@dataclass(frozen=True)
class Measured:
    """The figures of one row: the proof of strictness (None: dense), metrics by name, losses, digest of the weights."""

    proof: Proof | None
    metrics: Mapping[str, ValueRecord]
    subject: Subject
    digest: str
    meter: Meter


def measured(
    experiment: Experiment,
    title: str,
    pruned: PrunedModel | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    dense: DenseSubject | None = None,
) -> Measured:
    """Return the figures of `pruned` on the test texts, compared with the losses of `dense`; None: the dense model.

    The dense weights are restored afterwards. The digest of the weights is taken before the evaluation; by this digest,
    `nmbench export` checks that a model made again is the measured model. Raises `NotStrict`, and `NMBenchError` if the
    measured tensors changed during the evaluation.
    """
    with Meter(experiment.bundle.device) as meter:
        try:
            if pruned is not None:
                apply(experiment.bundle, pruned)
            bundle = experiment.bundle.in_dtype(dtype_of(experiment.spec.eval_dtype))
            proof = proven(bundle, pruned, patterns or {}, title)
            digest = bundle.digest()
            subject = subject_of(experiment, bundle, title)
            reference = reference_of(experiment, bundle, subject, dense)
            metrics = measure_all(experiment.metrics, subject, reference)
            if bundle.digest() != digest:
                raise NMBenchError(f"the weights of {title} changed while they were measured; no number is recorded.")
        finally:
            experiment.dense.restore()
    return Measured(proof, metrics, subject, digest, meter)


def proven(bundle: Bundle, pruned: PrunedModel | None, patterns: Mapping[str, Pattern], title: str) -> Proof | None:
    """Return the proof that the weights in `bundle` are strictly N:M; None for the dense model."""
    if pruned is None:
        return None
    weights = {name: layer.read() for name, layer in bundle.layers.items()}
    return check_strict(weights, pruned.masks, patterns, title.partition(" ")[0], bundle.release)


def subject_of(experiment: Experiment, bundle: Bundle, title: str) -> Subject:
    """Return the subject of the metrics, with copies of the test tokens, so that a metric cannot change them."""
    texts = {name: tokens.clone() for name, tokens in experiment.texts.items()}
    return Subject(bundle, texts, experiment.reporter(title, "evaluate"), in_parts=in_parts(bundle))


def in_parts(bundle: Bundle) -> InParts:
    """Return how losses of many windows are measured: in one batch after the other, or, if streamed, block by block."""

    def by_blocks(measure: Callable[[Tensor], Tensor], windows: Tensor, size: int, report: Report) -> Tensor:
        found = losses_by_blocks(bundle, measure, windows, size, report)
        return losses_in_parts(measure, windows, size, report) if found is None else found

    return by_blocks if bundle.streaming else losses_in_parts


def reference_of(experiment: Experiment, bundle: Bundle, subject: Subject, dense: DenseSubject | None) -> DenseSubject:
    """Return the dense model that metrics compare with: copies of its losses, a view of its weights in `bundle`."""
    view = DenseView(bundle, experiment.dense.copies)
    if dense is None:
        return DenseSubject({}, subject, view)
    return DenseSubject({name: losses.clone() for name, losses in dense.cached.items()}, None, view)
