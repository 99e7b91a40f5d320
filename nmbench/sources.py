"""Base classes of the plugin classes besides methods: model sources, data sets, metrics and reporters.

The text after the first colon of a reference (`text:novel.txt`, `ppl:wikitext2@2048`) is the `argument` of the class.
`Sampling` describes calibration text that the host samples from the dense model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, cast

from nmbench.errors import NMBenchError
from nmbench.options import build, option, resolved
from nmbench.spec import WITH_BOS

if TYPE_CHECKING:
    from nmbench.evaluation.subject import DenseSubject, Subject
    from nmbench.models.bundle import Bundle
    from nmbench.results.results import Results

SPLITS = ("calibration", "selection", "test")


@dataclass(frozen=True)
class ModelSource:
    """Loader of the models of one scheme. `dtype` is a torch dtype name, or None for the source's own choice.

    `dequantise`: the user asks to convert quantised weights to floating point; otherwise a source refuses them.
    `merge_adapter`: the folder of an adapter that is to become part of the weights, or `beside`; only a source with
    `merges_adapters` receives one.
    """

    work_method: ClassVar[str] = "load"
    merges_adapters: ClassVar[bool] = False

    dtype: str | None = None
    trust_remote_code: bool = False
    dequantise: bool = False
    merge_adapter: str | None = None

    def load(self, ref: str) -> Bundle:
        """Load the model named `ref`, the text after `scheme:`. Raises `NMBenchError` with a remedy."""
        raise NotImplementedError

    def outline(self, ref: str) -> Bundle | None:
        """Return the model without weights, on the meta device, for `--dry-run`; None if only `load` knows it."""
        return None


@dataclass(frozen=True)
class SamplingOptions:
    """Options by which windows are sampled from the dense model. Raises `NMBenchError` for one out of its bounds."""

    prompt: int = option(16, "tokens of real text that begin a sampled window", unit="tokens")
    temperature: float = option(1.0, "temperature of the draw; 0: the most likely token")
    top_p: float | None = option(None, "draw among the likeliest tokens of this share; none: among all")
    real: float = option(0.0, "share of the calibration windows that are real text")
    batch: int = option(32, "windows that are sampled at once", unit="windows")

    def __post_init__(self) -> None:
        bounds = {
            "prompt": (self.prompt >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "more than 0 and at most 1, or none"),
            "real": (0 <= self.real < 1, "at least 0 and less than 1"),
            "batch": (self.batch >= 1, "at least 1"),
        }
        for name, (holds, legal) in bounds.items():
            if not holds:
                raise NMBenchError(f"option self.{name} must be {legal}, not {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Sampling:
    """Calibration text that is sampled from the dense model: the reference of the data set `source`, and options.

    Prompts are taken from the calibration text of `source`; selection text is the real text of `source`.
    """

    source: str
    options: SamplingOptions = field(default_factory=SamplingOptions)

    @classmethod
    def parse(cls, argument: str) -> Sampling:
        """Return the sampling of the text `SOURCE` or `SOURCE@option=value,option=value`.

        Raises `NMBenchError` for an unknown option, an illegal value and a missing source.
        """
        source, at, tail = argument.rpartition("@")
        if not at or "=" not in tail:  # an @ that is part of the name of a file
            source, tail = argument, ""
        pairs = [part.partition("=") for part in tail.split(",") if part]
        if not source:
            raise NMBenchError(
                "self: needs a data set after the colon, from which prompts are taken, for example self:demo."
            )
        return cls(source, build(SamplingOptions, {name.strip(): value for name, _, value in pairs}, "self"))

    def __str__(self) -> str:
        """The argument with only the options that are not the defaults, so that equal samplings are equal texts."""
        usual = resolved(SamplingOptions())
        changed = [f"{name}={value}" for name, value in resolved(self.options).items() if value != usual[name]]
        return f"{self.source}@{','.join(changed)}" if changed else self.source


@dataclass(frozen=True)
class Dataset:
    """A collection of texts in three splits that are never mixed."""

    work_method: ClassVar[str] = "texts"

    argument: str = ""
    separator: ClassVar[str] = "\n\n"

    def texts(self, split: str) -> Iterable[str]:
        """Return the documents of one split (calibration, selection or test).

        A data set without selection texts returns none for that split; the host then holds selection windows back from
        the calibration texts.
        """
        raise NotImplementedError

    @property
    def sampling(self) -> Sampling | None:
        """The options by which the host samples calibration text from the dense model; None: the text is in `texts`."""
        return None

    def provenance(self) -> Mapping[str, Any]:
        """Return the origin of the texts for the manifest: a hub revision, a file digest."""
        return {}


class ValueRecord(TypedDict, total=False):
    """A `Value` as plain data in a record; empty optional fields are left out."""

    value: float
    stderr: float | None
    n: int
    lower_is_better: bool
    unit: str
    where: str
    detail: dict[str, float]


@dataclass(frozen=True)
class Value:
    """One figure of a metric, its standard error (None: unknown), and the number `n` of items behind it.

    `unit` is a text for users (`nats/token`). `where` is one word that the table shows beside the value, such as the
    layer of a maximum. `detail` (item -> figure) is for the record only. `about` holds further fields of the record,
    such as the version of a task.
    """

    value: float
    n: int
    stderr: float | None = None
    lower_is_better: bool = True
    unit: str = ""
    where: str = ""
    detail: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def recorded(self) -> ValueRecord:
        """Return the value as plain data."""
        record = ValueRecord(value=self.value, stderr=self.stderr, n=self.n, lower_is_better=self.lower_is_better)
        if self.unit:
            record["unit"] = self.unit
        if self.where:
            record["where"] = self.where
        if self.detail:
            record["detail"] = dict(self.detail)
        return cast(ValueRecord, {**record, **self.about})


@dataclass(frozen=True)
class Metric:
    """One measured quantity; its whole protocol is in its name, `<registered name>:<argument>`."""

    work_method: ClassVar[str] = "measure"

    argument: str = ""

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets whose test texts the metric reads; they must not overlap with calibration texts."""
        return ()

    @property
    def windows(self) -> tuple[tuple[str, int], ...]:
        """The windows of the test texts as (data set, tokens), which the host checks before any computation."""
        return ()

    @property
    def bos(self) -> bool:
        """True if a BOS token begins every window, beside the tokens of the window."""
        return False

    def provenance(self) -> Mapping[str, Any]:
        """Return what the figures depend on besides model and test texts: a digest of other data, a harness version.

        The manifest and the protocol digest include this mapping, so that rows of different content are not comparable.
        """
        return {}

    def measure(self, subject: Subject, dense: DenseSubject) -> Mapping[str, Value]:
        """Return metric name -> `Value`; every name begins with the metric's own.

        `dense` gives the losses of the dense model, and its logits batch by batch.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class WindowMetric(Metric):
    """A metric of the windows of one test text, `<word>:<data set>@<window>`; `word` is its registered name.

    With `+bos` behind the window a BOS token begins every window: the window keeps its tokens and its targets, only the
    context differs. A metric that hands `self.bos` to the subject sets `takes_bos`.

    Raises `NMBenchError` for any other form, since a figure without its window length cannot be compared, and
    for `+bos` where the metric does not take it.
    """

    word: ClassVar[str]
    takes_bos: ClassVar[bool] = False

    def __post_init__(self) -> None:
        dataset, at, window = self.without_bos.rpartition("@")
        if not at or not dataset or not (window.isascii() and window.isdigit()) or int(window) < 2:
            raise NMBenchError(
                f"metric '{self.full_name}' is not of the form {self.word}:<data set>@<window>, for example "
                f"{self.word}:wikitext2@2048: without its window length a figure says nothing."
            )
        if self.bos and not self.takes_bos:
            raise NMBenchError(
                f"metric '{self.full_name}' cannot begin windows with BOS: {self.word} does not take {WITH_BOS}; write "
                f"{self.word}:{self.without_bos}."
            )

    @property
    def full_name(self) -> str:
        return f"{self.word}:{self.argument}"

    @property
    def without_bos(self) -> str:
        """The argument of the same metric with windows as they are in the text."""
        return self.argument.removesuffix(WITH_BOS)

    @property
    def bos(self) -> bool:
        return self.argument.endswith(WITH_BOS)

    @property
    def dataset(self) -> str:
        return self.without_bos.rpartition("@")[0]

    @property
    def window(self) -> int:
        return int(self.without_bos.rpartition("@")[2])

    @property
    def datasets(self) -> tuple[str, ...]:
        return (self.dataset,)

    @property
    def windows(self) -> tuple[tuple[str, int], ...]:
        return ((self.dataset, self.window),)


class Reporter:
    """Writer of the results of one or more runs in one format."""

    work_method: ClassVar[str] = "write"

    def write(self, results: Results, directory: Path) -> Path:
        """Write a file into `directory` and return its path."""
        raise NotImplementedError

    def observer(self) -> object | None:
        """Return an object with observing hooks, which `nmbench run --track NAME` calls; None: there is none.

        Raises `NMBenchError` if it cannot work, for example without its library, before anything is computed.
        """
        return None
