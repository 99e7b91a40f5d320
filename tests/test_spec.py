"""Laws of the run specification: it survives TOML and JSON, its digest names it, bad ones are refused in one line."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError, UnknownName
from nmbench.pattern import Pattern
from nmbench.plain_data import read_toml
from nmbench.spec import Defaults, MethodSpec, RunSpec, with_settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

quick = settings(max_examples=20, deadline=None)
LAYERS = [
    f"model.layers.{block}.{part}"
    for block in range(3)
    for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]
PROTOCOL = {"model", "skip", "calibration", "windows", "window_tokens", "pool_tokens", "selection_tokens", "metrics"}
PROTOCOL |= {"dtype", "eval_dtype"}

# What a user may write

labels = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,6}", fullmatch=True).filter(lambda label: label != "dense")
option_names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True)
scalars = st.text(max_size=6) | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.floats(allow_nan=False)
patterns = st.integers(2, 32).flatmap(lambda group: st.builds(Pattern, st.integers(1, group - 1), st.just(group)))
texts = st.text(max_size=8)
lengths = st.none() | st.integers(1, 10**6)


def several(items: st.SearchStrategy, least: int = 0, unique_by=None) -> st.SearchStrategy[tuple]:
    return st.lists(items, min_size=least, max_size=3, unique_by=unique_by).map(tuple)


methods = st.builds(MethodSpec, labels, texts, st.dictionaries(option_names, scalars, max_size=3))
specs = st.builds(
    RunSpec,
    methods=several(methods, 1, lambda method: method.label),
    model=texts,
    patterns=several(patterns, 0, str),
    pattern_for=several(
        st.tuples(st.sampled_from(["mlp.*", "q_proj", "*"]) | texts, patterns), 0, lambda pair: pair[0]
    ),
    skip=several(texts),
    seeds=several(st.integers(0, 2**31), 1, str),
    **dict.fromkeys(["calibration", "dtype", "eval_dtype"], st.none() | texts),
    **dict.fromkeys(["windows", "pool_tokens", "selection_tokens"], lengths),
    window_tokens=st.none() | st.integers(2, 10**6),
    metrics=several(texts),
    trust_remote_code=st.booleans(),
    **dict.fromkeys(["allow_sparse", "dequantise", "stream"], st.none() | st.booleans()),
    device=texts,
    plugins=several(texts),
)
FIELDS = [field.name for field in dataclasses.fields(RunSpec)]


# Round trips and digests


@quick
@given(specs)
def test_toml_round_trip(spec):
    """A spec written as TOML and read again is the same spec, with the same digest."""
    again = RunSpec.from_dict(tomllib.loads(tomli_w.dumps(spec.to_dict())))
    assert (again, again.digest, again.protocol_digest) == (spec, spec.digest, spec.protocol_digest)


@quick
@given(specs)
def test_json_round_trip(spec):
    """A spec written as JSON and read again is the same spec, with the same digest."""
    again = RunSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert (again, again.digest, again.protocol_digest) == (spec, spec.digest, spec.protocol_digest)


@quick
@given(st.data(), specs)
def test_key_order_changes_no_digest(data, spec):
    """The order of keys, of methods and of their options changes neither digest."""

    def shuffled(table):
        return dict(data.draw(st.permutations(list(table.items()))))

    content = shuffled(spec.to_dict())
    content["methods"] = {
        label: {**shuffled(method), "options": shuffled(method["options"])}
        for label, method in shuffled(content["methods"]).items()
    }
    again = RunSpec.from_dict(content)
    assert (again.digest, again.protocol_digest) == (spec.digest, spec.protocol_digest)


def plain(name: str, value) -> object:
    """The value of a field, without the order of methods and the type of the container."""
    if name == "methods":
        return sorted((m.label, m.name, sorted((key, repr(v)) for key, v in m.options.items())) for m in value)
    return value


@quick
@given(specs, specs, st.sampled_from(FIELDS))
def test_other_content_has_another_digest(spec, other, name):
    """Changing any one field changes the digest, and the protocol's digest exactly if the field belongs to it."""
    changed = dataclasses.replace(spec, **{name: getattr(other, name)})
    differs = plain(name, getattr(spec, name)) != plain(name, getattr(other, name))
    assert (changed.digest != spec.digest) == differs
    assert (changed.protocol_digest != spec.protocol_digest) == (differs and name in PROTOCOL)


@quick
@given(methods, scalars, scalars)
def test_option_values_are_told_apart(method, one, other):
    """Two specs that differ in one option's value have two digests, and 1, 1.0, true and "1" are four values."""
    first, second = (RunSpec((dataclasses.replace(method, options={"x": value}),)) for value in (one, other))
    assert (first.digest == second.digest) == (repr(one) == repr(other))


def test_order_of_layer_patterns_is_content():
    """`pattern_for` in another order decides other patterns, so it has another digest; the order survives TOML."""
    pairs = (("mlp.*", Pattern(4, 8)), ("up_proj", Pattern(1, 4)))
    one, two = (RunSpec((MethodSpec.parse("wanda"),), pattern_for=order) for order in (pairs, pairs[::-1]))
    assert one.layer_patterns(Pattern(2, 4), LAYERS) != two.layer_patterns(Pattern(2, 4), LAYERS)
    assert one.digest != two.digest
    assert RunSpec.from_dict(tomllib.loads(tomli_w.dumps(two.to_dict()))) == two


@quick
@given(specs)
def test_protocol_is_what_rows_share(spec):
    """The protocol has model, texts, windows, dtypes and metrics, each as the spec has it, and nothing else."""
    protocol = spec.protocol()
    assert set(protocol) == PROTOCOL
    for name, value in protocol.items():
        kept = getattr(spec, name)
        assert value == ((list(kept) or None) if isinstance(kept, tuple) else kept)


# BOS

BEGUN, PLAIN = ("ppl:x@8+bos", "ppl:x@8"), ("ppl:x@8", "kl:x@8+bos")


@quick
@given(specs, st.sampled_from([None, "auto", "always", "never"]), st.sampled_from([BEGUN, PLAIN, ()]))
def test_bos_is_resolved_by_the_first_metric(spec, bos, metrics):
    """Unless it is always or never, BOS begins calibration windows if the first metric asks for it.

    A resolved spec survives TOML; where BOS begins nothing, protocol and digests are those of a spec without the field.
    """
    asked = dataclasses.replace(spec, bos=bos, metrics=metrics)
    found = asked.resolved(Defaults())
    assert found.bos == (bos if bos in ("always", "never") else "always" if metrics == BEGUN else "never")
    again = RunSpec.from_dict(tomllib.loads(tomli_w.dumps(found.to_dict())))
    assert again.resolved(Defaults()) == found
    assert (again.protocol(), again.digest) == (found.protocol(), found.digest)
    assert ("bos" in found.protocol()) == (found.bos == "always")
    assert ("bos" in found.to_dict()) == (found.bos == "always" or metrics == BEGUN)


def test_digests_of_runs_without_bos_stay():
    """The digests of a run without BOS are those of runs made before there was the option."""
    spec = RunSpec((MethodSpec.parse("wanda"),), metrics=("ppl:wikitext2@2048",)).resolved(Defaults())
    assert (spec.digest, spec.protocol_digest) == ("ab2d21ca60977866", "f1c71a71458a5bbc")


def test_two_texts_by_default():
    """Without metrics a run has perplexity on two texts, so that no method wins by the domain of one."""
    found = RunSpec((MethodSpec.parse("wanda"),)).resolved(Defaults())
    assert found.metrics == ("ppl:wikitext2@2048", "ppl:c4@2048")


# What is refused

GOOD = {"methods": {"wanda": {}}}
WRONG = [
    *[("methods", value) for value in ([], "wanda", ["wanda"], 3, None, {"wanda": 3}, {"wanda": "wanda"})],
    *[("methods", {"wanda": {name: value}}) for name, value in (("method", 3), ("options", "x"), ("options", [1]))],
    *[("methods", {"wanda": {"options": {"steps": value}}}) for value in ([1], {"a": 1})],
    *[
        (name, value)
        for name in ("patterns", "skip", "metrics", "plugins")
        for value in ("2:4", 3, [4], {"a": "b"}, [None])
    ],
    *[("seeds", value) for value in (3, "012", [1.5], ["0"], [True], {"a": 1}, [])],
    *[("pattern_for", value) for value in ("mlp.*=2:4", ["mlp.*=2:4"], {"mlp.*": 4}, {"mlp.*": ["2:4"]})],
    *[(name, value) for name in ("windows", "pool_tokens") for value in ("x", "8", 1.5, True, [8], {})],
    *[(name, value) for name in ("model", "device") for value in (3, None, ["demo"], True)],
    *[(name, value) for name in ("calibration", "dtype", "eval_dtype") for value in (16, ["c4"], False)],
    *[("trust_remote_code", value) for value in ("yes", 1, None, [])],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=repr)
def test_wrong_type_is_one_line(name, value):
    """A value of the wrong type is an `NMBenchError` of one line that says where it is; text is no list of letters."""
    with pytest.raises(NMBenchError) as caught:
        RunSpec.from_dict({**GOOD, name: value}, "run.toml")
    text = str(caught.value)
    assert "\n" not in text and (name in text or "wanda" in text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"windows": "x"}, "windows in run.toml must be int or none, not 'x'."),
        ({"seeds": 3}, "seeds in run.toml must be a list of int, not 3."),
        ({"methods": []}, "methods in run.toml must be a table, not []."),
        ({"pattern_for": {"a": 1}}, "pattern_for in run.toml must be a table of str, not {'a': 1}."),
        ({"methods": {"w": 1}}, "method 'w' of run.toml must be a table, not 1."),
        ({"bos": "yes"}, "bos must be auto, always or never, not 'yes'."),
        ({"bos": True}, "bos in run.toml must be str or none, not True."),
        ({"windows": 0}, "windows must be at least 1, not 0."),
        ({"seeds": [-1]}, "seeds must be one or more numbers of at least 0 and at most 9223372036854775807, not [-1]."),
        ({"seeds": [7, 7]}, "seed '7' is given twice."),
        ({"patterns": ["2:4", "1:4", "2:4"]}, "pattern '2:4' is given twice."),
        ({"methods": {}}, "a run needs at least one method; give --method NAME (see `nmbench methods`)."),
    ],
)
def test_messages(change, words):
    """The messages say what is wrong, where, and what is expected."""
    with pytest.raises(NMBenchError) as caught:
        RunSpec.from_dict({**GOOD, **change}, "run.toml")
    assert str(caught.value) == words


@pytest.mark.parametrize(
    "change",
    [
        {"patterns": ["2-4"]},
        {"patterns": ["4:2"]},
        {"patterns": ["0:4"]},
        {"pattern_for": {"mlp.*": "all"}},
        {"methods": {"dense": {}}},
        {"methods": {"a b": {"method": "wanda"}}},
        {"selection_tokens": -1},
    ],
    ids=repr,
)
def test_bad_values(change):
    """A value that has the right type but cannot be meant is an `NMBenchError` of one line."""
    with pytest.raises(NMBenchError) as caught:
        RunSpec.from_dict({**GOOD, **change})
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("2:4"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "windos"]), json_values, max_size=3), st.booleans())
def test_any_content_is_read_or_refused(content, sound):
    """Whatever a file says, it is either refused in one line or a spec that reads back as itself."""
    text, spec = "", None
    try:
        spec = RunSpec.from_dict({**content, **(GOOD if sound else {})})
    except NMBenchError as error:
        text = str(error)
    assert "\n" not in text and bool(text) == (spec is None)
    assert spec is None or RunSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize("content", [None, [], "methods", 3])
def test_content_that_is_no_table(content):
    """A file whose content is no table is refused, naming the file."""
    with pytest.raises(NMBenchError, match=r"run\.json must be a table"):
        RunSpec.from_dict(content, "run.json")


@pytest.mark.parametrize("name", FIELDS)
def test_unknown_key_names_the_nearest(name):
    """An unknown key is an error that names the file, the nearest key and all keys."""
    with pytest.raises(UnknownName) as caught:
        RunSpec.from_dict({**GOOD, f"{name}x": 1}, "run.toml")
    text = str(caught.value)
    assert text.startswith(f"unknown key '{name}x' in run.toml. Did you mean '{name}'? Known: ")
    assert text.partition("Known: ")[2].split(", ") == sorted(FIELDS)


def test_unknown_key_of_a_method():
    """An option written beside `options` instead of in it is an error, not silently dropped."""
    with pytest.raises(UnknownName, match=r"unknown key 'steps' in method 'm' of run\.toml.*Known: method, options$"):
        RunSpec.from_dict({"methods": {"m": {"method": "maskpro", "steps": 5}}}, "run.toml")
    with pytest.raises(UnknownName, match="Did you mean 'options'"):
        RunSpec.from_dict({"methods": {"m": {"option": {"steps": 5}}}})


def test_duplicates_are_refused():
    """Two methods of one label, two equal seeds and two equal globs are refused; the first with a remedy."""
    one, two = MethodSpec("a", "wanda"), MethodSpec("a", "magnitude")
    with pytest.raises(NMBenchError, match=r"label 'a' is given twice; give one of them another LABEL=NAME\."):
        RunSpec((one, two))
    with pytest.raises(NMBenchError, match=r"layer pattern 'mlp' is given twice\."):
        RunSpec((one,), pattern_for=(("mlp", Pattern(2, 4)), ("mlp", Pattern(4, 8))))


def test_name_of_a_method_defaults_to_its_label():
    """A method table without `method` means the method of that name."""
    spec = RunSpec.from_dict({"methods": {"wanda": {}, "mine": {"method": "wanda", "options": {"x": 1}}}})
    assert spec.methods == (MethodSpec("wanda", "wanda"), MethodSpec("mine", "wanda", {"x": 1}))


# Methods and settings


@quick
@given(labels, texts)
def test_parse_method(label, name):
    """`LABEL=NAME` gives both, `NAME` is its own label."""
    assert MethodSpec.parse(f"{label}={name}") == MethodSpec(label, name, {})
    assert MethodSpec.parse(label) == MethodSpec(label, label, {})


@pytest.mark.parametrize(
    "text", ["", "=wanda", "dense", "dense=wanda", "a b", "a@init", "-a", ".a=wanda", "a/b=c", "a\n"]
)
def test_illegal_label(text):
    """A label that could not name files, or that is the reference row's, is refused."""
    with pytest.raises(NMBenchError, match=r"label .* is not legal"):
        MethodSpec.parse(text)


@quick
@given(st.lists(methods, min_size=1, max_size=4, unique_by=lambda m: m.label), st.data())
def test_settings_reach_their_label(given_methods, data):
    """Each `LABEL.option=value` sets that option of that label as text, the last one wins, nothing else changes."""
    wanted = {m.label: dict(m.options) for m in given_methods}
    given_settings = []
    for _ in range(data.draw(st.integers(0, 4))):
        label, name, value = data.draw(st.sampled_from(list(wanted))), data.draw(option_names), data.draw(texts)
        given_settings.append(f"{label}.{name}={value}")
        wanted[label][name] = value
    changed = with_settings(given_methods, given_settings)
    assert [(m.label, m.name, m.options) for m in changed] == [
        (m.label, m.name, wanted[m.label]) for m in given_methods
    ]


@pytest.mark.parametrize("text", ["", "steps=5", "maskpro.steps", "maskpro.=5", ".steps=5", "maskpro.1x=5", "maskpro"])
def test_setting_of_another_form(text):
    """A setting that is not LABEL.option=value is refused with the form expected."""
    with pytest.raises(NMBenchError, match=r"is not of the form LABEL\.option=value"):
        with_settings([MethodSpec.parse("maskpro")], [text])


def test_setting_of_an_unknown_label():
    """A setting for a label that is not in the run names the nearest label, and all labels."""
    given_methods = [MethodSpec.parse("maskpro"), MethodSpec.parse("mine=wanda")]
    with pytest.raises(UnknownName) as caught:
        with_settings(given_methods, ["wanda.steps=5"])
    assert str(caught.value) == "unknown label 'wanda' in --set 'wanda.steps=5'. Known: maskpro, mine"
    with pytest.raises(UnknownName, match=r"'maskpr' .* Did you mean 'maskpro'\? Known: maskpro, mine"):
        with_settings(given_methods, ["maskpr.steps=5"])


@pytest.mark.parametrize(
    ("text", "label", "option", "value"),
    [
        ("a.x=b.y=c", "a", "x", "b.y=c"),
        ("v1.5.steps=3", "v1.5", "steps", "3"),
        ("a.x=", "a", "x", ""),
        ("a.x=one\ntwo", "a", "x", "one\ntwo"),
    ],
)
def test_setting_with_dots_and_equals_signs(text, label, option, value):
    """Dots in labels, and dots, equals signs and line breaks in values are taken as they are."""
    (method,) = with_settings([MethodSpec.parse(label)], [text])
    assert method.options == {option: value}


# Layers and defaults


def matching(name: str, glob: str) -> bool:
    """True if the glob is the whole name or its end after a dot."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[i:]), glob) for i in range(len(parts)))


globs = st.sampled_from(
    ["mlp.*", "q_proj", "layers.1.*", "*", "model.layers.0.*", "up_proj", "*_proj", "proj", "MLP.*", "mlp"]
)


@quick
@given(patterns, several(st.tuples(globs, patterns), 0, lambda pair: pair[0]))
def test_last_match_decides_a_layer(pattern, pairs):
    """Every layer has the pattern of the last glob that matches the end of its name; a glob for nothing is refused."""
    spec = RunSpec((MethodSpec.parse("wanda"),), pattern_for=pairs)
    useless = [glob for glob, _ in pairs if not any(matching(name, glob) for name in LAYERS)]
    if useless:
        with pytest.raises(NMBenchError) as caught:
            spec.layer_patterns(pattern, LAYERS)
        assert f"--pattern-for {useless[0]!r} matches no layer" in str(caught.value) and LAYERS[0] in str(caught.value)
    else:
        wanted = {name: [pattern, *(p for glob, p in pairs if matching(name, glob))][-1] for name in LAYERS}
        assert spec.layer_patterns(pattern, LAYERS) == wanted


def test_layer_patterns_without_layers():
    """Where no layer is left, a glob for some is an error like any other."""
    spec = RunSpec((MethodSpec.parse("wanda"),), pattern_for=(("mlp.*", Pattern(4, 8)),))
    with pytest.raises(NMBenchError, match="matches no layer"):
        spec.layer_patterns(Pattern(2, 4), [])
    assert RunSpec((MethodSpec.parse("wanda"),)).layer_patterns(Pattern(2, 4), []) == {}


defaults = st.builds(
    Defaults,
    pattern=patterns,
    calibration=st.sampled_from(["c4", "text:a.txt"]),
    metrics=several(texts, 1),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    **dict.fromkeys(["windows", "pool_tokens", "selection_tokens"], st.integers(1, 10**6)),
    window_tokens=st.integers(2, 10**6),
)


@quick
@given(specs, defaults)
def test_defaults_fill_only_what_is_open(spec, suggested):
    """Choices of the user stay, all others come from the model source; resolving again changes nothing."""
    done = spec.resolved(suggested)
    for name in ("windows", "window_tokens", "selection_tokens", "metrics", "calibration", "dtype"):
        assert getattr(done, name) == (getattr(spec, name) or getattr(suggested, name))
    assert done.patterns == (spec.patterns or (suggested.pattern,))
    assert done.eval_dtype == (spec.eval_dtype or done.dtype)
    for name in ("methods", "model", "pattern_for", "skip", "seeds", "device", "trust_remote_code"):
        assert getattr(done, name) == getattr(spec, name)
    assert {*done.plugins} == {str(Path(file).absolute()) for file in spec.plugins}
    assert done.digest == dataclasses.replace(done, plugins=tuple(Path(file).name for file in done.plugins)).digest
    assert done.resolved(Defaults()) == done


@quick
@given(specs, defaults)
def test_pool_holds_the_windows(spec, suggested):
    """The pool is as long as asked for, but never shorter than the windows of the statistics."""
    done = spec.resolved(suggested)
    asked = spec.pool_tokens or suggested.pool_tokens
    assert done.pool_tokens >= done.windows * done.window_tokens
    assert done.pool_tokens in (asked, done.windows * done.window_tokens) and done.pool_tokens >= asked


# Files


def test_read_toml(tmp_path):
    """A TOML file in UTF-8 is read as plain data."""
    file = tmp_path / "run.toml"
    file.write_text('model = "größe"\nseeds = [0, 1]\n[methods.wanda]\n', encoding="utf-8")
    assert read_toml(file) == {"model": "größe", "seeds": [0, 1], "methods": {"wanda": {}}}


@pytest.mark.parametrize("content", [None, b"seeds = [", b"a = 1\na = 2", b"model = '\xff'"])
def test_file_that_is_no_toml(tmp_path, content):
    """A file that is missing, not TOML or not UTF-8 is an error of one line that names it."""
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(NMBenchError) as caught:
        read_toml(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_spec_needs_no_torch():
    """The specification is read without torch, transformers, numpy or pandas."""
    code = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'numpy', 'pandas'])); "
    code += "from nmbench import MethodSpec, RunSpec, Pattern; print(RunSpec((MethodSpec.parse('wanda'),)).digest)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == RunSpec((MethodSpec.parse("wanda"),)).digest, done.stderr
