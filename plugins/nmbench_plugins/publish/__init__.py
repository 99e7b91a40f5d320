"""Reporters for papers and for the web: a LaTeX table, a plot of quality against cost, a self-contained page."""

from __future__ import annotations

import nmbench
from nmbench_plugins.publish.latex import Latex
from nmbench_plugins.publish.page import Html
from nmbench_plugins.publish.plot import Plot


@nmbench.hookimpl
def nmbench_register_reporters(register: nmbench.Register) -> None:
    register("latex", Latex)
    register("html", Html)
    register("plot", Plot)
