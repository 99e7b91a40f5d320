"""Laws of the registries: legal names, one owner per name, clean roll-back, helpful errors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError, UnknownName
from nmbench.plugins.registry import Registries, Registry

FIRST = "abcdefghijklmnopqrstuvwxyz"
NAMES = st.builds(str.__add__, st.sampled_from(FIRST), st.text(FIRST + "0123456789_.+-", max_size=8))
ORIGINS = st.sampled_from(["acme 1.0 [acme]", "acme 1.0 [other]", "file mine.py"])
quick = settings(max_examples=60, deadline=None)


def legal(name: str) -> bool:
    """The rule as the error states it, written out letter by letter."""
    return name[:1] in set(FIRST) and set(name) <= {*FIRST, *"0123456789_.+-"}


@quick
@given(st.dictionaries(NAMES, st.tuples(st.integers(), ORIGINS)))
def test_what_is_registered_is_found(content):
    """Every legal name gives back its object and origin; iteration is in the order of names."""
    registry = Registry("method")
    for name, (obj, origin) in content.items():
        registry.register(name, obj, origin)
    assert {name: registry.get(name) for name in content} == {name: obj for name, (obj, _) in content.items()}
    found = [(entry.name, entry.obj, entry.origin) for entry in registry]
    assert found == [(name, *content[name]) for name in sorted(content)]


@quick
@given(
    NAMES | st.text(max_size=5) | st.sampled_from(["Acme", "ACME", "1st", "-x", "a b", "a:b", "a@b", "a\n", "ä", ""])
)
def test_legal_names(name):
    """A name is a lower-case letter, then lower-case letters, digits and _.+-; any other is refused."""
    registry = Registry("metric")
    if legal(name):
        registry.register(name, 1, "acme 1.0")
        assert name in registry
    else:
        with pytest.raises(NMBenchError, match=r"^metric name .* of acme 1\.0 is not legal"):
            registry.register(name, 1, "acme 1.0")
        assert name not in registry and not list(registry)


@pytest.mark.parametrize("name", [None, 3, b"acme", ("acme",)])
def test_name_that_is_no_text(name):
    """A name that is no text is refused with one line."""
    with pytest.raises(NMBenchError, match="is not legal"):
        Registry("model").register(name, 1, "acme 1.0")


@pytest.mark.parametrize("origin", ["acme 1.0 [acme]", "other 2.0 [other]"])
def test_taken_name_keeps_its_owner(origin):
    """A name that is taken is refused, also to its owner; the error names both plugins and the first object stays."""
    registry = Registry("method")
    registry.register("wanda", "first", "acme 1.0 [acme]")
    with pytest.raises(NMBenchError) as caught:
        registry.register("wanda", "second", origin)
    text = f"method 'wanda' of {origin} is already provided by acme 1.0 [acme]; rename yours."
    assert str(caught.value) == text
    assert registry.get("wanda") == "first"


def test_a_file_replaces_what_is_installed():
    """A plugin file comes before an installed plugin, once; when the file goes, the installed entry is back."""
    registry = Registry("method")
    registry.register("wanda", "installed", "acme 1.0 [acme]")
    registry.register("wanda", "mine", "file mine.py")
    assert registry.get("wanda") == "mine"
    assert registry.replaced == ["method 'wanda' of file mine.py replaces that of acme 1.0 [acme]"]
    with pytest.raises(NMBenchError, match=r"of file other.py is already provided by file mine.py"):
        registry.register("wanda", "another", "file other.py")
    registry.forget("file mine.py")
    assert registry.get("wanda") == "installed" and registry.replaced == []


@quick
@given(st.dictionaries(NAMES, ORIGINS), ORIGINS)
def test_forget_removes_one_origin(content, gone):
    """Forgetting a plugin removes exactly what it registered, and frees those names."""
    registry = Registry("method")
    for name, origin in content.items():
        registry.register(name, name, origin)
    registry.forget(gone)
    assert {entry.name: entry.origin for entry in registry} == {n: o for n, o in content.items() if o != gone}
    for name, origin in content.items():
        if origin == gone:
            registry.register(name, name, "new")
    assert len(list(registry)) == len(content)


def test_forget_reaches_every_registry():
    """Rolling a plugin back empties all registries of it, and of nothing else."""
    registries = Registries()
    distinct = {id(registry): registry for registry in registries.by_hook().values()}.values()
    for registry in distinct:
        registry.register("gone", 1, "acme")
        registry.register("stays", 2, "other")
    registries.forget("acme")
    assert [[entry.name for entry in registry] for registry in distinct] == [["stays"]] * 5


@pytest.mark.parametrize(
    ("asked", "near"), [("magnitud", "magnitude"), ("WANDA", "wanda"), ("sparse-gpt", "sparsegpt"), ("xyz", None)]
)
def test_unknown_name_suggests_the_nearest(asked, near):
    """An unknown name is an error that lists all names, sorted, and suggests the nearest one if there is any."""
    registry = Registry("method")
    for name in ("wanda", "sparsegpt", "magnitude"):
        registry.register(name, name, "acme")
    with pytest.raises(UnknownName) as caught:
        registry.get(asked)
    hint = f" Did you mean '{near}'?" if near else ""
    assert str(caught.value) == f"unknown method {asked!r}.{hint} Known: magnitude, sparsegpt, wanda"


def test_empty_registry_says_so():
    """With an empty registry, the error says that no name is known."""
    with pytest.raises(UnknownName, match=r"^unknown reporter 'csv'\. Known: none$"):
        Registry("reporter").get("csv")


def test_methods_share_one_registry():
    """Baselines and mask learners have one registry, so that a method's name is unique across both."""
    registries = Registries()
    by_hook = registries.by_hook()
    assert by_hook["nmbench_register_baselines"] is by_hook["nmbench_register_mask_learners"] is registries.methods
