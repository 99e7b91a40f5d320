"""Laws of options: text and values are read alike, explicit ones beat a preset, errors name label.option."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Optional, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError, UnknownName
from nmbench.options import OptionInfo, build, check_least, describe, option, resolved

quick = settings(max_examples=60, deadline=None)
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Learner:
    """One option of every type."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"steps": 10_000, "rate": 50.0, "order": "fixed"},
        "quick": {"steps": 10},
    }
    steps: int = option(500, "number of updates", unit="steps")
    rate: float = option(1.0, "step size")
    shuffle: bool = option(True, "draw at random")
    init: str = option("wanda", "where to start")
    order: str = option("random", "order of windows", choices=("random", "fixed"))
    windows: int | None = option(None, "pool size", unit="windows")
    limit: Optional[float] = option(None, "upper bound")  # noqa: UP045 (the old spelling must work too)
    where: Union[int, str] = option("all", "a block or all")  # noqa: UP007
    level: int | None = option(None, "level", choices=(1, 2))


@dataclass(frozen=True)
class Plain:
    """No presets at all."""

    steps: int = option(3, "number of updates")


def one(name: str, value: Any) -> Any:
    """The value that option `name` gets."""
    return getattr(build(Learner, {name: value}, "mine"), name)


def same(got: Any, expected: Any) -> bool:
    return type(got) is type(expected) and got == expected


# Reading


@quick
@given(st.integers())
def test_int_from_text_or_value(number):
    """An int option takes an int and its text; an optional one likewise."""
    for name in ("steps", "windows"):
        assert same(one(name, number), number) and same(one(name, str(number)), number)


@quick
@given(st.integers(-(2**50), 2**50))
def test_int_from_whole_float(number):
    """A float that is whole is an int, as JSON and TOML write it."""
    assert same(one("steps", float(number)), number)


@quick
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_float_from_text_or_value(number):
    """A float option takes a float and its text, to the last digit."""
    assert same(one("rate", number), number) and same(one("rate", repr(number)), number)
    assert math.copysign(1, one("rate", repr(number))) == math.copysign(1, number)


@quick
@given(st.integers(-(2**53), 2**53))
def test_float_from_int(number):
    """A float option takes an int and stores a float."""
    assert same(one("rate", number), float(number)) and same(one("limit", str(number)), float(number))


@quick
@given(st.text())
def test_text_is_taken_as_it_is(text):
    """A text option keeps its text, even one in the form of a number."""
    assert same(one("init", text), text)


@quick
@given(
    st.sampled_from([*WORDS, "", "2", "maybe", "truee", "y", "none"]),
    st.sampled_from([str.lower, str.upper, str.title]),
)
def test_bool_words(word, spelt):
    """A bool option takes true/false, yes/no, on/off and 1/0 in any case, and no other word."""
    if word in WORDS:
        assert one("shuffle", spelt(word)) is WORDS[word]
    else:
        with pytest.raises(NMBenchError, match=r"^option mine\.shuffle must be bool"):
            one("shuffle", spelt(word))


@pytest.mark.parametrize("name", ["windows", "limit", "level"])
@pytest.mark.parametrize("text", [None, "none", "None", "NONE", ""])
def test_optional_takes_none(name, text):
    """An optional option takes None and the word none, also where its choices do not list it."""
    assert one(name, text) is None


@pytest.mark.parametrize(("given", "read"), [("7", 7), (7, 7), ("all", "all"), ("7.5", "7.5")])
def test_union_takes_the_first_type_that_fits(given, read):
    """An option of several types is read as the first of them that fits."""
    assert same(one("where", given), read)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("steps", value) for value in ("many", "1.5", 1.5, "", "1e3", True, None, [], [1], {}, math.inf, math.nan)],
        *[("rate", value) for value in ("fast", "", True, None, [], math.nan, "nan", 10**400, "1,5")],
        *[("shuffle", value) for value in (1, 0, None, 2.0, [], "2")],
        *[("init", value) for value in (1, None, True, ["wanda"], b"wanda")],
        *[("windows", value) for value in ("few", 1.5, False, [])],
        *[("where", value) for value in (None, [], 1.5, True)],
        ("order", "sorted"),
        ("order", 1),
        ("level", 3),
        ("level", "high"),
    ],
)
def test_wrong_value_names_label_and_option(name, value):
    """A value of the wrong type or outside the choices is one line that names label.option and the value."""
    with pytest.raises(NMBenchError) as caught:
        build(Learner, {name: value}, "mine")
    text = str(caught.value)
    assert text.startswith(f"option mine.{name} must be ") and repr(value) in text and "\n" not in text


def test_message_says_type_and_help():
    """The error for a wrong type gives the type that is expected and the help text; for a wrong choice the choices."""
    with pytest.raises(NMBenchError, match=r"mine\.windows must be int or none, not 'few' \(pool size\)"):
        one("windows", "few")
    with pytest.raises(NMBenchError, match=r"mine\.order must be one of random, fixed, not 'sorted'"):
        one("order", "sorted")


@quick
@given(
    st.sampled_from([item.name for item in fields(Learner)]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
)
def test_any_value_is_read_or_refused(name, value):
    """Any value is read as the option's type or refused with an `NMBenchError`."""
    types = {"steps": int, "rate": float, "shuffle": bool, "init": str, "order": str, "where": (int, str)}
    try:
        got = one(name, value)
    except NMBenchError:
        return
    assert isinstance(got, types.get(name, (int, float, type(None))))
    assert name == "shuffle" or not isinstance(got, bool)


# Presets and names


@quick
@given(
    st.sampled_from([None, "paper", "quick"]),
    st.fixed_dictionaries({}, optional={"steps": st.integers(), "rate": st.floats(-9, 9), "shuffle": st.booleans()}),
    st.booleans(),
)
def test_explicit_beats_preset_beats_default(preset, explicit, first):
    """An option has its explicit value, else the preset's, else its default, in whatever order they are given."""
    named = {} if preset is None else {"preset": preset}
    given = {**named, **explicit} if first else {**explicit, **named}
    defaults = {info.name: info.default for info in describe(Learner)}
    assert resolved(build(Learner, given, "mine")) == {**defaults, **Learner.presets.get(preset, {}), **explicit}


@pytest.mark.parametrize("preset", ["papr", "PAPERS", 3, ["paper"], {}])
def test_unknown_preset(preset):
    """A preset that does not exist is an error that names the label and the presets there are."""
    with pytest.raises(UnknownName, match=r"unknown preset .* of mine\..* Known: paper, quick"):
        build(Learner, {"preset": preset}, "mine")


def test_unknown_option_suggests_the_nearest():
    """An unknown option is an error with the label, the nearest option and all options, `preset` among them."""
    with pytest.raises(UnknownName, match=r"unknown option 'step' of mine\. Did you mean 'steps'\? Known: .*preset"):
        build(Learner, {"step": 5}, "mine")
    with pytest.raises(UnknownName, match=r"unknown option 'step' of mine\. Did you mean 'steps'\? Known: steps$"):
        build(Plain, {"step": 5}, "mine")
    with pytest.raises(UnknownName, match="unknown preset 'paper' of mine"):
        build(Plain, {"preset": "paper"}, "mine")


def test_preset_with_an_unknown_option_is_refused():
    """A preset is checked as explicit options are."""

    @dataclass(frozen=True)
    class Odd(Plain):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"bad": {"stepz": 1}, "worse": {"steps": "many"}}

    with pytest.raises(UnknownName, match="unknown option 'stepz' of mine"):
        build(Odd, {"preset": "bad"}, "mine")
    with pytest.raises(NMBenchError, match=r"mine\.steps must be int"):
        build(Odd, {"preset": "worse"}, "mine")


# Description


def test_describe_lists_every_option():
    """`describe` gives name, type, default, help, unit and choices of every option, in the order of declaration."""
    infos = describe(Learner)
    assert [info.name for info in infos] == [item.name for item in fields(Learner)]
    assert infos[0] == OptionInfo("steps", "int", 500, "number of updates", "steps", ())
    assert infos[4] == OptionInfo("order", "str", "random", "order of windows", "", ("random", "fixed"))
    types = [info.type for info in infos]
    assert types == ["int", "float", "bool", "str", "str", "int or none", "float or none", "int or str", "int or none"]


def test_describe_plain_fields():
    """A field declared without `option` is an option without help, and inherited ones come first."""

    @dataclass(frozen=True)
    class More(Plain):
        depth: int = 2
        extra: str = field(default_factory=str)

    assert [(info.name, info.default, info.help) for info in describe(More)] == [
        ("steps", 3, "number of updates"),
        ("depth", 2, ""),
        ("extra", None, ""),
    ]


def test_defaults_survive_their_own_text():
    """Every default is read back from the text in which it is shown, so that the listing can be pasted."""
    for info in describe(Learner):
        shown = "none" if info.default is None else str(info.default)
        assert same(one(info.name, shown), info.default)


@pytest.mark.parametrize("value", ["inf", "-inf", "1e400", math.inf])
def test_infinite_options_are_refused(value):
    """An infinite number is refused: no record could hold it."""

    @dataclass(frozen=True)
    class Method:
        rate: float = option(1.0, "step size")

    with pytest.raises(NMBenchError, match=r"option m.rate must be a finite number, not .*\(step size\)"):
        build(Method, {"rate": value}, "m")


def test_least_values():
    """An option below its least value, or NaN, is named with what it must be; None is no value."""
    least = {"steps": 1, "rate": 0.5, "windows": 2}
    check_least(Learner(rate=0.5), "mine", least)
    for options, text in (
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"rate": math.nan}, "rate must be at least"),
    ):
        with pytest.raises(NMBenchError, match=f"option mine.{text}"):
            check_least(Learner(**options), "mine", least)
