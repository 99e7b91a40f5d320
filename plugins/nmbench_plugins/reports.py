"""Reporters for files: CSV and JSON with every figure, Markdown with the table."""

from __future__ import annotations

import json
from pathlib import Path

import nmbench


class Csv(nmbench.Reporter):
    """`report.csv`: one line per row, nested fields as dotted columns."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        path = directory / "report.csv"
        results.frame().to_csv(path, index=False)
        return path


class Json(nmbench.Reporter):
    """`report.json`: the records as one JSON array."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        path = directory / "report.json"
        path.write_text(json.dumps(list(results.records), indent=2) + "\n", encoding="utf-8")
        return path


class Markdown(nmbench.Reporter):
    """`report.md`: the protocol, and the printed table in a code block, to copy without changes."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        path = directory / "report.md"
        protocol = "\n\n".join(f"`{line.replace('`', '')}`" for line in results.protocol())
        path.write_text(f"{protocol}\n\n```\n{nmbench.render(results)}\n```\n", encoding="utf-8")
        return path


@nmbench.hookimpl
def nmbench_register_reporters(register: nmbench.Register) -> None:
    register("csv", Csv)
    register("json", Json)
    register("markdown", Markdown)
