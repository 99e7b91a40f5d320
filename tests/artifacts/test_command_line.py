"""The command line of a specification parses to the same specification."""

import shlex

from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.artifacts.command_line import command_of, text
from nmbench.cli.run import run as run_command
from nmbench.cli.run import runs_from
from nmbench.pattern import Pattern
from nmbench.spec import MethodSpec, RunSpec

quick = settings(max_examples=36, deadline=None)
words = st.text(alphabet="abc xyz'\"$*.-/\\é", min_size=1, max_size=8)
option_values = st.one_of(st.integers(0, 99), st.booleans(), st.floats(0, 1e6), words)


@st.composite
def specs(draw):
    """A specification with any of its fields set."""
    labels = draw(st.lists(st.sampled_from(["wanda", "a", "b.2", "long-one"]), min_size=1, unique=True))
    options = st.dictionaries(st.sampled_from(["steps", "mask_only", "path"]), option_values, max_size=3)
    return RunSpec(
        methods=tuple(MethodSpec(label, draw(st.sampled_from([label, "wanda"])), draw(options)) for label in labels),
        model=draw(st.sampled_from(["demo", "hf:org/name@main", "./my model"])),
        patterns=draw(st.sampled_from([(), (Pattern(2, 4),), (Pattern(2, 4), Pattern(1, 8))])),
        pattern_for=draw(st.sampled_from([(), (("mlp.*", Pattern(4, 8)), ("q_proj", Pattern(1, 4)))])),
        skip=draw(st.sampled_from([(), ("q_proj", "layers.0.*")])),
        seeds=draw(st.sampled_from([(0,), (3, 1)])),
        windows=draw(st.sampled_from([None, 4])),
        calibration=draw(st.sampled_from([None, "text:a b.txt"])),
        metrics=draw(st.sampled_from([(), ("ppl:demo@256",)])),
        dtype=draw(st.sampled_from([None, "bfloat16"])),
        bos=draw(st.sampled_from([None, "auto", "always", "never"])),
        merge_adapter=draw(st.sampled_from([None, "beside", "my adapter"])),
        weights=draw(st.sampled_from([None, "int8"])),
        trust_remote_code=draw(st.booleans()),
        stream=draw(st.sampled_from([None, True, False])),
        **{name: draw(st.sampled_from([None, True])) for name in ("allow_sparse", "dequantise")},
        plugins=draw(st.sampled_from([(), ("mine.py",)])),
    )


OTHERS = ("config", "out", "quiet", "jobs", "dry_run", "fail_fast")  # flags that are not of the specification


@quick
@given(specs())
def test_command_round_trip(spec):
    """The command, parsed by the command line, gives the same specification, with options as text."""
    program, run, *arguments = shlex.split(command_of(spec))
    assert (program, run) == ("nmbench", "run")
    with run_command.make_context("run", arguments) as context:
        flags = {name: value for name, value in context.params.items() if name not in OTHERS}
    again = runs_from({}, flags, "the flags")[0].spec
    expected = spec.to_dict()
    for content in (made := again.to_dict(), expected):
        content["methods"] = {
            label: (method["method"], {name: text(value) for name, value in method["options"].items()})
            for label, method in content["methods"].items()
        }
    assert made == expected
    assert list(again.pattern_for) == list(spec.pattern_for)
