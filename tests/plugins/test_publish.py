"""Laws of what is published: every row is in it, characters are escaped, nothing is loaded from elsewhere."""

import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser

import pytest

from nmbench.results.results import load_results
from nmbench_plugins.publish.latex import escaped
from nmbench_plugins.publish.page import charts

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


@pytest.fixture
def done(nmbench, small, texts, tmp_path):
    """A run of two methods, one under a label that is full of special characters, and of one that fails."""
    shutil.copy(texts / "test.txt", tmp_path / "a_b&c%.txt")
    text = f"text:{tmp_path}/a_b&c%.txt@64"
    flags = [flag for flag in small[: small.index("--set")] if not flag.startswith("ppl:") and flag != "--metric"]
    metrics = ["--metric", f"ppl:{text}", "--metric", f"layers:{text}"]
    methods = [
        "--method",
        "my_w+x=wanda",
        "--method",
        "sparsegpt",
        "--method",
        "bad=swaps",
        "--set",
        "bad.skip_tokens=999",
    ]
    result = nmbench("run", *flags, *metrics, *methods, "--seed", "0", "--seed", "1", "--out", "out")
    assert result.exit_code == 1, result.output
    return tmp_path / "out"


def test_every_format_of_one_run(done, nmbench):
    """LaTeX, HTML and plot hold every row of the run, escaped; nothing is loaded from elsewhere."""
    result = nmbench("report", "out", "--format", "latex", "--format", "html", "--format", "plot")
    assert result.exit_code == 0, result.output
    assert [line.split("/")[-1] for line in result.stdout.splitlines()[-3:]] == [
        "report.tex",
        "report.html",
        "pareto.png",
    ]
    (protocol,) = load_results(done).protocol()
    assert f"% {protocol}\n" in (done / "report.tex").read_text(encoding="utf-8")
    assert escape(protocol) in (done / "report.html").read_text(encoding="utf-8")
    check_latex((done / "report.tex").read_text(encoding="utf-8"))
    check_page((done / "report.html").read_text(encoding="utf-8"), load_results(done))
    assert (done / "pareto.png").read_bytes().startswith(b"\x89PNG")


def check_latex(text):
    lines = text.splitlines()
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    rows = [line.removesuffix(r" \\").split(" & ") for line in lines if line.endswith(r" \\")]
    assert len({len(row) for row in rows}) == 1
    assert len(rows[0]) == len(re.search(r"\{tabular\}\{([lr]+)\}", text)[1])
    assert [row[0] for row in rows[1:]] == ["dense", r"my\_w+x", "sparsegpt"]
    assert r"a\_b\&c\%.txt@64" in rows[0][3]
    assert r"$\pm$" in rows[2][3]


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
