"""`report.html`: one self-contained page that answers, compares, and says how to repeat."""

from __future__ import annotations

from pathlib import Path

import nmbench


class Html(nmbench.Reporter):
    """`report.html`: one self-contained page; with charts if `nmbench[report]` is installed."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        from nmbench_plugins.publish.page.document import document

        path = directory / "report.html"
        path.write_text(document(results), encoding="utf-8")
        return path
