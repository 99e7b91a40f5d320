"""Loading the dense model of a run onto its device, whole or block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from nmbench.errors import NMBenchError, unknown
from nmbench.experiment.memory import learns_whole, planned
from nmbench.methods import Method
from nmbench.models.bundle import Bundle
from nmbench.models.rounding import store_eight_bit
from nmbench.models.sanity import check_dense, check_finite
from nmbench.plugins.loading import Plugins
from nmbench.sources import ModelSource
from nmbench.spec import MODEL_FOLDER, PLACES, ResolvedSpec, RunSpec

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
FILL = 0.9  # of the free device memory that an estimate may fill


def load_model(
    ref: str,
    plugins: Plugins,
    *,
    dtype: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    dequantise: bool = False,
    merge_adapter: str | None = None,
    place: Callable[[Bundle, torch.device], None] = lambda bundle, device: bundle.to(device),
) -> Bundle:
    """Return the model `ref`, a value of `--model`, on `device`; `place` may place it block by block instead.

    `dtype` is a name of `DTYPES`; None: float32 on a CPU, else the choice of the model source.

    Raises `NumericalFailure` for weights that are not finite, and `NMBenchError` for a model that cannot be loaded.
    """
    cls, rest = source_of(ref, plugins)
    where = device_of(device)
    name = dtype or ("float32" if where.type == "cpu" else None)
    if name:
        dtype_of(name)
    asked = {"merge_adapter": merge_adapter} if merge_adapter else {}
    if asked and not cls.merges_adapters:
        raise NMBenchError(
            f"--merge-adapter {merge_adapter} cannot be merged into model {ref}: only a model "
            f"folder and a model of the hub (hf:) take an adapter; save the merged model and give its folder."
        )
    with no_loading_bar():
        bundle = cls(dtype=name, trust_remote_code=trust_remote_code, dequantise=dequantise, **asked).load(rest)
    place(bundle, where)
    check_finite(bundle)
    return bundle


def load_dense(spec: RunSpec, plugins: Plugins, methods: Sequence[Method] = ()) -> Bundle:
    """Return the model of `spec`, placed as `methods` need, without the layers that `spec` skips.

    Raises `NMBenchError` if the weights are sparse already, unless `spec` allows sparse weights.
    """
    about: dict[str, Any] = {}

    def placed(bundle: Bundle, device: torch.device) -> None:
        if spec.weights:
            about.update(stored_in_8_bits(bundle.without(spec.skip), bool(spec.allow_sparse)))
        place(bundle, spec.resolved(bundle.defaults), methods, device)

    bundle = load_model(
        spec.model,
        plugins,
        dtype=spec.dtype,
        device=spec.device,
        trust_remote_code=spec.trust_remote_code,
        dequantise=bool(spec.dequantise),
        merge_adapter=spec.merge_adapter,
        place=placed,
    ).without(spec.skip)
    bundle.provenance = {**bundle.provenance, **(about or check_dense(bundle, bool(spec.allow_sparse)))}
    return bundle


def outlined(spec: RunSpec, plugins: Plugins) -> Bundle | None:
    """Return the model of `spec` without weights; None if its source cannot tell, or weights are stored in 8 bits."""
    cls, rest = source_of(spec.model, plugins)
    dtype = spec.dtype or ("float32" if device_of(spec.device).type == "cpu" else None)
    source = cls(dtype=dtype, trust_remote_code=spec.trust_remote_code)
    try:
        found = None if spec.weights else source.outline(rest)
        return found.without(spec.skip) if found else None
    except Exception:  # the run will say what is wrong with the model
        return None


def stored_in_8_bits(bundle: Bundle, allow_sparse: bool) -> dict[str, Any]:
    """Store the prunable weights in 8 bits on the host, so that the device never has them as floats.

    Return the manifest's entries on zeros, of the weights before that, and on the rounding.
    """
    zeros = check_dense(bundle, allow_sparse)
    return {**zeros, "stored_weights": store_eight_bit(bundle)}


def place(bundle: Bundle, spec: ResolvedSpec, methods: Sequence[Method], device: torch.device) -> None:
    """Move a model to `device`, or stream its blocks, by the choice of the user or for lack of device memory.

    Raises `NMBenchError` for a streamed model with a learner of the whole model, and for a model on disk that is to be
    evaluated in another dtype.
    """
    source = streamed_from(bundle, spec, methods, device)
    if source == "disk" and spec.weights:
        raise NMBenchError(
            f"--stream-from disk reads the weights that the files hold, not those of --weights {spec.weights}; leave "
            f"one of them out."
        )
    if source == "disk" and spec.eval_dtype != spec.dtype:
        raise NMBenchError(
            f"--stream-from disk evaluates the weights as they are pruned, in {spec.dtype}, not in {spec.eval_dtype}; "
            f"leave out --eval-dtype, or give --stream-from host."
        )
    if source:
        bundle.stream(device, from_disk=source == "disk")
    else:
        bundle.to(device)


def streamed_from(bundle: Bundle, spec: ResolvedSpec, methods: Sequence[Method], device: torch.device) -> str | None:
    """Return where blocks are streamed from, `host` or `disk`; None if the whole model is on the device.

    Raises `NMBenchError` for a streamed model with a learner of the whole model.
    """
    learners = any(map(learns_whole, methods))
    streamed = True if spec.stream_from else spec.stream
    if streamed is None:
        whole = planned(bundle, spec, methods, device, streamed=False)
        streamed = device.type == "cuda" and not learners and whole.most > FILL * torch.cuda.mem_get_info(device)[0]
    if streamed and learners:
        raise NMBenchError(
            "a learner of the whole model needs it on the device; run it without --stream and --stream-from."
        )
    return (spec.stream_from or PLACES[0]) if streamed else None


@contextlib.contextmanager
def no_loading_bar() -> Iterator[None]:
    """Disable the progress bar of transformers for loading weights; bars of downloads stay."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def source_of(model: str, plugins: Plugins) -> tuple[type[ModelSource], str]:
    """Return the source class and the reference of `--model`: a scheme, a scheme and a reference, or a folder.

    Raises `NMBenchError` for anything else.
    """
    registry = plugins.registries.models
    scheme, _, ref = model.partition(":")
    if scheme in registry:
        return registry.get(scheme), ref
    if Path(model).exists():
        return plugins.lookup(registry, MODEL_FOLDER), model
    if "/" in model and not scheme_like(model):
        hint = f"; for a model of the hub write hf:{model}" if model.count("/") == 1 and model[0] not in "/." else ""
        raise NMBenchError(f"model folder {model} does not exist{hint}.")
    raise unknown("model", model, [entry.name for entry in registry], " (and no such folder)")


def scheme_like(model: str) -> bool:
    return ":" in model.partition("/")[0]


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype `name`. Raises `UnknownName` for a dtype that models do not run in."""
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def device_of(name: str) -> torch.device:
    """Return the device of a run; `auto` is CUDA if torch sees a GPU, else the CPU.

    Raises `NMBenchError` for an unknown or missing device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise NMBenchError("device cuda is not there: torch sees no CUDA GPU; use --device cpu.")
    return torch.device(name)
