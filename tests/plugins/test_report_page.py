"""Laws of the HTML page: the answer, one table per protocol, figures with badges, everything escaped."""

import base64
import gzip
import json
import re
import shlex
import sys
from html.parser import HTMLParser

import pytest

from nmbench.results.results import load_results
from nmbench_plugins.publish.latex import latex
from nmbench_plugins.publish.page import charts
from nmbench_plugins.publish.page.curves import POINTS
from nmbench_plugins.publish.page.document import document
from reference.run_directory import TEXT, record_of, write_masks, write_run

EVIL = "<img src=x onerror=alert(1)>\"'&</script>"


class Text(HTMLParser):
    """The tags and the visible text of a page, and the content of its scripts by type."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.scripts, self.open = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            about, content = self.scripts[-1]
            self.scripts[-1] = (about, content + data)
        elif self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture(autouse=True)
def no_library(monkeypatch):
    """A short text in the place of the library of charts, whose bundle takes seconds."""
    monkeypatch.setattr(charts, "javascript", lambda: "/* library */")


@pytest.fixture
def page(tmp_path):
    """Make the page of rows and return it parsed; each list of rows is a run directory."""

    def made(*runs, spec=None):
        paths = [write_run(tmp_path / f"run{number}", rows, spec) for number, rows in enumerate(runs)]
        return Text(document(load_results(*paths)))

    return made


DENSE = record_of("dense", None, None)


def test_the_answer_in_one_sentence(page):
    """The best row, what cannot be told apart from it, and the cheapest row near it."""
    rows = [
        *(DENSE, record_of("best", level=0.2, prune=90.0), record_of("same", level=0.2005, prune=50.0)),
        *(record_of("cheap", level=0.24, prune=2.0), record_of("far", level=0.9, prune=0.1)),
    ]
    answer = page(rows).text
    sentence = re.search(r"Best at 2:4 for demoA: (\w+), \+0\.(\d+).*? nats over dense on plays@64; (.*?)\.  ?", answer)
    assert {sentence[1], sentence[3].split(";")[0].removeprefix("not told apart from ")} == {"best", "same"}
    assert "; cheapest within 0.05 nats: cheap (2.00 s, +0.0" in answer


def test_the_answer_names_the_seeds_that_count(page):
    """Where a row has more seeds, the sentence names those that all rows have."""
    rows = [DENSE, record_of("a", level=0.1), record_of("a", seed=1, level=0.1), record_of("b", level=0.5)]
    assert "told apart from every other row; it is also the cheapest within 0.05 nats (1.00 s) (seed 0, which" in (
        page(rows).text
    )


def test_without_losses_nothing_is_told_apart(page):
    """Records alone give the order and the interval to dense; the page says that pairs were not compared."""
    rows = [{**row, "losses": None} for row in (DENSE, record_of("a", level=0.1), record_of("b", level=0.5))]
    found = page(rows).text
    assert "Best at 2:4 for demoA: a, +0.0999 [" in found and "lacks their losses/" in found
    assert "No pair of rows can be compared" in found


def test_rows_of_unlike_seeds_are_not_compared(page):
    """Rows without a common seed have no pairs; the page says that this is why."""
    found = page([DENSE, record_of("a", level=0.1), record_of("b", seed=1, level=0.5)]).text
    assert "not compared pair by pair, because they have no seed in common" in found


def test_no_answer_on_a_text_that_dense_does_not_predict(page):
    """Such a text has no best row, no shares and no chart of costs."""
    found = page([{**DENSE, "unranked": [TEXT]}, record_of("wanda", level=0.1), record_of("b", level=0.2)])
    assert "No answer at 2:4 for demoA" in found.text and "Best at" not in found.text
    assert "Quality against cost" not in found.text


def test_protocols_are_shown_apart(page):
    """Each protocol has its own body of the table and its own badge; every figure of a row has that badge."""
    other = [{**row, "protocol_digest": "b" * 16, "model": "other"} for row in (DENSE, record_of("wanda", level=0.3))]
    found = page([DENSE, record_of("wanda", level=0.2)], other)
    bodies = [about["data-protocol"] for tag, about in found.tags if tag == "tbody" and "data-protocol" in about]
    assert bodies == ["A", "B"]
    assert "measured in two ways, and are not compared" in found.text
    assert re.search(r"wanda2:40\d+\.\d+ ± \d\.\d+A\+0\.\d+ \[.*?\]A", found.text)
    assert re.search(r"wanda2:40\d+\.\d+ ± \d\.\d+B\+0\.\d+ \[.*?\]B", found.text)


def test_whatever_a_label_is_it_is_text(page):
    """Labels, models, options, metrics, errors and doubts cannot begin a tag, nor end a script."""
    evil = record_of("wanda", level=0.2, options={EVIL: EVIL}, doubts=[EVIL], model=EVIL)
    evil |= {"label": EVIL.replace("/", ""), "losses": None}
    evil["metrics"] = {EVIL: {"value": 1.0, "lower_is_better": True, "where": EVIL, "detail": {EVIL: 1.0}}}
    evil["curve"] = [{"step": 1, EVIL: 2.0}]
    failed = record_of("bad", status="failed", error=EVIL, traceback=EVIL)
    found = page([{**DENSE, "model": EVIL}, evil, failed])
    assert not [tag for tag, about in found.tags if tag == "img" or "onerror" in about]
    assert found.open == [] and EVIL in "".join(found.words)


def test_jobs_that_are_not_done_are_said(page):
    """A directory with jobs undone says how many."""
    spec = {"patterns": ["2:4"], "seeds": [0], "methods": {name: {"method": name} for name in ("wanda", "ria")}}
    assert "1 of 2 jobs not done" in page([DENSE, record_of("wanda", level=0.1)], spec=spec).text


def test_a_plain_page_without_the_extra(page, monkeypatch):
    """Without vl-convert-python there are no charts, one note says how to get them, and the tables stay."""
    monkeypatch.undo()
    charts.javascript.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    found = page([DENSE, record_of("wanda", level=0.2), record_of("b", level=0.1)])
    charts.javascript.cache_clear()
    assert found.text.count("pip install 'nmbench[report]'") == 1
    assert not [about for tag, about in found.tags if about.get("class") == "vega"]
    assert "Is A better than B?" in found.text and "Share of the baseline" in found.text


def test_the_library_is_bundled_once(monkeypatch, tmp_path):
    """The bundle is kept in the cache folder; no script can be ended by it."""
    monkeypatch.undo()
    calls = []
    fake = type(sys)("vl_convert")
    fake.javascript_bundle = lambda: calls.append(1) or "code </script> code"
    monkeypatch.setitem(sys.modules, "vl_convert", fake)
    monkeypatch.setattr(charts, "version", lambda name: "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        charts.javascript.cache_clear()
        assert charts.javascript() == "code <\\/script> code"
    charts.javascript.cache_clear()
    assert len(calls) == 1


def test_files_within_the_page(page, tmp_path):
    """The page carries CSV, JSON and LaTeX, byte for byte what the reporters write."""
    found = page([DENSE, record_of("wanda", level=0.2)])
    packed = {about["data-file"]: text for about, text in found.scripts if "data-file" in about}
    files = {name: gzip.decompress(base64.b64decode(text)).decode() for name, text in packed.items()}
    results = load_results(tmp_path / "run0")
    assert files["report.tex"] == latex(results)
    assert files["report.csv"] == results.frame().to_csv(index=False)
    assert json.loads(files["report.json"]) == list(results.records)


def test_share_removed(page):
    """A row with half of the excess of the baseline removes half of it; the baseline itself is not listed."""
    rows = [DENSE, record_of("wanda", level=0.8), record_of("half", level=0.4)]
    found = re.search(r"Share of the baseline.*?half(\d+\.\d)% \[(\d+\.\d)%, (\d+\.\d)%\]A", page(rows).text)
    assert float(found[1]) == pytest.approx(50, abs=1) and float(found[2]) <= float(found[1]) <= float(found[3])


def test_overlap_curves_and_layers(page, tmp_path):
    """Masks of a run directory are compared; learners have curves, layers a heat map and a table by kind."""
    detail = {f"model.layers.{n}.mlp.up_proj": 0.1 * n for n in range(4)}
    layers = {"value": 0.2, "lower_is_better": True, "detail": detail}
    learner = record_of("soft", level=0.1, curve=[{"step": n, "held_out": 4 - n / 100} for n in range(900)])
    rows = [DENSE, learner, record_of("wanda", level=0.3)]
    rows = [{**row, "metrics": {**row["metrics"], "layers:x": layers}} for row in rows]
    for seed, row in enumerate(rows[1:]):
        write_masks(tmp_path / "run0", row, seed)
    found = page(rows)
    assert "Overlap of masks" in found.text and "mlp.up_proj0.15000.1500" in found.text
    data = [json.loads(text) for about, text in found.scripts if about.get("type") == "application/json"]
    curve = next(spec for spec in data if isinstance(spec.get("mark"), dict) and spec["mark"]["type"] == "line")
    assert len(curve["data"]["values"]) <= POINTS + 1 and curve["data"]["values"][-1]["step"] == 899
    assert sum(spec.get("mark") == "rect" for spec in data) == 2


def test_a_row_is_repeated_with_what_it_begins_with(page):
    """The command of a repair names the labels that it begins with, and their options."""
    methods = {
        "soft": {"method": "soft", "options": {"init": "wanda", "tokens": 9}},
        "tuned": {"method": "distil", "options": {"init": "soft", "compile": False}},
        "ria": {"method": "ria"},
    }
    row = record_of("tuned", seed=3, level=0.1, repairs="tuned", started_from="soft")
    found = page([DENSE, row], spec={"patterns": ["2:4"], "seeds": [3], "methods": methods}).words
    command = next(text for text in found if "--method" in text)
    words = shlex.split(command)
    assert [words[place + 1] for place, word in enumerate(words) if word == "--method"] == ["tuned=distil", "soft"]
    assert [words[place + 1] for place, word in enumerate(words) if word == "--set"] == [
        *("tuned.init=soft", "tuned.compile=false", "soft.init=wanda", "soft.tokens=9")
    ]
    assert words[-6:] == ["--pattern", "2:4", "--seed", "3", "--out", "again"]


def test_protocols_with_other_metrics_show_their_own_first_one(page):
    """Where protocols begin with different metrics, the first of each is shown, and named."""
    value = {"value": 7.25, "stderr": 0.1, "n": 3, "lower_is_better": True}
    other = [{**row, "protocol_digest": "b" * 16, "metrics": {"ppl:else@8": value}} for row in (DENSE, record_of("c"))]
    found = page([DENSE, record_of("wanda", level=0.2)], other).text
    assert "first metric: ppl:plays@64" in found and "first metric: ppl:else@8" in found
    assert "c2:407.250 ± 0.100B" in found


def test_the_command_makes_the_page(nmbench, tmp_path):
    """`nmbench report` without a format writes the page and says how many jobs are not done; with one, only that."""
    spec = {"patterns": ["2:4"], "seeds": [0], "methods": {name: {"method": name} for name in ("wanda", "ria")}}
    write_run(tmp_path / "a", [DENSE, record_of("wanda", level=0.1)], spec)
    result = nmbench("report", "a")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-2:] == [
        "a: 1 of 2 jobs not done; the command in its spec.toml goes on.",
        "wrote a/report.html",
    ]
    assert nmbench("report", "a", "--format", "csv", "--out", "b").exit_code == 0
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["report.csv"]


def test_a_folder_that_cannot_be_written_still_shows_its_table(nmbench, tmp_path):
    """Where the page cannot be written, the table is printed and one line says why; an asked format is an error."""
    write_run(tmp_path / "a", [DENSE, record_of("wanda", level=0.1)])
    (tmp_path / "a/report.html").mkdir()
    result = nmbench("report", "a")
    assert result.exit_code == 0 and "wanda" in result.stdout
    assert result.stderr.startswith("no report.html: ") and len(result.stderr.splitlines()) == 1
    assert nmbench("report", "a", "--format", "html").exit_code != 0
