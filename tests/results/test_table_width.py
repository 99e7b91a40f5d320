"""Laws of tables on narrow terminals: the order of columns left out, the columns that stay, the line that says so."""

import os
import pty
import sys

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.cli import main
from nmbench.results.table_width import NAMES, Fitted, aligned, fitted, fold

COLUMNS = {
    "label": "maskpro@init",
    "pattern": "2:4",
    "seed": "0",
    "rank": "1",
    "ppl:demo@256": "146.9666",
    "kl:demo@256": "1.6300",
    "nats over dense, demo@256": "+1.3897 [+1.3674, +1.4143]",
    "in N:M": "99.9%",
    "weights": "dense",
    "prune s": "122.5",
    "MiB grown": "636",
    "tokens": "1540096",
    "pareto": "seconds tokens bytes",
}
FRAME = pandas.DataFrame([COLUMNS, {**COLUMNS, "label": "wanda", "rank": "FAILED"}])


def left_out(table):
    """The columns that the remark below a table says are left out, and the seed that it says for all rows."""
    others = table.remark.rpartition("left out in ")[2]
    listed = others.partition(": ")[2].partition("; a wider")[0].replace("dense, ", "dense,_").split(", ")
    return [name.replace("_", " ") for name in listed if name] + ["seed"] * ("seed 0 in all rows" in table.remark)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 250))
def test_a_table_fits_and_says_what_it_lacks(width):
    """A column is in the table or said below it; names and the first metric stay; it fits if it can."""
    table = fitted(FRAME, width)
    shown = [name.replace(" ", "") for name in table.names]  # a folded header has spaces at its folds
    assert [name for name in COLUMNS if (name.replace(" ", "") in shown) == (name in left_out(table))] == []
    assert not ({*NAMES, "ppl:demo@256"} - {"seed"}) & {*left_out(table)}
    assert "FAILED" in "".join(table.cells[table.names.index("rank")])
    assert table.width <= max(width, fitted(FRAME, 1).width)
    assert {len(text) for cells in table.cells for text in cells} <= {max(map(len, cells)) for cells in table.cells}


def test_eighty_columns_are_enough():
    """The usual table keeps rank, value, difference to dense and seconds in 80 columns."""
    table = fitted(FRAME.drop(columns="kl:demo@256"), 80)
    assert table.width <= 80
    assert {"rank", "prune s"} <= {*table.names} and any(name.startswith("nats over dense") for name in table.names)
    assert left_out(table) == ["pareto", "MiB grown", "in N:M", "tokens", "weights", "seed"]


@pytest.mark.parametrize("width", [None, 500])
def test_where_there_is_room_nothing_goes(width):
    """A wide terminal shows all; and so does everything that is no terminal. Headers are whole, and apart."""
    table = fitted(FRAME, width)
    assert table == Fitted(table.heads, table.cells)
    assert [head.strip() for head in table.heads] == list(FRAME.columns)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.decimals(-999, 9999, places=3), min_size=1), st.integers(0, 3))
def test_decimal_points_stand_below_each_other(values, places):
    """Texts of figures are padded to one width, their decimal points in one column, whatever is behind them."""
    texts = [f"{value:.{places + number % 2}f}{'*' * (number % 3)}" for number, value in enumerate(values)]
    found = aligned([*texts, "-"])
    assert [cell.strip() for cell in found] == [*texts, "-"]
    assert len({len(cell) for cell in found}) == 1
    assert len({cell.index(".") for cell in found if "." in cell}) <= 1


@pytest.mark.parametrize(
    ("head", "width", "lines"),
    [
        ("ppl:demo@256", 8, ["ppl:demo", "@256"]),
        ("nats over dense, demo@256", 16, ["nats over dense,", "demo@256"]),
        ("in N:M", 5, ["in", "N:M"]),
        ("ppl:text:data/wiki.txt@2048", 99, ["ppl:text:data/wiki.txt@2048"]),
        ("unbreakable", 3, ["unbreakable"]),
    ],
)
def test_headers_are_folded_at_signs(head, width, lines):
    """A header is folded behind a colon, a slash or a space, or before @, into as few lines as fit."""
    assert fold(head, width).split("\n") == lines


@pytest.mark.parametrize("terminal", [True, False])
def test_only_terminals_are_narrow(finished, small, monkeypatch, terminal):
    """On a terminal of 80 columns the report says what it left out; in a pipe nothing is, however narrow COLUMNS."""
    finished(*small, "--method", "wanda")
    read, write = pty.openpty() if terminal else os.pipe()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch, open(write, "w", encoding="utf-8") as output:
        patch.setattr(sys, "stdout", output)
        main(["report", "out"], standalone_mode=False)
    text = os.read(read, 2**16).decode()
    os.close(read)
    assert ("left out in 80 columns" in text) == terminal
    assert ("pareto" in text.splitlines()[0]) != terminal
    assert ("\x1b" in text) == terminal
