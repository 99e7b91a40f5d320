"""The shared set-up of all jobs of a run: the dense model, the tokens and the metrics."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmbench.data import Pool, cut, encode, refuse_overlap, test_text, tokens_digest
from nmbench.errors import ModelChanged, NMBenchError
from nmbench.experiment.bos import check_bos
from nmbench.experiment.doubts import Doubt
from nmbench.experiment.environment import VERSIONS, cpu_name, version
from nmbench.experiment.input_doubts import input_doubts, tokens_of
from nmbench.experiment.jobs import Job, jobs
from nmbench.experiment.loading import load_dense
from nmbench.experiment.plan import Plan, look_up
from nmbench.experiment.pools import least_real, pool_of, real_text
from nmbench.experiment.tokenizer_checks import check_ids
from nmbench.methods import Method
from nmbench.models.bundle import Bundle
from nmbench.models.context import sliding_window
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.probe import check_length, examined
from nmbench.models.rounding import check_products
from nmbench.options import resolved
from nmbench.pattern import Pattern
from nmbench.plain_data import digest
from nmbench.plugins.events import Progress
from nmbench.plugins.loading import Plugins
from nmbench.results.format import SampledText
from nmbench.sources import Metric, Sampling
from nmbench.spec import ResolvedSpec
from nmbench.verification.fingerprint import LOOSE, Fingerprint, check_intact, fingerprint, is_intact, probe_of
from nmbench.verification.strict import check_divides


@dataclass
class Experiment:
    """The shared state of one run. `bundle`, `dense` and `fingerprint` are replaced if a method changed the model.

    `pools` are the tokens by seed. With `sampling` they are empty until `nmbench.experiment.self_text` has sampled
    them; `real` holds the pools of real text, from which prompts and selection windows are, and `sampled` describes
    the samples of every seed.
    """

    plan: Plan
    spec: ResolvedSpec
    bundle: Bundle
    dense: DenseWeights
    metrics: Mapping[str, Metric]
    texts: Mapping[str, Tensor]
    pools: Mapping[int, Pool]
    provenance: Mapping[str, Any]
    probe: Tensor
    fingerprint: Fingerprint
    doubts: tuple[Doubt, ...] = ()
    sampling: Sampling | None = None
    real: Mapping[int, Pool] = field(default_factory=dict)
    sampled: Mapping[int, SampledText] = field(default_factory=dict)

    @property
    def plugins(self) -> Plugins:
        """The plugins of the run."""
        return self.plan.plugins

    def jobs(self) -> list[Job]:
        """Return every job of the run in order; the dense row is not a job."""
        return list(jobs(self.spec, self.plan.contenders, self.protocol_digest))

    def patterns(self, pattern: Pattern) -> dict[str, Pattern]:
        """Return the pattern of every prunable layer: `pattern`, unless `pattern_for` names another."""
        return self.spec.layer_patterns(pattern, self.bundle.layers)

    @cached_property
    def test_digests(self) -> dict[str, str]:
        """The digest of the test tokens of every data set."""
        return {name: tokens_digest(tokens) for name, tokens in self.texts.items()}

    @cached_property
    def protocol_digest(self) -> str:
        """The digest of everything that comparable rows share, by content: also of weights and test tokens."""
        content = {"model_digest": self.dense.digest, "test_digests": self.test_digests}
        others: dict[str, Any] = {"metric_provenance": self.metric_provenance} if self.metric_provenance else {}
        if self.sampling:
            others["sampling"] = resolved(self.sampling)
        return digest({**self.spec.protocol(), **content, **others})

    @cached_property
    def metric_provenance(self) -> dict[str, Any]:
        """The provenance of metrics that depend on more than model and texts."""
        found = {name: dict(metric.provenance()) for name, metric in self.metrics.items()}
        return {name: content for name, content in found.items() if content}

    @cached_property
    def sliding_window(self) -> int | None:
        """The tokens that attention sees in some or all blocks, if that is less than a test window."""
        longest = max((tokens for metric in self.metrics.values() for _, tokens in metric.windows), default=0)
        window = sliding_window(self.bundle.model)
        return window if window and window < longest else None

    def calibration_digest(self, seed: int) -> str:
        """Return the digest of the windows that statistics are gathered from."""
        return self.pools[seed].statistics_digest(self.spec.windows)

    def directory(self) -> Path:
        """Return the default run directory, named by the protocol digest and, if there is any, `pattern_for`."""
        special = f"-{digest(self.spec.pattern_for)}" if self.spec.pattern_for else ""
        return Path("runs") / f"{self.protocol_digest}{special}"

    def reporter(self, job: str, stage: str) -> Callable[[int, int], None]:
        """Return a callback that announces the progress of a stage of a job."""
        return lambda done, total: self.plugins.announce("nmbench_progress", event=Progress(job, stage, done, total))

    def learner_reporter(self, job: str, method: Method) -> Callable[[str, int, int | None, Mapping[str, float]], None]:
        """Return a callback for `LearnTask`; the default of the total is the option `steps` of the learner, or 0."""
        steps = int(getattr(method, "steps", 0))
        return lambda stage, done, total, values: self.plugins.announce(
            "nmbench_progress", event=Progress(job, stage, done, steps if total is None else total, values)
        )

    def is_intact(self, restore: bool = True) -> bool:
        """Return True if the model has not changed since the run began; `restore`: restore the dense weights first."""
        return is_intact(self.bundle, self.dense, self.fingerprint, self.probe, restore)

    def check_intact(self, who: str) -> None:
        """Raise `NMBenchError` if `who` changed the model in a way that is not undone."""
        check_intact(self.bundle, self.dense, self.fingerprint, self.probe, who)

    def renew(self, who: str) -> None:
        """Load the model again after `who` changed it. Raises `ModelChanged` if the loaded model is another one."""
        bundle = examined(load_dense(self.plan.spec, self.plugins, self.plan.methods), self.probe[0])
        now, dense = fingerprint(bundle, self.probe), DenseWeights(bundle)
        if dense.digest != self.dense.digest or not self.fingerprint.like(now, LOOSE):
            raise ModelChanged(
                f"the dense model of {bundle.ref} is no longer what it was before {who}, though it was loaded again; "
                f"give the same command once more, without {who}."
            )
        self.bundle, self.dense, self.fingerprint = bundle, dense, now

    def environment(self) -> dict[str, Any]:
        """Return versions, device, threads and dtypes, which numbers depend on as well."""
        device = self.bundle.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        return {
            **{package: version(package) for package in VERSIONS},
            "python": platform.python_version(),
            "device": device.type,
            "device_name": name,
            "threads": torch.get_num_threads(),
            "dtype": self.spec.dtype,
            "eval_dtype": self.spec.eval_dtype,
        }

    def manifest(self) -> dict[str, Any]:
        """Return the content of `manifest.json`: digests, provenance, coverage and environment of the run."""
        return {
            "spec_digest": self.spec.digest,
            "protocol_digest": self.protocol_digest,
            "environment": self.environment(),
            "model": self.bundle.ref,
            "model_provenance": dict(self.bundle.provenance),
            "model_digest": self.dense.digest,
            "coverage": {**self.bundle.coverage(), "left_dense": self.bundle.left_dense()},
            "skipped": self.bundle.skipped,
            "data_provenance": dict(self.provenance),
            "metric_provenance": self.metric_provenance,
            "test_digests": self.test_digests,
            "calibration_digests": {str(seed): self.calibration_digest(seed) for seed in self.pools},
            "pool_digests": {str(seed): pool.digest for seed, pool in self.pools.items() if len(pool.selection)},
            "calibration_notes": {str(seed): pool.notes for seed, pool in self.pools.items()},
            "sliding_window": self.sliding_window,
            "doubts": list(map(str, self.doubts)),
            **({"sampled": {str(seed): dict(about) for seed, about in self.sampled.items()}} if self.sampled else {}),
        }


def prepared(plan: Plan, bundle: Bundle | None = None) -> Experiment:
    """Return the shared set-up of `plan`: the model (`bundle`, or loaded), the resolved specification, all texts.

    Text that is sampled from the model is not sampled yet.
    Raises `NMBenchError` if a pattern does not divide a layer, if a text is too short, if two texts overlap, or if the
    model is not one that can be pruned and measured (`nmbench.models.probe`).
    """
    bundle = bundle or load_dense(plan.spec, plan.plugins, plan.methods)
    spec = plan.resolved(bundle.defaults)
    metrics = {name: look_up(plan.plugins, plan.plugins.registries.metrics, name) for name in spec.metrics}
    names = dict.fromkeys(name for metric in metrics.values() for name in metric.datasets)
    datasets = {name: look_up(plan.plugins, plan.plugins.registries.datasets, name) for name in names}
    written = {name: test_text(dataset, name) for name, dataset in datasets.items()}
    texts = {name: encode(bundle.tokenizer, text, f"the test text {name}") for name, text in written.items()}
    check_windows(bundle, spec, metrics, texts)
    calibration, sampling = real_text(plan, spec.calibration)
    least = least_real(spec, sampling, bundle, plan.learns) if sampling else None
    pools = {seed: pool_of(spec, calibration, bundle, seed, plan.learns, least) for seed in spec.seeds}
    for pool in pools.values():
        for name, tokens in texts.items():
            refuse_overlap(pool, spec.calibration, tokens, name, bundle.tokenizer)
    check_ids(bundle, tokens_of(spec, pools, texts))
    probe = probe_of(texts, next(iter(pools.values())).calibration[0])
    if spec.weights:
        check_products(bundle, probe[0])
    bundle = examined(bundle, probe[0])
    check_length(bundle, longest_window(spec, metrics, pools, texts))
    doubts = (*plan.doubts, *input_doubts(bundle, spec, calibration, pools, metrics, written, texts))
    calibrated = sampling.source if sampling else spec.calibration
    provenance = {name: dict(d.provenance()) for name, d in {calibrated: calibration, **datasets}.items()}
    for pattern in spec.patterns:
        check_divides(spec.layer_patterns(pattern, bundle.layers), bundle.shapes)
    found = (metrics, texts, {} if sampling else pools, provenance, probe, fingerprint(bundle, probe), doubts)
    return Experiment(plan, spec, bundle, DenseWeights(bundle), *found, sampling, pools)


def check_windows(
    bundle: Bundle, spec: ResolvedSpec, metrics: Mapping[str, Metric], texts: Mapping[str, Tensor]
) -> None:
    """Raise `NMBenchError` if a window is longer than a text, or, with its BOS, than the context of the model.

    It is raised for windows that should begin with BOS, too, if there is none.
    """
    for title, metric in metrics.items():
        for name, window in metric.windows:
            check_context(bundle, window + metric.bos, f"metric {title}" if metric.bos else f"metric {name}@{window}")
            cut(texts[name], window, name)
        if metric.bos:
            check_bos(bundle, f"metric {title}")
    if spec.bos == "always":
        check_bos(bundle, "--bos always")
    check_context(bundle, spec.window_tokens, "--window-tokens")


def longest_window(
    spec: ResolvedSpec, metrics: Mapping[str, Metric], pools: Mapping[int, Pool], texts: Mapping[str, Tensor]
) -> Tensor:
    """Return the longest window that the run reads: int64 `[tokens]`, of a test text or of the calibration text."""
    found = [texts[name][: window + metric.bos] for metric in metrics.values() for name, window in metric.windows]
    return max((*found, next(iter(pools.values())).calibration[0]), key=len)


def check_context(bundle: Bundle, window: int, what: str) -> None:
    """Raise `NMBenchError` if a window is longer than the context of the model."""
    context = bundle.context_tokens
    if context and window > context:
        raise NMBenchError(f"{what} is longer than the {context} tokens that {bundle.ref} can read; choose less.")
