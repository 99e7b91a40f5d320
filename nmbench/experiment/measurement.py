"""One row measured: the weights are written, proven strict, evaluated, and proven unchanged by hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nmbench.errors import NMBenchError
from nmbench.evaluation.measure import measure_all
from nmbench.evaluation.subject import DenseSubject, Subject
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
    """Measure `pruned` on the test texts beside the losses of `dense`; without `pruned`, the dense model.

    The dense weights are back in the model afterwards. Raises `NotStrict`, and `NMBenchError` if the very tensors that
    were measured changed meanwhile. The digest is taken before the evaluation: it tells whether a model that is made
    again is the one that was measured.
    """
    with Meter(experiment.bundle.device) as meter:
        try:
            if pruned is not None:
                apply(experiment.bundle, pruned)
            bundle = experiment.bundle.in_dtype(dtype_of(experiment.spec.eval_dtype))
            proof = proven(bundle, pruned, patterns or {}, title)
            digest = bundle.digest()
            subject = lent_subject(experiment, bundle, title)
            reference = lent_reference(experiment, bundle, subject, dense)
            metrics = measure_all(experiment.metrics, subject, reference)
            if bundle.digest() != digest:
                raise NMBenchError(f"the weights of {title} changed while they were measured; no number is recorded.")
        finally:
            experiment.dense.restore()
    return Measured(proof, metrics, subject, digest, meter)


def proven(bundle: Bundle, pruned: PrunedModel | None, patterns: Mapping[str, Pattern], title: str) -> Proof | None:
    """The proof of strictness of the weights in `bundle`; None for the dense model."""
    if pruned is None:
        return None
    weights = {name: layer.read() for name, layer in bundle.layers.items()}
    return check_strict(weights, pruned.masks, patterns, title.partition(" ")[0])


def lent_subject(experiment: Experiment, bundle: Bundle, title: str) -> Subject:
    """The subject that metrics measure; a metric gets copies of the tokens."""
    texts = {name: tokens.clone() for name, tokens in experiment.texts.items()}
    return Subject(bundle, texts, experiment.reporter(title, "evaluate"))


def lent_reference(
    experiment: Experiment, bundle: Bundle, subject: Subject, dense: DenseSubject | None
) -> DenseSubject:
    """The dense model that metrics compare with: copies of its losses, and a view of its weights in `bundle`."""
    view = DenseView(bundle, experiment.dense.copies)
    if dense is None:
        return DenseSubject({}, subject, view)
    return DenseSubject({name: losses.clone() for name, losses in dense.cached.items()}, None, view)
