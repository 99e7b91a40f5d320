"""Every doubt on the inputs of a run, found before anything is measured: model, tokenizer, texts, windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from torch import Tensor

from nmbench.data import Pool
from nmbench.experiment.bos import bos_doubts
from nmbench.experiment.doubts import Doubt
from nmbench.experiment.tokenizer_checks import tokenizer_doubts
from nmbench.models.bundle import Bundle
from nmbench.models.context import trained_tokens
from nmbench.sources import Dataset, Metric
from nmbench.spec import ResolvedSpec

DOCUMENTS = 8  # of the calibration text that are checked where a run has no test text


def input_doubts(
    bundle: Bundle,
    spec: ResolvedSpec,
    calibration: Dataset,
    pools: Mapping[int, Pool],
    metrics: Mapping[str, Metric],
    written: Mapping[str, str],
    texts: Mapping[str, Tensor],
) -> tuple[Doubt, ...]:
    """Return the doubts on the inputs of a run; the test texts are `written` in characters and `texts` in tokens."""
    samples = written or {spec.calibration: "\n\n".join(itertools.islice(calibration.texts("calibration"), DOCUMENTS))}
    return (
        *zeros(bundle),
        *in_8_bits(bundle),
        *left_out(bundle),
        *longer_than_training(bundle, spec, metrics),
        *tokenizer_doubts(bundle, samples, tokens_of(spec, pools, texts)),
        *bos_doubts(bundle, metrics, texts, bundle.context_tokens),
    )


def tokens_of(spec: ResolvedSpec, pools: Mapping[int, Pool], texts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tokens that a run reads, int64 of any shape, by the name of their text."""
    pooled = {f"the calibration text {spec.calibration} (seed {seed})": pool for seed, pool in pools.items()}
    calibration = {name: pool.calibration for name, pool in pooled.items()}
    return {**texts, **calibration, **{f"the selection text, {name}": pool.selection for name, pool in pooled.items()}}


def zeros(bundle: Bundle) -> Iterator[Doubt]:
    """Yield a doubt on zeros in the dense weights that look like those of rounding."""
    found = bundle.provenance.get("rounded_zeros")
    if found:
        origin = bundle.provenance.get("dequantised_from")
        yield Doubt(
            "model",
            f"{found['layers']} of {len(bundle.layers)} layers hold scattered zeros, {found['share_of_zeros']:.1%} of "
            f"their weights, as rounding to few bits leaves them{f' (dequantised from {origin})' if origin else ''}: "
            f"taken for dense, but figures are those of the rounded weights.",
        )


def in_8_bits(bundle: Bundle) -> Iterator[Doubt]:
    """Yield a doubt on weights that the run itself rounded to 8 bits."""
    if stored := bundle.provenance.get("stored_weights"):
        yield Doubt(
            "model",
            f"the weights of its {stored['layers']} prunable layers were rounded to 8 bits (--weights int8), which "
            f"changed them by {stored['relative_error']:.2%} of their norm: the dense row is the rounded model.",
        )


def left_out(bundle: Bundle) -> Iterator[Doubt]:
    """Yield doubts on what lies beside the loaded weights and has no part in the figures: tensors, and code."""
    if unread := bundle.provenance.get("unread_tensors"):
        yield Doubt(
            "model",
            f"{unread['number']} tensors of its decoder blocks are in its files and not in the model that was loaded, "
            f"first {unread['first']}: its configuration is another model's (fewer layers, no biases, another type), "
            f"or its weights are quantised. Figures are those of the rest.",
        )
    if code := bundle.provenance.get("code_not_run"):
        yield Doubt(
            "model",
            f"it brings code of its own, {code}, which did not run: figures are those of {type(bundle.model).__name__} "
            f"of transformers. --trust-remote-code runs the code.",
        )


def longer_than_training(bundle: Bundle, spec: ResolvedSpec, metrics: Mapping[str, Metric]) -> Iterator[Doubt]:
    """Yield a doubt on windows beyond the context of training, of a model that reads longer ones too."""
    trained = trained_tokens(bundle.model)
    named = {"--window-tokens": spec.window_tokens}
    named |= {f"{name}@{window}": window for metric in metrics.values() for name, window in metric.windows}
    longer = [name for name, window in named.items() if trained and window > trained]
    if longer:
        yield Doubt("context", f"{', '.join(longer)} is longer than the {trained} tokens of the model's training.")
