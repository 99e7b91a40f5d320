"""What `docs/` says is run, page by page: programs are written to files, commands called, and outputs looked for.

Runs get flags that make them small, unless the page gives its own: a tiny random model on short texts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nmbench.plugins.checking import known_hooks
from nmbench.testing.kit import law_names

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SMALL = ["--windows", "4", "--window-tokens", "64", "--pool-tokens", "2048", "--selection-tokens", "1024"]


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def small(arguments: list[str], texts: Path) -> list[str]:
    """The arguments of `nmbench run`, and what makes the run small."""
    found = [argument.replace(":demo@256", f":text:{texts}/test.txt@64") for argument in arguments]
    for flag, value in (("--model", "tiny:llama"), ("--calibration", f"text:{texts}/cal.txt")):
        found += [] if flag in found else [flag, value]
    return [*found, *SMALL, *([] if "--metric" in found else ["--metric", f"ppl:text:{texts}/test.txt@64"])]


class Reader:
    """Does what a reader of one page does, in order, in a folder of its own; `output` is what was printed."""

    def __init__(self, nmbench, folder, texts):
        self.nmbench, self.folder, self.texts = nmbench, folder, texts
        self.output = ""
        self.space = {"__name__": "docs"}  # the programs of a page follow each other, as in a notebook

    def python(self, text: str) -> None:
        if match := re.match(r"# (\w+\.py)\n", text):
            (self.folder / match[1]).write_text(text, encoding="utf-8")
            return
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "docs", "exec"), self.space)
        self.output += printed.getvalue()

    def sh(self, text: str) -> None:
        for line in text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line)
            assert program in ("nmbench", "pytest"), f"nobody runs {line!r}"
            self.output += self.pytest(arguments) if program == "pytest" else self.command(arguments)

    def command(self, arguments: list[str]) -> str:
        given = small(arguments, self.texts) if arguments[0] == "run" else arguments
        result = self.nmbench(*given)
        assert result.exit_code == 0, result.output
        return result.output

    def pytest(self, arguments: list[str]) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def text(self, text: str) -> None:
        for line in text.splitlines():
            parts = [re.escape(part.strip()) for part in line.split("...")]
            assert re.search(".*".join(parts), self.output), f"{line!r} is not in {self.output}"

    def toml(self, text: str) -> None:
        from nmbench.spec import tomllib

        assert tomllib.loads(text)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_followed(page, nmbench, texts, tmp_path, monkeypatch):
    """Whoever does what the page says, and nothing else, gets what it says."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    reader = Reader(nmbench, tmp_path, texts)
    try:
        for language, text in blocks(page):
            getattr(reader, language)(text)
    finally:
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
                del sys.modules[name]


def test_the_first_plugin_has_fifteen_lines():
    """The first page promises fifteen lines of code, blank ones not counted."""
    _, source = next(block for block in blocks("first-plugin.md") if block[0] == "python")
    code = [line for line in source.splitlines() if line.strip() and not line.startswith("# ")]
    assert len(code) <= 15


def test_reporter_page_leaves_its_files(nmbench, texts, tmp_path):
    """The report and the observer's file of the reporter page are really there."""
    reader = Reader(nmbench, tmp_path, texts)
    for language, text in blocks("reporter.md"):
        getattr(reader, language)(text)
    assert "<table" in (tmp_path / "runs/first/page.html").read_text()
    assert (tmp_path / "finished.txt").read_text() == "2 rows\n"


def generator():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["hooks.md", "checks.md"])
def test_generated_pages_are_up_to_date(page):
    """What is made from the code is what the code says today: else run `python docs/generate.py`."""
    assert generator().pages()[page] == (DOCS / page).read_text(encoding="utf-8")


def test_every_hook_and_every_check_is_in_the_reference():
    """No hook and no check is undocumented."""
    hooks, checks = ((DOCS / page).read_text(encoding="utf-8") for page in ("hooks.md", "checks.md"))
    for name, spec in known_hooks().items():
        assert f"### {name}\n" in hooks
        assert len((spec.__doc__ or "").split()) >= 8, name
    assert all(f"| `{name}` |" in checks for name in law_names())


def test_links_lead_somewhere():
    """Every page is linked from the first one, and every relative link leads to a file."""
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (DOCS / page).read_text(encoding="utf-8")):
            assert (DOCS / target).exists(), (page, target)
            linked |= {target} if page == "README.md" else set()
    assert linked == set(PAGES) - {"README.md"}


def test_what_the_pages_name_exists():
    """Names of nmbench that the pages speak of are there."""
    import importlib

    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        for dotted in set(re.findall(r"`(nmbench(?:\.\w+)+)`", text)):
            module, _, name = dotted.rpartition(".")
            try:
                importlib.import_module(dotted)
            except ImportError:
                assert hasattr(importlib.import_module(module), name), (page, dotted)
