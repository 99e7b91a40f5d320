"""`pareto.png`, `.svg`, `.pdf`: quality against cost, with Pareto fronts. Needs matplotlib: `nmbench[plot]`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import nmbench


class Plot(nmbench.Reporter):
    """`pareto.png`: nats over dense against seconds, tokens and memory, with intervals and fronts."""

    form: ClassVar[str] = "png"

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        from nmbench_plugins.publish.drawing import image

        path = directory / f"pareto.{self.form}"
        path.write_bytes(image(results, self.form))
        return path


class PlotSvg(Plot):
    """`pareto.svg`: the same plot for the web, as vectors."""

    form = "svg"


class PlotPdf(Plot):
    """`pareto.pdf`: the same plot for a paper, as vectors."""

    form = "pdf"
