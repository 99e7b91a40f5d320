"""Items of zero-shot tasks in local folders, in the form that the harness's task definitions expect.

A folder `<task>/` holds `test.jsonl` or `validation.jsonl`, whichever the harness evaluates on, one item a line: with
the fields of the data set on the hub, or for ARC and OpenBookQA with "question", a list "choices" and the index "gold",
and for BoolQ with a truth value "answer" instead of a "label". Every item has a gold answer: the test splits of some
data sets have -1 instead, which would count as the last choice. An item of WikiText is a "page" and has no answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import nmbench

Item = dict[str, Any]


def lettered(item: Item) -> Item:
    """Return an item with labelled choices and the label of the gold choice, as on the hub for ARC and OpenBookQA."""
    if "answerKey" in item:
        return among(item["answerKey"], item["choices"]["label"], item)
    labels = [chr(ord("A") + index) for index in range(len(item["choices"]))]
    among(item["gold"], range(len(labels)), item)
    stem = item["question"]
    choices = {"text": item["choices"], "label": labels}
    return {"question": stem, "question_stem": stem, "choices": choices, "answerKey": labels[item["gold"]]}


def labelled(item: Item) -> Item:
    """Return an item whose truth value is the label 0 or 1, as in SuperGLUE."""
    found = item if "label" in item else {**item, "label": int(item["answer"])}
    return among(found["label"], (0, 1), found)


def ended(item: Item) -> Item:
    """Return an item of HellaSwag, whose label is the number of an ending, as text."""
    return among(int(item["label"]), range(len(item["endings"])), item)


def solved(item: Item) -> Item:
    """Return an item of PIQA, whose label 0 or 1 names one of two solutions."""
    return among(item["label"], (0, 1), item)


def filled(item: Item) -> Item:
    """Return an item of Winogrande, whose answer 1 or 2 names one of two options, as text."""
    return among(item["answer"], ("1", "2"), item)


def unchanged(item: Item) -> Item:
    """Return the item itself: its gold answer is a part of its text."""
    return item if item["text"] else among("", (), item)


def paged(item: Item) -> Item:
    """Return an item whose `page` is the text of a document with words."""
    if not item["page"].split():
        raise ValueError("its page holds no word")
    return item


def among(gold: Any, known: Container[Any], item: Item) -> Item:
    """Return `item` if its `gold` answer is one of the `known` ones. Raises `ValueError` for one without an answer."""
    if isinstance(gold, bool) or gold not in known:
        raise ValueError(f"its gold answer {gold!r} is none of its choices")
    return item


TASKS: dict[str, tuple[str, Callable[[Item], Item]]] = {
    "arc_easy": ("test", lettered),
    "arc_challenge": ("test", lettered),
    "openbookqa": ("test", lettered),
    "hellaswag": ("validation", ended),
    "piqa": ("validation", solved),
    "winogrande": ("validation", filled),
    "boolq": ("validation", labelled),
    "lambada_openai": ("test", unchanged),
}

PAGES: dict[str, tuple[str, Callable[[Item], Item]]] = {"wikitext": ("test", paged)}  # tasks without answers
KNOWN = {**TASKS, **PAGES}


def check(folder: Path) -> Path:
    """Return the file of items in a folder. Raises `NMBenchError` for a missing file or an unknown folder name."""
    if folder.name not in KNOWN:
        raise nmbench.NMBenchError(
            f"no zero-shot task is known by the folder name {folder.name!r}; name it {', '.join(KNOWN)}."
        )
    path = folder / f"{KNOWN[folder.name][0]}.jsonl"
    if not path.is_file():
        raise nmbench.NMBenchError(f"zero-shot items {path} do not exist; one JSON object a line is expected there.")
    return path


def read(folder: Path) -> list[Item]:
    """Return all items of a folder. Raises `NMBenchError` with the first line that is not an item of the task."""
    path, form = check(folder), KNOWN[folder.name][1]
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                items.append(form(json.loads(line)))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise nmbench.NMBenchError(
                    f"{path} line {number} is not an item of {folder.name}: {type(error).__name__} {error}."
                ) from None
    return items


def digest(folder: Path) -> str:
    """Return the SHA-256 of the file of items."""
    return hashlib.sha256(check(folder).read_bytes()).hexdigest()
