"""Laws of jobs: a digest covers everything that decides a row, also the start of a method."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nmbench.errors import NMBenchError
from nmbench.experiment.contenders import Contender, contenders, lineage
from nmbench.experiment.jobs import jobs
from nmbench.experiment.plan import checked
from nmbench.methods import MaskLearner, Refiner
from nmbench.pattern import Pattern
from nmbench.plugins.loading import load_plugins
from nmbench.spec import MethodSpec, RunSpec


def built(*methods: MethodSpec) -> tuple[RunSpec, list[Contender]]:
    spec = RunSpec(methods)
    return spec, contenders(spec, load_plugins())


def test_only_the_start_of_a_learner_has_a_row():
    """A learner's initial method comes before it as a contender; that of a refiner stays inside it."""
    asked = MethodSpec("a", "maskpro", {"init": "swaps"}), MethodSpec("b", "swaps"), MethodSpec("c", "wanda")
    _, found = built(*asked)
    assert [contender.label for contender in found] == ["a@init", "a", "b", "c"]
    assert [contender.name for contender in lineage(found[1])] == ["maskpro", "swaps", "wanda"]
    assert found[1].init is found[0]
    assert isinstance(found[1].method, MaskLearner) and isinstance(found[0].method, Refiner)


def test_a_learner_may_start_from_another_row():
    """A learner named by its label is done first, wherever it stands, and has no second row; of a one-shot method
    named like that the options count, and the mask alone.
    """
    asked = (
        MethodSpec("third", "maskpro", {"init": "second"}),
        MethodSpec("second", "swaps-judged", {"init": "first"}),
        MethodSpec("first", "sparsegpt", {"damping": 0.5}),
    )
    _, found = built(*asked)
    assert [contender.label for contender in found] == ["second@init", "second", "third", "first"]
    assert found[2].init is found[1] and found[1].init is found[0]
    assert found[0].options == {**found[3].options, "mask_only": True} and found[0].options["damping"] == 0.5
    _, again = built(*asked[1:], asked[0])
    assert {one.label: one for one in again} == {one.label: one for one in found}


def test_a_label_of_the_command_comes_first():
    """`init` names the row of the command, with its options, before a registered method of that name."""
    learner, tuned = (
        MethodSpec("a", "maskpro", {"init": "sparsegpt"}),
        MethodSpec("sparsegpt", "sparsegpt", {"damping": 0.5}),
    )
    assert built(learner)[1][0].options["damping"] != 0.5
    assert built(learner, tuned)[1][0].options["damping"] == 0.5
    refined = MethodSpec("swaps", "swaps", {"init": "sparsegpt"})
    (found, _) = built(refined, tuned)[1]
    assert found.init.options["damping"] == 0.5
    _, found = built(MethodSpec("wanda", "maskpro"), MethodSpec("maskpro", "maskpro"))
    assert [one.label for one in found] == ["wanda@init", "wanda", "maskpro"]
    assert found[2].init is found[1] and found[0].name == "wanda"


@pytest.mark.parametrize(("tuned", "doubts"), [({"damping": 0.5}, 1), ({}, 0)])
def test_a_hidden_method_is_a_doubt(tuned, doubts):
    """A start that is not the registered method with its defaults is named, with the options; an equal one is not."""
    methods = MethodSpec("a", "maskpro", {"init": "sparsegpt"}), MethodSpec("sparsegpt", "sparsegpt", tuned)
    found = list(checked(RunSpec(methods), load_plugins()).doubts)
    assert len(found) == doubts
    if doubts:
        assert str(found[0]) == "init=sparsegpt: a begins with the row of this command: sparsegpt, damping=0.5"


@pytest.mark.parametrize("circle", [{"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}])
def test_no_learner_starts_from_itself(circle):
    """Learners that start from each other are refused, whoever else starts from them."""
    with pytest.raises(NMBenchError, match=r"own mask \(.*b -> .*\); give one of them another init"):
        built(*(MethodSpec(label, "maskpro", {"init": init}) for label, init in circle.items()))


def test_digests_cover_what_a_method_starts_from():
    """Options of the initial method, and of the one below it, change the digest of the job."""
    spec, found = built(MethodSpec("a", "maskpro", {"init": "swaps"}), MethodSpec("b", "swaps", {"init": "sparsegpt"}))
    digests = set()
    for contender in found:
        for depth, member in enumerate(lineage(contender)):
            for name in member.options:
                other = with_option(contender, depth, name)
                digests |= digests_of(spec, other)
        digests |= digests_of(spec, contender)
    members = [member for contender in found for member in lineage(contender)]
    assert len(digests) == 2 * (len(found) + sum(len(member.options) for member in members))  # with label and without


def digests_of(spec: RunSpec, contender: Contender) -> set[str]:
    (job,) = jobs(replace(spec, patterns=(Pattern(2, 4),)), [contender], "protocol")
    return {job.digest, job.work}


def test_work_is_named_without_its_label():
    """Two labels of one method and its options name the same work in different jobs; other options are other work."""
    spec, found = built(*(MethodSpec(label, "wanda") for label in "ab"), MethodSpec("c", "swaps", {"sweeps": "1"}))
    first, second, other = jobs(replace(spec, patterns=(Pattern(2, 4),)), found, "protocol")
    assert first.work == second.work != other.work
    assert first.digest != second.digest


def with_option(contender: Contender, depth: int, name: str) -> Contender:
    """The same contender with another value of an option, `depth` steps down its lineage."""
    if depth:
        assert contender.init
        return replace(contender, init=with_option(contender.init, depth - 1, name))
    return replace(contender, options={**contender.options, name: "another"})
