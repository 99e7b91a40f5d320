"""A run as plain data: everything that decides the numbers, and nothing else.

Command line flags, a TOML file and the Python API all make one frozen `RunSpec`: what was asked, where `None` and `()`
leave a choice to the model source. `RunSpec.resolved` makes it a `ResolvedSpec`, which leaves nothing open.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nmbench.errors import NMBenchError, unknown
from nmbench.pattern import Pattern
from nmbench.plain_data import check_form, digest, refuse_duplicates

DENSE = "dense"
# Names that the host itself presumes; a test proves that plugins register each.
MODEL, MODEL_FOLDER = "demo", "folder"
CALIBRATION, PERPLEXITY, START, TINY = "c4", "ppl", "wanda", "tiny"
TEST_TEXTS = ("wikitext2", "c4")  # two domains, because methods and calibration texts differ in which one they favour
LARGEST_SEED = 2**63 - 1  # of torch, of TOML and of the columns of a frame
WITH_BOS = "+bos"  # ends the name of a metric whose windows begin with the BOS token
BOS = ("auto", "always", "never")
PLACES = ("host", "disk")  # that blocks are streamed from
INT8 = "int8"
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
PLAIN = {"methods": Mapping[str, Any], "patterns": tuple[str, ...], "pattern_for": Mapping[str, str]}
METHOD = {"method": str, "options": Mapping[str, str | int | float | bool | None]}


@dataclass(frozen=True)
class MethodSpec:
    """One method of the comparison: a label, a registered name, and the options that the user set."""

    label: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not LABEL.fullmatch(self.label) or self.label == DENSE:
            raise NMBenchError(
                f"label {self.label!r} is not legal: letters, digits and _.+- only, and {DENSE!r} is the reference row."
            )

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Return the method of the text `NAME` or `LABEL=NAME`."""
        label, equals, name = text.partition("=")
        return cls(label, name if equals else label)


@dataclass(frozen=True)
class Defaults:
    """The settings that a model source suggests for everything that the user leaves open."""

    pattern: Pattern = field(default_factory=lambda: Pattern(2, 4))
    calibration: str = CALIBRATION
    windows: int = 128
    window_tokens: int = 2048
    pool_tokens: int = 128 * 2048
    selection_tokens: int = 32 * 2048
    metrics: tuple[str, ...] = field(default_factory=lambda: test_metrics(2048))
    dtype: str = "float32"


def test_metrics(window: int) -> tuple[str, ...]:
    """Return the default metrics: perplexity in windows of `window` tokens on each of two texts."""
    return tuple(f"{PERPLEXITY}:{text}@{window}" for text in TEST_TEXTS)


@dataclass(frozen=True)
class RunSpec:
    """One comparison as the user asked for it; None and () leave a choice to the model source.

    Statistics are gathered from `windows` windows of `window_tokens` tokens. Learners read `pool_tokens` tokens and
    choose by `selection_tokens` others. `plugins` are single files to load. A model that is sparse already is pruned
    only if `allow_sparse`, a quantised model only if `dequantise`. `merge_adapter`: the folder of an adapter that is
    merged into the weights before anything else, or `beside` for the adapter in the folder of the model. `weights`:
    int8 stores the prunable weights in 8 bits, with one scale for each output; None: in `dtype`. `stream`:
    decoder blocks stay on the host and are copied to the device one by one; None: only if the model would not fit.
    `stream_from`: where they stay, in the memory of the host or on its disk; given alone, they are streamed.
    `bos`: whether the BOS token begins every calibration and selection window: always, never, or, if auto, where it
    begins the windows of the first metric. `keep_weights`: repaired weights are
    kept in the run directory; None: they are.
    """

    methods: tuple[MethodSpec, ...]
    model: str = MODEL
    patterns: tuple[Pattern, ...] = ()
    pattern_for: tuple[tuple[str, Pattern], ...] = ()
    skip: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    calibration: str | None = None
    windows: int | None = None
    window_tokens: int | None = None
    pool_tokens: int | None = None
    selection_tokens: int | None = None
    metrics: tuple[str, ...] = ()
    dtype: str | None = None
    eval_dtype: str | None = None
    bos: str | None = None
    trust_remote_code: bool = False
    allow_sparse: bool | None = None
    dequantise: bool | None = None
    merge_adapter: str | None = None
    weights: str | None = None
    device: str = "auto"
    stream: bool | None = None
    stream_from: str | None = None
    keep_weights: bool | None = None
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_duplicates("label", [method.label for method in self.methods])
        refuse_duplicates("pattern", [str(pattern) for pattern in self.patterns])
        refuse_duplicates("layer pattern", [glob for glob, _ in self.pattern_for])
        refuse_duplicates("seed", [str(seed) for seed in self.seeds])
        if not self.seeds or min(self.seeds) < 0 or max(self.seeds) > LARGEST_SEED:
            raise NMBenchError(
                f"seeds must be one or more numbers of at least 0 and at most {LARGEST_SEED}, not {list(self.seeds)}."
            )
        if not self.methods:
            raise NMBenchError("a run needs at least one method; give --method NAME (see `nmbench methods`).")
        for name in ("windows", "window_tokens", "pool_tokens", "selection_tokens"):
            value = getattr(self, name)
            least = 2 if name == "window_tokens" else 1
            if value is not None and value < least:
                raise NMBenchError(f"{name} must be at least {least}, not {value}.")
            if value is not None and value > LARGEST_SEED:
                raise NMBenchError(f"{name} must be at most {LARGEST_SEED}, not {value}.")
        if self.weights not in (None, INT8):
            raise NMBenchError(f"weights must be {INT8}, or left out for weights in dtype, not {self.weights!r}.")
        if self.bos not in (None, *BOS):
            raise NMBenchError(f"bos must be {', '.join(BOS[:-1])} or {BOS[-1]}, not {self.bos!r}.")
        if self.stream_from not in (None, *PLACES):
            raise NMBenchError(f"stream_from must be {' or '.join(PLACES)}, not {self.stream_from!r}.")
        if self.stream_from and self.stream is False:
            raise NMBenchError(f"--stream-from {self.stream_from} streams; leave it out, or leave --no-stream out.")

    def resolved(self, defaults: Defaults) -> ResolvedSpec:
        """Return the spec with `defaults` for open choices, and with absolute paths of plugins, valid in any folder."""
        windows = self.windows or defaults.windows
        metrics = self.metrics or defaults.metrics
        window_tokens = self.window_tokens or defaults.window_tokens
        dtype = self.dtype or defaults.dtype
        filled = {
            "patterns": self.patterns or (defaults.pattern,),
            "calibration": self.calibration or defaults.calibration,
            "windows": windows,
            "window_tokens": window_tokens,
            "pool_tokens": max(self.pool_tokens or defaults.pool_tokens, windows * window_tokens),
            "selection_tokens": self.selection_tokens or defaults.selection_tokens,
            "metrics": metrics,
            "dtype": dtype,
            "eval_dtype": self.eval_dtype or dtype,
            "bos": bos_by(metrics) if self.bos in (None, "auto") else self.bos,
            "plugins": tuple(dict.fromkeys(str(Path(file).absolute()) for file in self.plugins)),
        }
        return ResolvedSpec(**{**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **filled})

    def protocol(self) -> dict[str, Any]:
        """Return the settings that comparable rows share: model, texts, windows, dtypes and metrics.

        `bos` is one of them where BOS begins calibration windows, `merge_adapter` where an adapter is merged, and
        `weights` where they are stored in another form; elsewhere they are left out.
        """
        shared = ("model", "skip", "calibration", "windows", "window_tokens", "pool_tokens", "selection_tokens")
        content = self.to_dict()
        begun = {"bos": self.bos} if self.bos not in (None, "never") else {}
        changed = {name: content[name] for name in ("merge_adapter", "weights") if content.get(name)}
        return {**{name: content.get(name) for name in (*shared, "metrics", "dtype", "eval_dtype")}, **begun, **changed}

    def layer_patterns(self, pattern: Pattern, layers: Iterable[str]) -> dict[str, Pattern]:
        """Return the pattern of every layer: the last matching `pattern_for`, else `pattern`.

        Raises `NMBenchError` for a `pattern_for` that matches no layer.
        """
        chosen = dict.fromkeys(layers, pattern)
        for glob, special in self.pattern_for:
            matched = [name for name in chosen if matches(name, glob)]
            if not matched:
                raise NMBenchError(
                    f"--pattern-for {glob!r} matches no layer; layer names look like {next(iter(chosen), 'nothing')!r}."
                )
            chosen.update(dict.fromkeys(matched, special))
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON and TOML, without the choices that are left open."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["methods"] = {m.label: {"method": m.name, "options": dict(m.options)} for m in self.methods}
        content["patterns"] = [str(pattern) for pattern in self.patterns]
        content["pattern_for"] = {glob: str(pattern) for glob, pattern in self.pattern_for}
        for name in ("skip", "seeds", "metrics", "plugins"):
            content[name] = list(content[name])
        return {name: value for name, value in content.items() if value is not None and value not in ([], {})}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "spec") -> RunSpec:
        """Return the spec of plain data. Raises `NMBenchError` for an unknown key or a value of the wrong type."""
        check_form(content, {**typing.get_type_hints(cls), **PLAIN}, where)
        for label, method in content.get("methods", {}).items():
            check_form(method, METHOD, f"method {label!r} of {where}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        values["methods"] = tuple(
            MethodSpec(label, method.get("method", label), dict(method.get("options", {})))
            for label, method in content.get("methods", {}).items()
        )
        values["patterns"] = tuple(Pattern.parse(text) for text in content.get("patterns", ()))
        pairs = content.get("pattern_for", {}).items()
        values["pattern_for"] = tuple((glob, Pattern.parse(text)) for glob, text in pairs)
        return cls(**values)

    @property
    def digest(self) -> str:
        """The digest of the run, independent of the order of keys and of the folders of plugin files.

        The order of `pattern_for` is part of the digest, because the last match counts.
        """
        patterns = [(glob, str(pattern)) for glob, pattern in self.pattern_for]
        plugins = [Path(file).name for file in self.plugins]
        return digest({**self.to_dict(), "pattern_for": patterns, "plugins": plugins})

    @property
    def protocol_digest(self) -> str:
        """The digest of the protocol settings that comparable rows share."""
        return digest(self.protocol())


@dataclass(frozen=True, kw_only=True)
class ResolvedSpec(RunSpec):
    """One comparison with no open choice but `stream`, which the memory of the device decides.

    Lengths are in tokens, dtypes are names of torch. `pool_tokens` is at least `windows * window_tokens`,
    `bos` is always or never.
    """

    calibration: str
    windows: int
    window_tokens: int
    pool_tokens: int
    selection_tokens: int
    dtype: str
    eval_dtype: str
    bos: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and TOML, without what says nothing: `bos` where it is never and nobody asks for it."""
        content = super().to_dict()
        if self.bos == bos_by(self.metrics) == "never":
            del content["bos"]
        return content


def bos_by(metrics: Sequence[str]) -> str:
    """Return the value of `bos` that auto stands for: always if BOS begins the windows of the first metric."""
    return "always" if metrics and metrics[0].endswith(WITH_BOS) else "never"


def with_settings(methods: Sequence[MethodSpec], settings: Iterable[str]) -> tuple[MethodSpec, ...]:
    """Return the methods with `LABEL.option=value` settings. Raises `NMBenchError` for a bad form or unknown label."""
    by_label = {method.label: method for method in methods}
    for text in settings:
        match = re.fullmatch(r"(.+?)\.([A-Za-z_][A-Za-z0-9_]*)=(.*)", text, re.DOTALL)
        if match is None:
            raise NMBenchError(f"--set {text!r} is not of the form LABEL.option=value, for example maskpro.steps=500.")
        label, name, value = match.groups()
        if label not in by_label:
            raise unknown("label", label, by_label, f" in --set {text!r}")
        method = by_label[label]
        by_label[label] = dataclasses.replace(method, options={**method.options, name: value})
    return tuple(by_label.values())


def matches(name: str, glob: str) -> bool:
    """Return True if a layer name, or its end after a dot, matches a shell pattern: 'mlp.*', 'q_proj'.

    A glob without a number in brackets matches all fused experts of a parameter. A glob with a number in brackets at
    its end matches that expert; the brackets are not read as a set of characters.
    """
    glob = re.sub(r"\[(\d+)\]$", r"[[]\1]", glob)
    names = (name, re.sub(r"\[\d+\]$", "", name))
    return any(fnmatch.fnmatchcase(n, g) for n in names for g in (glob, f"*.{glob}"))
