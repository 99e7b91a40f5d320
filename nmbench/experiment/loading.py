"""Load the dense model of a run where its methods can work on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from nmbench.errors import NMBenchError, unknown
from nmbench.experiment.memory import planned
from nmbench.methods import MaskLearner, Method
from nmbench.models.bundle import Bundle
from nmbench.models.sanity import check_dense, check_finite
from nmbench.plugins.loading import Plugins
from nmbench.spec import RunSpec

DTYPES = ("float32", "bfloat16", "float16", "float64")


FILL = 0.9  # of the free device memory that an estimate may fill


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
