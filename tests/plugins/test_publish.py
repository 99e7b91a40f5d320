"""Laws of what is published: every row is in it, characters are escaped, nothing is loaded from elsewhere."""

import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nmbench.results.results import load_results
from nmbench_plugins.publish.latex import escaped
from nmbench_plugins.publish.page import charts
from reference.run_directory import record_of, write_run

VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """Cells by row, addresses loaded, and whether every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        self.open += [tag] * (tag not in VOID)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(autouse=True)
def without_library(monkeypatch):
    """Pages are made without the library of charts, whose bundle takes seconds."""
    monkeypatch.setattr(charts, "javascript", lambda: "")


@pytest.fixture(scope="module")
def odd(texts, tmp_path_factory):
    """A test text under a name that is full of special characters."""
    return shutil.copy(texts / "test.txt", tmp_path_factory.mktemp("odd") / "a_b&c%.txt")


@pytest.fixture
def done(nmbench, made, small, odd, tmp_path):
    """A run of two methods, one under a label of special characters, and of one that fails; done once."""
    flags = [flag for flag in small[: small.index("--set")] if not flag.startswith("ppl:") and flag != "--metric"]
    flags += ["--metric", f"ppl:text:{odd}@64", "--metric", f"layers:text:{odd}@64"]
    flags += ["--method", "my_w+x=wanda", "--method", "sparsegpt", "--method", "bad=swaps"]
    flags += ["--set", "bad.skip_tokens=999", "--seed", "0", "--seed", "1", "--out", "out"]
    result, folder = made(nmbench, tuple(flags))
    assert result.exit_code == 1, result.output
    return Path(shutil.copytree(folder / "out", tmp_path / "out"))


def test_every_format_of_one_run(done, nmbench):
    """LaTeX, HTML, Markdown and plots hold every row of the run, escaped; nothing is loaded from elsewhere."""
    formats = ("latex", "html", "markdown", "plot", "plot-svg", "plot-pdf")
    result = nmbench("report", "out", *(word for name in formats for word in ("--format", name)))
    assert result.exit_code == 0, result.output
    names = ["report.tex", "report.html", "report.md", "pareto.png", "pareto.svg", "pareto.pdf"]
    assert [line.split("/")[-1] for line in result.stdout.splitlines()[-6:]] == names
    assert "LABEL my_w+x = wanda" in result.stdout and "LABEL sparsegpt" not in result.stdout
    (protocol,) = load_results(done).protocol()
    assert f"% {protocol}\n" in (done / "report.tex").read_text(encoding="utf-8")
    assert escape(protocol) in (done / "report.html").read_text(encoding="utf-8")
    check_latex((done / "report.tex").read_text(encoding="utf-8"))
    check_page((done / "report.html").read_text(encoding="utf-8"), load_results(done))
    check_markdown((done / "report.md").read_text(encoding="utf-8"), load_results(done))
    check_plots(done)


def check_latex(text):
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert [line for line in lines if line in (r"\toprule", r"\midrule", r"\bottomrule")] == [
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
    ]
    heads, columns, *rows = [line.removesuffix(r" \\").split(" & ") for line in lines if line.endswith(r" \\")]
    assert {len(row) for row in (columns, *rows)} == {len(re.search(r"\{tabular\}\{([lr]+)\}", text)[1])}
    assert columns[:3] == ["label", "weights", "2:4"]
    assert r"\multicolumn{1}{c}{ppl:text:" in heads[2] and r"a\_b\&c\%.txt@64" in heads[2]
    cells = {row[0]: row[2] for row in rows}
    assert set(cells) == {"dense", r"my\_w+x", "sparsegpt"}
    assert all(r"$\pm$" in cells[name] for name in (r"my\_w+x", "sparsegpt"))
    assert [name for name, cell in cells.items() if r"\textbf" in cell] and r"\textbf" not in cells["dense"]


def check_markdown(text, results):
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    cells = [[line.strip("| ").split(" | ") for line in lines] for lines in tables]
    assert all(len({len(row) for row in rows}) == 1 for rows in cells)
    rows, means, meant = ([[cell.strip() for cell in row] for row in rows[2:]] for rows in cells)
    assert [row[0] for row in rows if row[3] == "FAILED"] == ["bad", "bad"]
    assert len(rows) == len(results.records) and [row[0] for row in means] == ["dense", "my_w+x", "sparsegpt"]
    assert meant[0][:2] == ["my_w+x", "wanda"] and "--method my_w+x=wanda" in meant[0][4]
    assert "- FAILED bad 2:4 seed 0" in text and "2:4 text:" in text.split("```")[1] and "- DOUBT BOS" in text


def check_plots(folder):
    """Every form is what its name says; points have their names, and a pattern has a panel for each kind of cost."""
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "pareto.pdf").read_bytes().startswith(b"%PDF")
    assert {"my_w+x", "sparsegpt", "2:4", "seconds to prune", "(not ranked: dense does not predict it)"} <= words(
        folder
    )
    assert "bad" not in words(folder)


def words(folder):
    """The texts of the plot."""
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", (folder / "pareto.svg").read_text(encoding="utf-8")))


def test_plots_have_intervals_and_names_that_do_not_cover_each_other(tmp_path):
    """Each row has its interval, and a name beside its point; equal results are equal files."""
    pytest.importorskip("matplotlib")
    from nmbench_plugins.publish.drawing import figure_of, image, panels_of
    from nmbench_plugins.publish.page.view import view

    levels = {"a": 0.3, "b": 0.301, "c": 0.302, "d": 0.4}
    labels = [record_of(name, level=level, prune=level) for name, level in levels.items()]
    results = load_results(write_run(tmp_path / "a", [record_of("dense", None, None), *labels, record_of("e", "4:8")]))
    figure = figure_of(panels_of(view(results)))
    assert [axes.get_title("left") for axes in figure.axes] == ["2:4", "2:4", "4:8", "4:8"]
    panel = figure.axes[0]
    assert sorted(text.get_text() for text in panel.texts) == ["a", "b", "c", "d"]
    assert len(panel.collections) == 4
    boxes = [text.get_window_extent() for text in panel.texts]
    assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
    assert image(results, "svg") == image(results, "svg")


def check_page(text, results):
    page = Page(text)
    assert page.open == []
    assert [source for source in page.sources if not source.startswith("#")] == []
    assert "a_b&amp;c%" in text and "a_b&c%" not in text
    jobs = [row for row in page.rows if len(row) > 3 and row[1] in ("-", "2:4")]
    assert {row[0] for row in jobs} >= {record["label"] for record in results.records}
    assert [row[0] for row in jobs if row[3].startswith("FAILED")] == ["bad", "bad"]
    worst = next(record for record in results.records if record["label"] == "sparsegpt")
    detail = next(figures["detail"] for figures in worst["metrics"].values() if "detail" in figures)
    assert {item.partition("layers.")[2].split(".", 1)[1] for item in detail} <= {row[0] for row in page.rows if row}


def test_escaping_takes_each_character_once():
    """What LaTeX gives a meaning is shown as it is; a backslash does not make more of them."""
    assert escaped(r"a\b_{x} 50% ~^±") == (r"a\textbackslash{}b\_\{x\} 50\% \textasciitilde{}\textasciicircum{}$\pm$")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(done, nmbench):
    """A document that takes the table in compiles."""
    assert nmbench("report", "out", "--format", "latex").exit_code == 0
    (done / "paper.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{report}\end{document}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    assert subprocess.run(command, cwd=done, capture_output=True, check=False).returncode == 0


def test_without_matplotlib(done, nmbench, monkeypatch):
    """The plot says what is missing and how to get it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = nmbench("report", "out", "--format", "plot")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "Error: the plot needs matplotlib, which is not installed: pip install 'nmbench[plot]'."
    ]
