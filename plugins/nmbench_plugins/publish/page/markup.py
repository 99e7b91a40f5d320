"""Pieces of HTML as text. Arguments named `content` are HTML; everything else is escaped here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

FOLDERS = re.compile(r"(?<![^:@\s])[^:@\s]*/(?=[^/@\s])")  # of a path within a name: `ppl:text:/a/b.txt@64`


def el(tag: str, content: str = "", **attributes: Any) -> str:
    """Return an element with HTML inside; attributes are escaped, those that are None or False left out.

    `class_` stands for `class`, an underscore in other names for a hyphen.
    """
    return f"<{tag}{''.join(attribute(name, value) for name, value in attributes.items())}>{content}</{tag}>"


def attribute(name: str, value: Any) -> str:
    """Return one attribute with a space before it; nothing for None and False."""
    if value is None or value is False:
        return ""
    written = name.rstrip("_").replace("_", "-")
    return f" {written}" if value is True else f' {written}="{escape(str(value))}"'


def text(value: Any) -> str:
    """Return a value as HTML that shows it."""
    return escape(str(value))


def short(name: str) -> str:
    """Return the name of a metric, text or model without the folders of its path: `ppl:text:b.txt@64`."""
    return FOLDERS.sub("", name)


def named(name: str) -> str:
    """Return a short name whose whole text is its tooltip."""
    return text(name) if short(name) == name else el("abbr", text(short(name)), title=name)


def listed(parts: Iterable[str]) -> str:
    """Return pieces of HTML with commas."""
    return ", ".join(parts)


def section(anchor: str, title: str, *content: str) -> str:
    """Return a section with a heading; nothing if it has no content."""
    inside = "\n".join(filter(None, content))
    return el("section", f"<h2>{text(title)}</h2>\n{inside}", id=anchor) + "\n" if inside else ""


def note(value: str) -> str:
    """Return a line that explains, from plain text."""
    return el("p", text(value), class_="note")


def folded(title: str, content: str, opened: bool = False, **attributes: Any) -> str:
    """Return content under a line that opens and closes it."""
    return el("details", el("summary", title) + content, open=opened, **attributes)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "plain") -> str:
    """Return a table whose heads are plain text and whose cells are HTML; the first cell of a row is its head."""
    top = "".join(el("th", text(name), scope="col") for name in head)
    lines = "".join(el("tr", el("th", first, scope="row") + cells(head[1:], rest)) for first, *rest in rows)
    whole = el("table", f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody>", class_=class_)
    return el("div", whole, class_="scroll")


def cells(head: Sequence[str], contents: Sequence[str]) -> str:
    """Return the cells of a row, each with the head of its column, which a narrow screen shows."""
    return "".join(el("td", content, data_head=name) for name, content in zip(head, contents, strict=True))


def script_data(value: Any) -> str:
    """Return JSON that may stand in a `script` element: no tag can begin in it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")
