"""What all jobs of a run share: the dense model, the tokens, the metrics, and how the outside names are looked up."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from nmbench.calibrate import batch_tokens
from nmbench.checkpoint import check_dense, check_finite
from nmbench.data import Pool, calibration_pool, cut, refuse_overlap, test_tokens, tokens_digest
from nmbench.errors import NMBenchError, unknown
from nmbench.evaluate import DenseSubject
from nmbench.events import Progress
from nmbench.intact import Fingerprint, fingerprint, probe_of
from nmbench.memory import Estimate, estimate
from nmbench.methods import Baseline, MaskLearner, Method, Stat
from nmbench.models import Bundle, DenseWeights
from nmbench.plugins import Plugins
from nmbench.registry import Registry
from nmbench.sources import Dataset, Metric
from nmbench.spec import RunSpec, digest

DTYPES = ("float32", "bfloat16", "float16", "float64")
FILL = 0.9  # of the free device memory that an estimate may fill
VERSIONS = ("nmbench", "torch", "transformers", "tokenizers", "safetensors", "pluggy")


@dataclass
class Bench:
    """The shared state of one run. `reference` holds the dense losses as soon as the dense job has run."""

    spec: RunSpec
    plugins: Plugins
    bundle: Bundle
    dense: DenseWeights
    metrics: Mapping[str, Metric]
    texts: Mapping[str, Tensor]
    pools: Mapping[int, Pool]
    provenance: Mapping[str, Any]
    probe: Tensor
    fingerprint: Fingerprint
    reference: DenseSubject = field(default_factory=lambda: DenseSubject({}))

    @cached_property
    def test_digests(self) -> dict[str, str]:
        """Names the test tokens of every data set."""
        return {name: tokens_digest(tokens) for name, tokens in self.texts.items()}

    @cached_property
    def protocol_digest(self) -> str:
        """Names what two rows must share to be comparable, by content: weights and test tokens too."""
        content = {"model_digest": self.dense.digest, "test_digests": self.test_digests}
        others = {"metric_provenance": self.metric_provenance} if self.metric_provenance else {}
        return digest({**self.spec.protocol(), **content, **others})

    @cached_property
    def metric_provenance(self) -> dict[str, Any]:
        """What the metrics depend on besides model and texts, of those that say so."""
        told = {name: dict(metric.provenance()) for name, metric in self.metrics.items()}
        return {name: content for name, content in told.items() if content}

    def calibration_digest(self, seed: int) -> str:
        """Names the windows that statistics are gathered from."""
        return self.pools[seed].statistics_digest(given(self.spec.windows))

    def directory(self) -> Path:
        """Where the run is kept unless the user says otherwise: rows in it are comparable, and can be told apart."""
        special = f"-{digest(self.spec.pattern_for)}" if self.spec.pattern_for else ""
        return Path("runs") / f"{self.protocol_digest}{special}"

    def reporter(self, job: str, stage: str) -> Callable[[int, int], None]:
        """A callback that tells observers how far a stage of a job is."""
        return lambda done, total: self.plugins.announce("nmbench_progress", event=Progress(job, stage, done, total))

    def learner_reporter(self, job: str, method: Method) -> Callable[[str, int, int | None, Mapping[str, float]], None]:
        """A callback for `LearnTask`; where a learner names no total, it is its `steps` option, if it has one."""
        steps = int(getattr(method, "steps", 0))
        return lambda stage, done, total, values: self.plugins.announce(
            "nmbench_progress", event=Progress(job, stage, done, steps if total is None else total, values)
        )

    def environment(self) -> dict[str, Any]:
        """Versions, device and dtypes: what else a number depends on."""
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
        """What the run directory says of the run besides its spec."""
        return {
            "spec_digest": self.spec.digest,
            "protocol_digest": self.protocol_digest,
            "environment": self.environment(),
            "model": self.bundle.ref,
            "model_provenance": dict(self.bundle.provenance),
            "model_digest": self.dense.digest,
            "coverage": self.bundle.coverage(),
            "skipped": self.bundle.skipped,
            "data_provenance": dict(self.provenance),
            "metric_provenance": self.metric_provenance,
            "test_digests": self.test_digests,
            "calibration_digests": {str(seed): self.calibration_digest(seed) for seed in self.pools},
            "pool_digests": {str(seed): pool.digest for seed, pool in self.pools.items() if len(pool.selection)},
            "calibration_notes": {str(seed): pool.notes for seed, pool in self.pools.items()},
        }


def load_model(spec: RunSpec, plugins: Plugins, methods: Sequence[Method] = ()) -> Bundle:
    """Load the model of `spec` where `methods` can work on it, without the layers it skips; its weights must be finite
    and dense.
    """
    cls, ref = source_of(spec.model, plugins)
    device = device_of(spec.device)
    dtype = dtype_of(spec.dtype) if spec.dtype else ("float32" if device.type == "cpu" else None)
    with no_loading_bar():
        source = cls(dtype=dtype, trust_remote_code=spec.trust_remote_code, dequantise=bool(spec.dequantise))
        bundle = source.load(ref)
    place(bundle, spec, methods, device)
    check_finite(bundle)
    bundle = bundle.without(spec.skip)
    bundle.provenance = {**bundle.provenance, **check_dense(bundle, bool(spec.allow_sparse))}
    return bundle


def place(bundle: Bundle, spec: RunSpec, methods: Sequence[Method], device: torch.device) -> None:
    """Put a model on `device`; or, as the user says, or if it would not fit there, only each block while it works.

    Raises `NMBenchError` if a mask learner, which needs the whole model, is to work on one that is streamed.
    """
    learners = any(isinstance(method, MaskLearner) for method in methods)
    streamed = spec.stream
    if streamed is None:
        whole = planned(bundle, spec, methods, device, streamed=False)
        streamed = device.type == "cuda" and not learners and whole.peak > FILL * torch.cuda.mem_get_info(device)[0]
    if streamed and learners:
        raise NMBenchError("a mask learner needs the whole model on the device; run it without --stream.")
    if streamed:
        bundle.stream(device)
    else:
        bundle.model.to(device)


def planned(bundle: Bundle, spec: RunSpec, methods: Sequence[Method], device: torch.device, streamed: bool) -> Estimate:
    """The device memory that `methods` will need."""
    needs = Stat.NONE
    for method in methods:
        needs |= method.needs if isinstance(method, Baseline) else Stat.NONE
    full = spec.resolved(bundle.defaults)
    windows, window_tokens = given(full.windows), given(full.window_tokens)
    learners = [method for method in methods if isinstance(method, MaskLearner)]
    at_once = batch_tokens(bundle, device)
    return estimate(bundle, needs, windows, window_tokens, device.type, streamed, at_once, learners)


@contextlib.contextmanager
def no_loading_bar() -> Iterator[None]:
    """Without the bar that transformers draws while it fills in weights; downloads still show theirs."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def source_of(model: str, plugins: Plugins) -> tuple[type, str]:
    """The source class and the reference of `--model`: a scheme, a scheme and a reference, or a folder."""
    registry = plugins.registries.models
    scheme, _, ref = model.partition(":")
    if scheme in registry:
        return registry.get(scheme), ref
    if Path(model).exists():
        return plugins.lookup(registry, "folder"), model
    if "/" in model and not scheme_like(model):
        hint = f"; for a model of the hub write hf:{model}" if model.count("/") == 1 and model[0] not in "/." else ""
        raise NMBenchError(f"model folder {model} does not exist{hint}.")
    raise unknown("model", model, [entry.name for entry in registry], " (and no such folder)")


def scheme_like(model: str) -> bool:
    return ":" in model.partition("/")[0]


def prepare(spec: RunSpec, plugins: Plugins, bundle: Bundle, learners: bool = True) -> Bench:
    """Read all texts of a resolved spec; `learners` says whether a mask learner takes part.

    Raises `NMBenchError` if a text is too short or if two overlap.
    """
    metrics = {name: look_up(plugins, plugins.registries.metrics, name) for name in spec.metrics}
    names = dict.fromkeys(name for metric in metrics.values() for name in metric.datasets)
    datasets = {name: look_up(plugins, plugins.registries.datasets, name) for name in names}
    texts = {name: test_tokens(dataset, bundle.tokenizer) for name, dataset in datasets.items()}
    for metric in metrics.values():
        for name, window in metric.windows:
            check_context(bundle, window, f"metric {name}@{window}")
            cut(texts[name], window, name)
    check_context(bundle, given(spec.window_tokens), "--window-tokens")
    assert spec.calibration is not None  # resolved
    calibration = look_up(plugins, plugins.registries.datasets, spec.calibration)
    pools = {seed: pool_of(spec, calibration, bundle, seed, learners) for seed in spec.seeds}
    for pool in pools.values():
        for name, tokens in texts.items():
            refuse_overlap(pool, spec.calibration, tokens, name)
    provenance = {name: dict(d.provenance()) for name, d in {spec.calibration: calibration, **datasets}.items()}
    probe = probe_of(texts, next(iter(pools.values())).calibration[0])
    shared = (metrics, texts, pools, provenance, probe, fingerprint(bundle, probe))
    return Bench(spec, plugins, bundle, DenseWeights(bundle), *shared)


def pool_of(spec: RunSpec, dataset: Dataset, bundle: Bundle, seed: int, learners: bool) -> Pool:
    """The pool of one seed; where no mask learner takes part, no more than statistics need."""
    window = given(spec.window_tokens)
    pool = given(spec.pool_tokens) if learners else given(spec.windows) * window
    selection = given(spec.selection_tokens) if learners else 0
    return calibration_pool(dataset, str(spec.calibration), bundle.tokenizer, window, pool, selection, seed)


def check_context(bundle: Bundle, window: int, what: str) -> None:
    """Raise `NMBenchError` if a window is longer than the model was made for."""
    context = getattr(getattr(bundle.model, "config", None), "max_position_embeddings", None)
    if context and window > context:
        raise NMBenchError(f"{what} is longer than the {context} tokens that {bundle.ref} can read; choose less.")


def given(value: int | None) -> int:
    """A length of a resolved spec."""
    assert value is not None
    return value


def look_up(plugins: Plugins, registry: Registry, text: str) -> Any:
    """Make the data set or metric that `name` or `name:argument` names."""
    name, _, argument = text.partition(":")
    return plugins.lookup(registry, name)(argument)


def check_names(spec: RunSpec, plugins: Plugins) -> None:
    """Raise `NMBenchError` for an unknown or ill-formed model, metric, data set or dtype, before anything is loaded."""
    source_of(spec.model, plugins)
    if spec.calibration:
        look_up(plugins, plugins.registries.datasets, spec.calibration)
    for text in spec.metrics:
        for name in look_up(plugins, plugins.registries.metrics, text).datasets:
            look_up(plugins, plugins.registries.datasets, name)
    for dtype in (spec.dtype, spec.eval_dtype):
        if dtype:
            dtype_of(dtype)
    device_of(spec.device)


def dtype_of(name: str) -> str:
    """`name` if it names a dtype that models are run in."""
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return name


def device_of(name: str) -> torch.device:
    """The device of a run; `auto` is CUDA where there is one, else the CPU. Raises `NMBenchError` if it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise NMBenchError("device cuda is not there: torch sees no CUDA GPU; use --device cpu.")
    return torch.device(name)


def cpu_name() -> str:
    """The processor as it names itself where Linux tells, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
