"""Reporters for papers, for the web and for TensorBoard: LaTeX, plots of quality against cost, a page, event files."""

from __future__ import annotations

import nmbench
from nmbench_plugins.publish.latex import Latex
from nmbench_plugins.publish.page import Html
from nmbench_plugins.publish.plot import Plot, PlotPdf, PlotSvg
from nmbench_plugins.publish.tensorboard import Tensorboard


@nmbench.hookimpl
def nmbench_register_reporters(register: nmbench.Register) -> None:
    register("latex", Latex)
    register("html", Html)
    register("plot", Plot)
    register("plot-svg", PlotSvg)
    register("plot-pdf", PlotPdf)
    register("tensorboard", Tensorboard)
