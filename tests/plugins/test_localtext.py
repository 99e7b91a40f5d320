"""Laws of local text: what people have is read, what is no text is refused with file, line and remedy."""

import bz2
import gzip
import json
import lzma
import os
import re

import pandas
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError
from nmbench_plugins.localtext import JsonLines, TextFiles
from nmbench_plugins.localtext.content import decoded

quick = settings(max_examples=30, deadline=None)
DOCUMENTS = ["first\nlines", "second \u2028 é 😀", "third"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)


def unix(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(dataset, path):
    return list(dataset(str(path)).texts("calibration"))


def refusal(dataset, path):
    """The message, which is one line and names the file."""
    with pytest.raises(NMBenchError) as caught:
        read(dataset, path)
    said = str(caught.value)
    assert "\n" not in said
    assert str(path) in said
    return said


# What is read


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("named_so", [True, False])
def test_compressed_files_are_read(tmp_path, ending, named_so):
    """Compression is undone by the content of a file, whatever its name."""
    pack = PACKERS[ending]
    jsonl = written(tmp_path / f"a.jsonl{ending if named_so else ''}", pack(LINES.encode()))
    plain = written(tmp_path / f"a.txt{ending if named_so else ''}", pack(DOCUMENTS[1].encode()))
    assert read(JsonLines, jsonl) == DOCUMENTS
    assert read(TextFiles, plain) == [DOCUMENTS[1]]


@pytest.mark.parametrize("dataset", [JsonLines, TextFiles])
def test_parquet_is_read(tmp_path, dataset):
    """Every row of a Parquet table with a "text" column is a document, also by another name of the file."""
    pandas.DataFrame({"id": [1, 2, 3], "text": DOCUMENTS}).to_parquet(tmp_path / "a.parquet")
    assert read(dataset, tmp_path / "a.parquet") == DOCUMENTS


@quick
@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans())
def test_text_survives(text, marked):
    """UTF-8 is read as it is, but for line ends, with a byte order mark or without."""
    assert decoded(text.encode("utf-8-sig" if marked or text.startswith("\ufeff") else "utf-8"), "x") == unix(text)


def test_byte_order_mark_and_line_ends_of_windows(tmp_path):
    """A byte order mark is no part of a text, at the beginning of a line neither; CR LF and CR end lines."""
    lines = LINES.splitlines()
    marked = written(tmp_path / "a.jsonl", "\ufeff" + "\r\n\ufeff".join(lines) + "\r\n\r\n")
    old = written(tmp_path / "b.jsonl", "\r".join(lines))
    plain = written(tmp_path / "a.txt", "\ufeffone\r\ntwo\rthree")
    assert read(JsonLines, marked) == read(JsonLines, old) == DOCUMENTS
    assert read(TextFiles, plain) == ["one\ntwo\nthree"]


def test_folder_stands_for_its_files(tmp_path):
    """A folder gives the files of its kind, in the order of their names, hidden and empty ones left out."""
    (tmp_path / "b").mkdir()
    for name, text in {
        "b/2.txt": "two",
        "a.txt": "one",
        "c.TXT": "three",
        ".d.txt": "no",
        "e.md": "no",
        "f.txt": "",
    }.items():
        written(tmp_path / name, text)
    written(tmp_path / "g.txt.gz", gzip.compress(b"four"))
    assert [text for text in read(TextFiles, tmp_path) if text] == ["one", "two", "three", "four"]
    provenance = TextFiles(str(tmp_path)).provenance()["sha256"]
    assert list(provenance) == ["a.txt", os.path.join("b", "2.txt"), "c.TXT", "f.txt", "g.txt.gz"]
    assert "holds no file whose name ends in .jsonl" in refusal(JsonLines, tmp_path)


def test_links_in_a_folder(tmp_path):
    """Linked folders are read, each folder once; a link to nothing and a pipe are refused, not left out."""
    for name in ("a/1.txt", "b/2.txt"):
        (tmp_path / name).parent.mkdir()
        written(tmp_path / name, name)
    (tmp_path / "a/more").symlink_to("../b")
    (tmp_path / "a/loop").symlink_to("..")
    assert sorted(read(TextFiles, tmp_path / "a")) == ["a/1.txt", "b/2.txt"]
    (tmp_path / "b/3.txt").symlink_to("nowhere")
    assert "3.txt is no file that can be read" in refusal(TextFiles, tmp_path / "a")
    (tmp_path / "b/3.txt").unlink()
    os.mkfifo(tmp_path / "b/3.txt")
    assert "3.txt is no file that can be read" in refusal(TextFiles, tmp_path / "b")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    """A folder inside that cannot be listed is named, not left out."""
    (tmp_path / "in").mkdir()
    written(tmp_path / "1.txt", "one")
    scan = os.scandir

    def refused(path):
        if str(path).endswith("in"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert "Permission denied" in refusal(TextFiles, tmp_path)


def test_home_is_expanded(tmp_path, monkeypatch):
    """`~` is the home of the user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "novel.txt", "one")
    assert read(TextFiles, "~/novel.txt") == ["one"]
    assert list(TextFiles("~/novel.txt").provenance()) == ["sha256"]


def test_no_texts_to_choose_by(tmp_path):
    """Local files have no selection texts of their own."""
    assert list(JsonLines(written(tmp_path / "a.jsonl", LINES)).texts("selection")) == []


# What is refused


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": null}', 'the "text" of {} line 4 is null, not a string; take the entry out'),
        ('{"text": ["a"]}', 'the "text" of {} line 4 is a list, not a string'),
        ('{"text": {"a": 1}}', 'the "text" of {} line 4 is an object, not a string'),
        ('{"text": NaN}', 'the "text" of {} line 4 is a number (nan), not a string'),
        ('{"text": 17}', 'the "text" of {} line 4 is a number (17), not a string'),
        ('{"text": true}', 'the "text" of {} line 4 is a truth value (True), not a string'),
        ('{"text": "cut \\ud83d off"}', 'the "text" of {} line 4 holds a lone surrogate, U+D83D at character 4'),
        ('{"n": ' + "[" * 100_000 + "]" * 100_000 + "}", "{} line 4 is nested too deeply"),
        (
            '{"content": "a", "id": 1}',
            "{} line 4 is not a JSON object with a \"text\" field; its fields: 'content', 'id'.",
        ),
        ("{}", '{} line 4 is not a JSON object with a "text" field; its fields: none.'),
        (
            '["a"]',
            '{} line 4 is not a JSON object with a "text" field but a list; a JSON array becomes lines by `jq -c',
        ),
        ('"a"', "{} line 4 is not a JSON object with a \"text\" field but a string ('a')."),
        ('{"text": "a"', '{} line 4 is not a JSON object with a "text" field: Expecting'),
        ('{"text": "a"} {"text": "b"}', '{} line 4 is not a JSON object with a "text" field: Extra data'),
        ("9" * 5000, '{} line 4 is not a JSON object with a "text" field: Exceeds the limit'),
    ],
    ids=lambda value: value[:24],
)
def test_lines_without_text_are_refused(tmp_path, line, said):
    """A line whose "text" is no text is named by its number, with what stands there."""
    path = written(tmp_path / "a.jsonl", LINES + line + "\n")
    assert refusal(JsonLines, path).startswith(said.format(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"one\ntwo \xe9t\xe9", "{} is not UTF-8: byte 8, in line 2, is 0xe9; convert it from its encoding: iconv"),
        (
            "one".encode("utf-16"),
            "{} is not UTF-8 but UTF-16, by its byte order mark (BOM); convert it: iconv -f UTF-16",
        ),
        ("one".encode("utf-16-be"), "{} line 1 holds a NUL character: it is no text, or UTF-16 text"),
        (b"\xfe\xff" + "one".encode("utf-16-be"), "{} is not UTF-8 but UTF-16, by its byte order mark"),
        ("one".encode("utf-32"), "{} is not UTF-8 but UTF-32, by its byte order mark"),
        (b"\xff\xff", "{} is not UTF-8: byte 0, in line 1, is 0xff"),
        (gzip.compress(b"one\xff", mtime=0), "{} is not UTF-8: byte 3, in line 1, is 0xff"),
        (gzip.compress(bytes(range(128)) * 9, mtime=0)[:-12], "{} is damaged gzip data"),
        (zstd(b"one" * 99)[:-4], "{} is damaged Zstandard data"),
        (lzma.compress(b"one")[:-9], "{} is damaged xz data"),
        (bz2.compress(b"one")[:-9], "{} is damaged bzip2 data"),
        (b"PAR1 and so on", "{} is a damaged Parquet table"),
        (b"", "{} holds no text; name another file."),
        (b" \n\n", "{} holds no text; name another file."),
    ],
)
def test_other_bytes_are_refused(tmp_path, content, said):
    """Bytes that are no UTF-8 text are named by their place, other encodings and damage by their names."""
    path = written(tmp_path / "a.txt", content)
    assert refusal(TextFiles, path).startswith(said.format(path))


def test_empty_lines_alone_are_refused(tmp_path):
    """A file of JSON lines without any is refused."""
    assert "holds no text" in refusal(JsonLines, written(tmp_path / "a.jsonl", "\n\n"))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"content": ["a"], "id": [1]}, '{} has no column "text"; its columns: content, id.'),
        ({"text": ["a", None]}, 'the "text" of {} row 2 is null, not a string'),
        ({"text": [1.5]}, 'the "text" of {} row 1 is a number (1.5), not a string'),
        ({"text": [["a"]]}, 'the "text" of {} row 1 is a list, not a string'),
    ],
)
def test_tables_without_text_are_refused(tmp_path, table, said):
    """A table without a column of text is refused with its columns, or with the row."""
    path = tmp_path / "a.parquet"
    pandas.DataFrame(table).to_parquet(path)
    assert refusal(JsonLines, path).startswith(said.format(path))


def test_what_is_no_file_is_refused(tmp_path):
    """A missing file, a pipe and a name that cannot be one are one line each."""
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refusal(TextFiles, tmp_path / "pipe")
    assert "does not exist" in refusal(TextFiles, tmp_path / "none.txt")
    assert "cannot be read" in refusal(TextFiles, "a" * 5000)
    assert "cannot be read" in refusal(TextFiles, "~nobody-of-this-name/a.txt")
    with pytest.raises(NMBenchError, match=re.escape("needs a file after the colon, for example text:novel.txt")):
        TextFiles("")
