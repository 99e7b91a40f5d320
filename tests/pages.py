"""The Markdown pages as tests read them: their programs, their commands, and the files that the commands name."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md")))
TUTORIALS = [
    p for p in PAGES if p.startswith("docs/plugins/") or p.endswith("use-your-model.md")
]  # followed to the end
OTHERS = [page for page in PAGES if page not in TUTORIALS]  # their commands are looked up
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)")
FILE = re.compile(r"^(?:.*\b(?:text|jsonl|gguf):|[\w-]+\.path=)([^@]+)(?:@\d+)?$")
ITEMS = re.compile(r"^zeroshot:(\./[\w/.-]+)(?:@\d+)?$")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text, in order."""
    return BLOCK.findall(text_of(page))


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return BLOCK.sub("", text_of(page))


def commands(page: str) -> list[list[str]]:
    """The arguments of every `nmbench` command in the shell blocks of a page, in order."""
    shell = "".join(text for language, text in blocks(page) if language == "sh")
    lines = shell.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("nmbench ")]


def program(page: str, name: str) -> str:
    """The program of a page whose first line says that it is the file `name`."""
    return next(text for language, text in blocks(page) if language == "python" and text.startswith(f"# {name}\n"))


def provide(page: str, arguments: list[str], folder: Path) -> None:
    """Put the files into `folder` that a command of a page names: empty ones, where only their name is looked up."""
    for flag, value in itertools.pairwise(arguments):
        if flag in ("--config", "--plugin") and (ROOT / "benchmarks" / value).exists():
            (folder / value).write_bytes((ROOT / "benchmarks" / value).read_bytes())
        elif flag == "--plugin":
            (folder / value).write_text(program(page, value), encoding="utf-8")
        elif flag == "--model" and ":" not in value and value != "demo":
            (folder / value).mkdir(exist_ok=True)
        elif flag == "--masks":
            (folder / value).touch()
        elif match := FILE.match(value):
            (folder / match[1]).touch()
        elif match := ITEMS.match(value):
            (folder / match[1]).mkdir(parents=True, exist_ok=True)
            for split in ("test", "validation"):
                (folder / match[1] / f"{split}.jsonl").touch()
