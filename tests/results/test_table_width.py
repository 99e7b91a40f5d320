"""Laws of tables on narrow terminals: the order of columns left out, the columns that stay, the line that says so."""

import os
import pty
import sys

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.cli import main
from nmbench.results.table_width import NAMES, fitted

COLUMNS = {
    "label": "maskpro@init",
    "pattern": "2:4",
    "seed": "0",
    "strict": "yes, 405504 groups",
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
FRAME = pandas.DataFrame([COLUMNS, {**COLUMNS, "label": "wanda", "strict": "FAILED"}])


def parts(text):
    """The lines of the table, and what is said to be left out."""
    lines = text.splitlines()
    note = lines.pop() if lines[-1].startswith("(left out") else ""
    return lines, note.partition(": ")[2].partition(";")[0].split(", ") if note else []


@settings(max_examples=36, deadline=None)
@given(st.integers(1, 250))
def test_a_table_fits_and_says_what_it_lacks(width):
    """A column is in the table or named as left out; names and the first metric stay; it fits if it can."""
    text = fitted(FRAME, width)
    lines, left_out = parts(text)
    shown = " ".join(lines[0].split())
    for name in COLUMNS:
        assert (name in shown) != (name in ", ".join(left_out)), name
    assert not {*NAMES, "ppl:demo@256"} & {*left_out}
    assert ("groups" in lines[1]) != ("number of groups" in left_out)
    assert "FAILED" in text
    least = max(map(len, parts(fitted(FRAME, 1))[0]))
    assert max(map(len, lines)) <= max(width, least)


def test_eighty_columns_are_enough():
    """The usual table keeps proof, value and difference to dense in 80 columns."""
    lines, left_out = parts(fitted(FRAME.drop(columns="kl:demo@256"), 80))
    assert max(map(len, lines)) <= 80
    assert "nats over dense, demo@256" in lines[0]
    assert left_out == ["pareto", "MiB grown", "in N:M", "tokens", "weights", "prune s", "number of groups"]


@pytest.mark.parametrize("width", [None, 500])
def test_where_there_is_room_nothing_goes(width):
    """A wide terminal shows all; and so does everything that is no terminal."""
    assert fitted(FRAME, width) == FRAME.to_string(index=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_only_terminals_are_narrow(finished, small, monkeypatch, terminal):
    """On a terminal of 80 columns the report says what it left out; in a pipe nothing is, however narrow COLUMNS."""
    finished(*small, "--method", "wanda")
    read, write = pty.openpty() if terminal else os.pipe()
    monkeypatch.setenv("COLUMNS", "80")
    with monkeypatch.context() as patch, open(write, "w", encoding="utf-8") as output:
        patch.setattr(sys, "stdout", output)
        main(["report", "out"], standalone_mode=False)
    text = os.read(read, 2**16).decode()
    os.close(read)
    assert ("left out in 80 columns" in text) == terminal
    assert ("pareto" in text.splitlines()[0]) != terminal
