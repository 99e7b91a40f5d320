"""The results as files within the page: CSV, JSON and LaTeX, compressed, written by the script of the page."""

from __future__ import annotations

import base64
import gzip
import json
import shlex

from nmbench_plugins.publish.latex import latex
from nmbench_plugins.publish.page.markup import el, text
from nmbench_plugins.publish.page.view import View


def downloads(view: View) -> str:
    """Return a button for each file; without JavaScript the command that writes the files."""
    results = view.results
    files = {
        "report.csv": results.frame().to_csv(index=False),
        "report.json": json.dumps(list(results.records), indent=1),
        "report.tex": latex(results),
    }
    buttons = "".join(button(name, content) for name, content in files.items())
    folders = shlex.join(map(str, results.directories))
    command = f"nmbench report {folders} --format csv --format json --format latex"
    again = el("p", "The same files: " + el("code", text(command)), class_="note")
    return el("p", buttons, class_="downloads", hidden=True) + again


def button(name: str, content: str) -> str:
    """Return the button of one file, and its content as gzip in base64."""
    packed = base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode()
    data = el("script", packed, type="application/gzip", data_file=name)
    return el("button", f"Download {text(name)}", type="button", data_download=name) + data
