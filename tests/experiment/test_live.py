"""Laws of the live view: its lines, what stays above it, and what it leaves alone."""

import io
import random
import re
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.experiment.curve import LEVELS, MOST, Curve, sparkline
from nmbench.experiment.forecast import Forecast
from nmbench.experiment.live import LiveView, bar, is_live, steady_console
from nmbench.plugins.events import Progress

quick = settings(max_examples=60, deadline=None)
JOB = "acme 2:4 seed 0"
MEMORY = SimpleNamespace(device="cpu")
ROWS = [Forecast("dense", "dense", True, 1.0, None, None), Forecast("acme", JOB, False, 90.0, None, None)]
DONE = {"label": "acme", "pattern": "2:4", "seed": 0, "status": "ok", "copied_from": None, "seconds": {"total": 3.2}}
DONE |= {"metrics": {"ppl:demo@8": {"value": 7.0}}}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 60 columns, and a live view on it that is closed at the end."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    view = LiveView(steady_console(stream))
    yield stream, view
    view.close()


def lines(view):
    """What the view shows now."""
    return [line.plain for line in view.view().renderables]


def test_the_view_in_words(terminal):
    """Overall progress, the job with its count and bar, its curve and figures, memory and time: a line each."""
    _, view = terminal
    view.nmbench_run_started(MEMORY, ROWS)
    for step, loss in enumerate((3.5, 3.25, 3.125), start=1):
        view.nmbench_progress(Progress(JOB, "learn", 10 * step, 40, {"held_out": loss, "flips": 12.0}))
    overall, job, figures, memory = lines(view)
    assert re.fullmatch(r"job 2 of 2, about 1 min \d+ s left", overall)
    assert re.fullmatch(rf"{JOB}: learn 30/40  ━+─+  0 s left", job)
    assert figures == "held_out 3.125 █▃▁ lowest 3.125, flips 12"
    assert re.fullmatch(r"memory \d+\.\d GiB; 0 s of this job, 0 s in all", memory)


def test_lines_are_cut_to_the_terminal(terminal):
    """However long names and figures are, each line takes one line of the terminal."""
    stream, view = terminal
    values = {f"a figure with a long name {number}": 1.0 for number in range(9)}
    view.nmbench_progress(Progress("a job with a very long name indeed " * 3, "learn", 3, 9, values))
    view.close()
    shown = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", stream.getvalue()))
    assert max(map(len, shown)) == 60
    assert "…" in shown[0]


def test_finished_rows_stay_above(terminal):
    """A finished row, and what others write to standard error, are printed once, above the view."""
    stream, view = terminal
    view.nmbench_progress(Progress("dense", "evaluate", 1, 9))
    print("NOTICE by others", file=sys.stderr)
    view.nmbench_method_finished(DONE)
    view.nmbench_method_finished({**DONE, "status": "failed", "error": "no such luck"})
    view.close()
    text = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    for line in ("NOTICE by others", f"{JOB}: ppl:demo@8 7.0000 in 3.2 s", f"{JOB}: failed: no such luck"):
        assert text.count(line) == 1


def test_the_terminal_is_left_as_it_was(terminal):
    """The view is removed at the end, the cursor is never hidden, and standard error is what it was."""
    stream, view = terminal
    before = sys.stderr
    view.nmbench_progress(Progress("dense", "evaluate", 1, 9))
    assert sys.stderr is not before
    view.close()
    view.close()
    assert sys.stderr is before
    assert "\x1b[?25l" not in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")  # the last line of the view, erased


def test_the_view_draws_no_random_numbers(terminal):
    """Drawing leaves the random state of Python alone, on which a method may depend."""
    _, view = terminal
    state = random.getstate()
    view.nmbench_run_started(MEMORY, ROWS)
    view.nmbench_progress(Progress(JOB, "learn", 1, 9, {"held_out": 3.0}))
    view.nmbench_method_finished(DONE)
    view.close()
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("variables", "live"),
    [({}, True), ({"CI": "true"}, False), ({"CI": "false"}, True), ({"TERM": "dumb"}, False)],
    ids=str,
)
def test_where_there_is_a_view(monkeypatch, variables, live):
    """A terminal has a live view, but not in CI, and not one that cannot be rewritten; a file has none."""
    for name, value in {"CI": "", "TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    assert is_live(Terminal()) is live
    assert not is_live(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    monkeypatch.setattr(Terminal, "encoding", "latin-1")
    assert not is_live(Terminal())


def test_a_run_with_the_view_has_the_same_results(nmbench, finished, small, records, tmp_path, monkeypatch):
    """A run on a terminal draws the view, and ends with the masks and figures of one that prints lines."""
    finished(*small)
    monkeypatch.setattr("nmbench.experiment.live.is_live", lambda stream: True)
    result = nmbench("run", *small[:-1], "live")
    assert result.exit_code == 0
    assert "job 3 of 3" in result.stderr and "\x1b[2K" in result.stderr
    assert "\x1b" not in result.stdout
    for name in ("proof", "metrics", "cost"):
        assert [row[name] for row in records(tmp_path / "live")] == [row[name] for row in records(tmp_path / "out")]


def test_an_interrupted_view_is_closed(terminal, monkeypatch):
    """Ctrl-C and SIGTERM raise an exception, after which standard error is what it was."""
    from nmbench.cli.shared import progress_shown
    from nmbench.plugins.loading import load_plugins

    plugins, before = load_plugins(entry_points=()), sys.stderr
    monkeypatch.setattr("nmbench.experiment.live.is_live", lambda stream: True)

    def interrupted():
        with progress_shown(plugins):
            plugins.announce("nmbench_progress", event=Progress(JOB, "learn", 1, 9))
            assert sys.stderr is not before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sys.stderr is before


# The curve


@quick
@given(st.lists(st.floats(-1e3, 1e3), max_size=200), st.integers(0, 40))
def test_a_sparkline_is_within_its_width(points, width):
    """At most `width` blocks; the lowest is the lowest block, the highest the full one, equal points are low."""
    text = sparkline(points, width)
    assert len(text) == min(len(points), width)
    if 0 < len(points) <= width:
        assert text[points.index(min(points))] == LEVELS[0]
        assert text[points.index(max(points))] == (LEVELS[-1] if max(points) > min(points) else LEVELS[0])


def test_a_curve_is_of_one_job():
    """Another job begins a new curve; the loss on selection windows is drawn if there is one, else the first figure."""
    curve = Curve()
    curve.add(Progress("a", "learn", 1, 9, {"loss": 2.0}))
    assert (curve.name, curve.points) == ("loss", [2.0])
    curve.add(Progress("a", "learn", 2, 9, {"held_out": 3.0, "loss": float("nan")}))
    assert (curve.name, curve.points, list(curve.others)) == ("held_out", [3.0], ["loss"])
    curve.add(Progress("a", "learn", 3, 9))
    assert curve.points == [3.0]
    curve.add(Progress("b", "prune", 0, 9))
    assert (curve.name, curve.points) == (None, ())


def test_a_long_curve_is_thinned():
    """However many points a job reports, a few thousand are kept, over all of its time."""
    curve = Curve()
    for step in range(2 * MOST):
        curve.add(Progress("a", "learn", step, 0, {"loss": float(step)}))
    assert len(curve.points) <= MOST
    assert curve.points[-1] >= 2 * MOST - 2


@quick
@given(st.floats(0, 1), st.integers(0, 40))
def test_a_bar_has_its_width(share, width):
    """A bar is as wide as asked, and full only at the end."""
    text = bar(share, width)
    assert len(text) == width
    assert (text == "━" * width) == (share == 1 or width == 0)
