"""The pages are executed: the commands of all pages are parsed, and those of `docs/plugins/` and of the
page on the use of a model are run.

To follow a page: programs are written to files, commands called, and outputs looked for. Runs get flags that make them
small, unless the page gives its own: a tiny random model on short texts. Runs from Python read the beginnings of the
demo's plays, and no run measures on more than the beginning of its test text.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from nmbench import data
from nmbench.plugins.checking import known_hooks
from nmbench.testing.kit import law_names
from nmbench_plugins.demo import DemoPlays
from pages import DOCS, LINK, OTHERS, PAGES, ROOT, TUTORIALS, blocks, commands, prose, provide, text_of

SMALL = ["--windows", "4", "--window-tokens", "64", "--pool-tokens", "2048", "--selection-tokens", "1024"]


def small(arguments: list[str], texts: Path) -> list[str]:
    """The arguments of `nmbench run`, and what makes the run small."""
    found = [argument.replace(":demo@256", f":text:{texts}/test.txt@64") for argument in arguments]
    for flag, value in (("--model", "tiny:llama"), ("--calibration", f"text:{texts}/cal.txt")):
        found += [] if flag in found else [flag, value]
    return [*found, *SMALL, *([] if "--metric" in found else ["--metric", f"ppl:text:{texts}/test.txt@64"])]


class Reader:
    """Does what a reader of one page does, in order, in a folder of its own; `output` is what was printed."""

    def __init__(self, nmbench, python, folder, texts):
        self.nmbench, self.run_python, self.folder, self.texts = nmbench, python.run, folder, texts
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
        done = self.run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, cwd=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def text(self, text: str) -> None:
        for line in text.splitlines():
            parts = [re.escape(part.strip()) for part in line.split("...")]
            assert re.search(".*".join(parts), self.output), f"{line!r} is not in {self.output}"

    def toml(self, text: str) -> None:
        from nmbench.plain_data import tomllib

        assert tomllib.loads(text)


def beginnings(plays, split, texts=DemoPlays.texts):
    """The texts of the demo, cut short."""
    return (text[:8_000] for text in texts(plays, split))


def beginning(dataset, name):
    """The test text of any data set, cut short."""
    return data.test_text(dataset, name)[:8_000]


@pytest.mark.parametrize("page", TUTORIALS)
def test_a_page_can_be_followed(page, nmbench, python, texts, tmp_path, monkeypatch):
    """A reader who follows the page, and does nothing else, gets the output of the page."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(DemoPlays, "texts", beginnings)
    monkeypatch.setattr("nmbench.experiment.setup.test_text", beginning)
    before = set(sys.modules)
    reader = Reader(nmbench, python, tmp_path, texts)
    try:
        for language, text in blocks(page):
            getattr(reader, language)(text)
    finally:
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
                del sys.modules[name]


def test_the_first_plugin_has_fifteen_lines():
    """The first page promises fifteen lines of code, blank ones not counted."""
    _, source = next(block for block in blocks("docs/plugins/first-plugin.md") if block[0] == "python")
    code = [line for line in source.splitlines() if line.strip() and not line.startswith("# ")]
    assert len(code) <= 15


def test_reporter_page_leaves_its_files(nmbench, python, texts, tmp_path):
    """The report and the observer's file of the reporter page are really there."""
    reader = Reader(nmbench, python, tmp_path, texts)
    for language, text in blocks("docs/plugins/reporter.md"):
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
    """Generated pages are those of the current code: else run `python docs/generate.py`."""
    assert generator().pages()[page] == (DOCS / "plugins" / page).read_text(encoding="utf-8")


def test_every_hook_and_every_check_is_in_the_reference():
    """No hook and no check is undocumented."""
    hooks, checks = text_of("docs/plugins/hooks.md"), text_of("docs/plugins/checks.md")
    for name, spec in known_hooks().items():
        assert f"### {name}\n" in hooks
        assert len((spec.__doc__ or "").split()) >= 8, name
    assert all(f"| `{name}` |" in checks for name in law_names())


@pytest.mark.parametrize("page", [page for page in OTHERS if commands(page)])
def test_every_command_is_understood(page, nmbench, texts, tmp_path, monkeypatch, shared):
    """Every command names options, methods, models, texts and metrics that exist; those on finished runs succeed."""
    for arguments in commands(page):
        provide(page, arguments, tmp_path)
        finish_runs(arguments, nmbench, texts, shared)
        if "script" in arguments:
            assert nmbench(*arguments).output.startswith("# first\nnmbench work"), arguments
        elif arguments[0] == "work":
            assert parsed("work", arguments[1:])["job"]
        elif arguments[0] == "run" or (arguments[0] == "reproduce" and len(arguments) > 1):
            with monkeypatch.context() as stopped:
                stop_before_loading(stopped)
                assert nmbench(*arguments).stderr == "Error: far enough\n", arguments
        elif arguments[0] == "speed":  # needs a GPU
            assert parsed("speed", arguments[1:])["model"]
        else:
            result = nmbench(*arguments)
            assert result.exit_code == 0, (arguments, result.output)
            assert result.output


def test_there_are_commands_to_look_up():
    """Every command of nmbench is shown on some page that is not about plugins, and runs are shown in many ways."""
    from nmbench.cli import main

    shown = [arguments for page in OTHERS for arguments in commands(page)]
    assert {arguments[0] for arguments in shown} == set(main.commands)
    assert len([arguments for arguments in shown if arguments[0] == "run"]) >= 18


def stop_before_loading(monkeypatch) -> list:
    """From now on a run stops when its names and options have been looked up; returns the specs that got so far."""
    from nmbench.errors import NMBenchError

    specs = []

    def stop(plan, *rest, **named):
        specs.append(plan.spec)
        raise NMBenchError("far enough")

    monkeypatch.setattr("nmbench.run.prepared", stop)
    return specs


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder that the pages share, for one finished run."""
    return tmp_path_factory.mktemp("shared")


def finish_runs(arguments: list[str], nmbench, texts: Path, shared: Path) -> None:
    """Put finished runs where a command reads run directories, `runs/...`, unless they are there."""
    flags = ["run", "--method", "wanda", "--method", "maskpro", "--set", "maskpro.steps=2", "--out", f"{shared}/run"]
    wanted = [match[0] for argument in arguments if (match := re.match(r"runs/\w+", argument))]
    if wanted and not (shared / "run").exists():
        result = nmbench(*small(flags, texts))
        assert result.exit_code == 0, result.output
    for name in wanted:
        if not Path(name).exists():
            shutil.copytree(shared / "run", name)


def parsed(command: str, arguments: list[str]) -> dict:
    """The parameters of a command as its parser reads them."""
    from nmbench.cli import main

    return main.commands[command].make_context(command, arguments).params


def test_the_commands_can_follow_each_other(nmbench, tmp_path, monkeypatch):
    """Page after page, no command on the demo clashes with what an earlier one left in its run directory."""
    from nmbench.results.extending import merged

    specs = stop_before_loading(monkeypatch)
    first = next(line for line in text_of("README.md").splitlines() if "&& .venv/bin/nmbench run" in line)
    nmbench(*shlex.split(first.split("&&")[-1])[1:])
    for page in ("README.md", *(page for page in OTHERS if page.startswith("docs/guide/"))):
        for arguments in commands(page):
            if arguments[0] == "run" and not {"--model", "--config"} & set(arguments):
                provide(page, arguments, tmp_path)
                nmbench(*arguments)
    directories = {}
    for spec in specs:
        shared = (spec.protocol_digest, spec.pattern_for)  # what the default run directory is named by
        earlier = directories.get(shared, spec)
        labels = {method.label for method in earlier.methods}
        directories[shared] = merged(earlier, spec, tmp_path, labels)
    assert len(specs) >= 10
    assert len(directories) < len(specs)


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    """Three words in a row, wherever they stand."""
    words = text.split()
    return set(zip(words, words[1:], words[2:], strict=False))


def messages(errors: list[str]) -> list[list[str | None]]:
    """The texts of the source code in parts, None for what is filled in; short ones are left out, and files that share
    no three words in a row with any error.
    """
    wanted = {words for error in errors for words in runs_of_words(error)}
    found = [path.read_text(encoding="utf-8") for path in sources()]
    trees = [ast.parse(text) for text in found if wanted & runs_of_words(text)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    parts = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
    parts += [[node] for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts = [[p.value if isinstance(p, ast.Constant) else None for p in part] for part in parts]
    return [text for text in texts if sum(len(p) for p in text if p) >= 15]


def could_be(error: str, text: list[str | None]) -> bool:
    """Whether a text of the source code can come out as `error`."""
    if not all(part in error for part in text if part):  # a hundred times faster than the expression alone
        return False
    return bool(re.fullmatch("".join(".*" if part is None else re.escape(part) for part in text), error))


def sources() -> list[Path]:
    return [path for folder in ("nmbench", "plugins") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_errors_on_the_page_are_those_of_the_code():
    """Every error text of the troubleshooting page can come out of the code as it stands on the page."""
    shown = [line for language, text in blocks("docs/guide/troubleshooting.md") for line in text.splitlines()]
    errors = [line.removeprefix("Error: ") for line in shown if line.startswith("Error: ")]
    assert len(errors) >= 20
    texts = messages(errors)
    assert [error for error in errors if not any(could_be(error, text) for text in texts)] == []


def test_links_lead_somewhere():
    """Every relative link leads to a file, and every page of `docs/` is reached from its first page and listed for the
    site.
    """
    links = {
        page: {(ROOT / page).parent.joinpath(to).resolve() for to in LINK.findall(text_of(page))} for page in PAGES
    }
    assert [(page, to) for page, targets in links.items() for to in targets if not to.exists()] == []
    reached, ahead = set(), ["docs/README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        ahead += [p for p in PAGES if (ROOT / p) in links[page] and p not in reached]
    assert reached == {page for page in PAGES if page.startswith("docs/")}
    site = re.findall(r"([\w/-]+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    assert sorted(f"docs/{page}" for page in site) == sorted(reached)


def test_what_the_pages_name_exists():
    """Names of nmbench that the pages speak of are there."""
    import importlib

    named = {(page, name) for page in PAGES for name in re.findall(r"`(nmbench(?:\.\w+)+)[`(]", text_of(page))}
    for page, dotted in sorted(named):
        module, _, name = dotted.rpartition(".")
        try:
            importlib.import_module(dotted)
        except ImportError:
            assert hasattr(importlib.import_module(module), name), (page, dotted)


def test_files_that_the_pages_name_exist():
    """Files and folders of the repository that the pages name, in full or by their last parts, are there."""
    tops = ("nmbench", "plugins", "tests", "benchmarks", "docs", ".ci")
    there = [f"/{path.relative_to(ROOT).as_posix()}" for top in tops for path in (ROOT / top).rglob("*")]
    known = [f"/{top}" for top in tops] + there
    of_a_run = ("masks/", "weights/", "losses/", "checkpoints/", "errors/", "sampled/", "tensorboard/")
    own = (*of_a_run, "nmbench-acme/", "mine.py")  # of a reader
    named = {(page, name) for page in PAGES for name in files_named(page) if name not in own}
    assert [(p, name) for p, name in sorted(named) if not any(k.endswith(f"/{name.rstrip('/')}") for k in known)] == []


def files_named(page: str) -> list[str]:
    """The Python files and folders between backticks on a page; on pages of benchmarks, the files of figures too."""
    figures = r"|`(\w+\.json)`" if page.startswith("docs/benchmarks/") else ""
    found = re.findall(rf"`([\w./-]+\.py|[\w.-]+(?:/[\w.-]+)*/)`{figures}", prose(page))
    return [name for match in found for name in ([match] if isinstance(match, str) else match) if name]


def test_every_folder_is_on_the_map():
    """The architecture page lists every file and folder of `nmbench/`, and no other."""
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "nmbench").iterdir() if not path.name.startswith("__")}
    listed = re.findall(r"^\| `nmbench/([\w./]+)` \|", text_of("docs/architecture.md"), re.MULTILINE)
    folders = {name for name in listed if "/" not in name.rstrip("/")}
    assert folders == there - {"py.typed"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name)
def test_results_name_no_path_of_a_machine(path):
    """Texts and folders that a committed result was measured on are named without the folders of the machine."""
    assert not re.findall(r'"[^"]*[:"]/[a-z]+/[^"]*', path.read_text(encoding="utf-8"))
