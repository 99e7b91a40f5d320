"""Laws of the doubt about BOS: it is measured on the dense model, and it names the metric to measure."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

import nmbench
from nmbench.errors import NMBenchError
from nmbench.experiment.bos import CLEAR_NATS, bos_doubts, check_bos
from nmbench.experiment.plan import checked
from nmbench.experiment.setup import prepared
from nmbench.plugins.loading import load_plugins
from nmbench.spec import MethodSpec, RunSpec
from nmbench_plugins.perplexity import Perplexity
from nmbench_plugins.tiny import BOS, TinyModel

WINDOW = 16


@dataclass(frozen=True)
class Tokens:
    """A tokenizer of characters, with BOS or without; `adds` says whether it puts BOS before a text."""

    bos_token_id: int | None = BOS
    adds: bool = False

    def __call__(self, text, verbose):
        return {"input_ids": [self.bos_token_id] * self.adds + [ord(letter) for letter in text]}


class Sure(nn.Module):
    """A model that gives the next token of the text `x y x y ...`, if BOS begins it, `gain` more logits."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache):
        begun = (input_ids[:, :1] == BOS).float()[..., None]
        following = torch.where(input_ids == ord("x"), ord("y"), ord("x"))
        logits = nn.functional.one_hot(following, BOS + 1).float() * (4 + self.gain * begun)
        return SimpleNamespace(logits=logits)


def doubts(gain=0.0, adds=False, bos=BOS, names=(f"toy@{WINDOW}",), context=None, length=20 * WINDOW):
    bundle = SimpleNamespace(ref="toy", model=Sure(gain), tokenizer=Tokens(bos, adds), device=torch.device("cpu"))
    text = torch.tensor([ord("x"), ord("y")]).repeat(length // 2)
    return bos_doubts(bundle, {f"ppl:{name}": Perplexity(name) for name in names}, {"toy": text}, context)


def test_a_clear_fall_is_said():
    """A dense loss that falls clearly with BOS is a doubt with the fall, and with the name to measure."""
    (doubt,) = doubts(gain=1.0)
    assert doubt.subject == "BOS"
    assert doubt.text.startswith("no BOS begins the windows of ppl:toy@16; with it the dense loss falls by ")
    assert doubt.text.endswith("nats (mean of 8 windows); measure ppl:toy@16+bos.")


@pytest.mark.parametrize(("gain", "adds", "said"), [(0, False, 0), (0, True, 1), (-1, True, 0), (-1, False, 0)])
def test_a_tokenizer_that_adds_bos(gain, adds, said):
    """A tokenizer that adds BOS is a doubt, unless the loss clearly rises with it; without a change nothing else is."""
    found = doubts(gain=float(gain), adds=adds)
    assert len(found) == said
    assert all(
        "the tokenizer begins every text with BOS; with it the dense loss falls by 0.000" in d.text for d in found
    )


@pytest.mark.parametrize("share", [0.8, 1.25])
def test_threshold(share):
    """The threshold is a fall of 0.05 nats per token."""
    low, high = 0.0, 2.0
    for _ in range(30):  # the gain that gives the fall asked for
        gain = (low + high) / 2
        falls = nn.functional.cross_entropy
        logits = torch.zeros(2, BOS + 1)
        logits[:, 0] = torch.tensor([4.0, 4.0 + gain])
        before, after = falls(logits, torch.zeros(2, dtype=torch.long), reduction="none")
        low, high = (gain, high) if before - after < share * CLEAR_NATS else (low, gain)
    assert len(doubts(gain=gain)) == (share > 1)


def test_no_bos_no_doubt():
    """Without a BOS token, or with one that the model does not embed, nothing is measured."""
    assert doubts(gain=1.0, bos=None) == ()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("toy@16", "toy@16+bos"), []),
        (("toy@16+bos",), []),
        (("toy@16", "toy@32"), ["toy@16+bos", "toy@32+bos"]),
        (("toy@32+bos", "toy@16"), ["toy@16+bos"]),
    ],
)
def test_who_asks_for_bos_is_not_told(names, said):
    """A text and window that a metric measures with BOS is no doubt; every other one is said once."""
    assert [doubt.text.rpartition("measure ppl:")[2] for doubt in doubts(gain=1.0, names=names)] == [
        f"{name}." for name in said
    ]


def test_suggestion_fits_the_context():
    """Where BOS does not fit beside the window, the suggested window is one token shorter."""
    (doubt,) = doubts(gain=1.0, context=WINDOW)
    assert doubt.text.endswith(f"measure ppl:toy@{WINDOW - 1}+bos.")


def test_short_text():
    """A text of one window is measured by it; a first window that begins with BOS is left out."""
    (doubt,) = doubts(gain=1.0, length=WINDOW)
    assert "(mean of 1 windows)" in doubt.text


# Through the host


@functools.cache
def plugins():
    return load_plugins()


def setup(texts, **fields):
    fields = {"metrics": (f"ppl:text:{texts}/test.txt@64",), **fields}
    spec = RunSpec(
        (MethodSpec.parse("magnitude"),), "tiny:llama", calibration=f"text:{texts}/cal.txt", windows=2, **fields
    )
    return prepared(checked(spec, plugins()))


def test_calibration_follows_the_first_metric(texts):
    """`auto` begins calibration windows with BOS if the first metric does; the protocol says so, else nothing."""
    plain, test = setup(texts), f"ppl:text:{texts}/test.txt@64"
    begun = setup(texts, metrics=(f"{test}+bos", test))
    assert (plain.spec.bos, begun.spec.bos) == ("never", "always")
    assert "bos" not in plain.spec.protocol() | plain.spec.to_dict()
    assert begun.spec.protocol()["bos"] == begun.spec.to_dict()["bos"] == "always"
    windows = begun.pools[0].calibration
    assert windows.shape == plain.pools[0].calibration.shape
    assert (windows[:, 0] == BOS).all()
    assert not (plain.pools[0].calibration == BOS).all(1).any()
    assert not begun.doubts
    assert [str(doubt).partition(";")[0] for doubt in plain.doubts] == [f"BOS: no BOS begins the windows of {test}"]


def test_option_overrules_the_metric(texts):
    """`always` and `never` do not ask the metrics, and are kept where they say something else."""
    test = f"ppl:text:{texts}/test.txt@64"
    always, never = setup(texts, bos="always"), setup(texts, bos="never", metrics=(f"{test}+bos",))
    assert (always.pools[0].bos, never.pools[0].bos) == (True, False)
    assert RunSpec.from_dict(never.spec.to_dict()).resolved(never.bundle.defaults) == never.spec
    assert "bos" not in never.spec.protocol()
    assert always.protocol_digest != setup(texts).protocol_digest


def test_context_holds_window_and_bos(texts):
    """BOS needs a token of the context beside the window."""
    setup(texts, metrics=(f"ppl:text:{texts}/test.txt@511+bos",))
    with pytest.raises(NMBenchError, match=r"@512\+bos is longer than the 512 tokens"):
        setup(texts, metrics=(f"ppl:text:{texts}/test.txt@512+bos",))


@pytest.mark.parametrize(
    ("token", "said"), [(None, "has no BOS token; leave"), (999, "is token 999, and .* embeds 257")]
)
def test_bos_that_is_none_is_refused(token, said):
    """`+bos` needs a BOS token that the model embeds."""
    bundle = TinyModel().load("llama")
    bundle.tokenizer = Tokens(token)
    with pytest.raises(NMBenchError, match=f"metric ppl:x@8.bos asks for windows that begin with BOS.*{said}"):
        check_bos(bundle, "metric ppl:x@8+bos")


def test_metric_must_take_bos():
    """A window metric that does not hand `bos` on is refused with `+bos`: it would measure something else."""

    @dataclass(frozen=True)
    class Mine(nmbench.WindowMetric):
        word: ClassVar[str] = "mine"

    assert Mine("x@8").windows == (("x", 8),)
    with pytest.raises(NMBenchError, match=r"'mine:x@8\+bos' cannot begin windows with BOS: .*; write mine:x@8\."):
        Mine("x@8+bos")
    for wrong in ("x@8+", "x@8+BOS", "x@+bos", "+bos", "x@1+bos", "x@8+bos+bos"):
        with pytest.raises(NMBenchError, match="is not of the form ppl:<data set>@<window>"):
            Perplexity(wrong)
