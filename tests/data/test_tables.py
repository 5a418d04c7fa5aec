"""Tables of texts: one row is one document, whatever is in it, and one line for every mistake."""

import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heedful.data import load_data, load_text, read_validation

datasets = pytest.importorskip("datasets")

TEXTS = [
    *(f"document {i} says {chr(97 + i) * 12}" for i in range(18)),
    'a "quoted" {brace}, comma',
    "two\n\n\n\nblank lines\n<|endoftext|>\nand a marker",
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def json_list(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def separated(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(rows).to_parquet(str(path))


def saved(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


WRITE: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "a.jsonl": jsonl,
    "a.json": json_list,
    "a.csv": separated,
    "a.tsv": separated,
    "a.parquet": parquet,
    "saved": saved,
}


@pytest.fixture(params=WRITE)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Write a table of every kind."""

    def write(texts: list[Any], column: str = "text") -> Path:
        path = tmp_path / request.param
        WRITE[request.param](path, [{"id": i, column: text} for i, text in enumerate(texts)])
        return path

    return write


def test_a_row_is_a_document(table: Callable[..., Path]):
    text = load_text(table(TEXTS))
    assert text.train + text.validation == TEXTS
    assert 0 < len(text.validation) < 5


def test_another_column(table: Callable[..., Path]):
    path = table(TEXTS, "body")
    assert read_validation(path, column="body") == TEXTS
    data = load_data(path, text_column="body", tokenizer="bytes", context=16)
    assert f"of {len(TEXTS) - 2} documents" in data.description
    with pytest.raises(
        ValueError, match=r"has no column 'text', .*; it has id, body: name one with --text-column"
    ):
        load_text(path)


def test_a_column_without_text(table: Callable[..., Path]):
    path = table(TEXTS)
    if path.suffix in (".csv", ".tsv"):
        assert read_validation(path, column="id") == [str(i) for i in range(len(TEXTS))]  # all is text there
    else:
        with pytest.raises(
            ValueError, match=r"the column 'id' of .* holds int64, expected text; name another"
        ):
            load_text(path, column="id")


def test_rows_without_text_are_left_out(table: Callable[..., Path]):
    assert read_validation(table(["one", "", " \n", None, " two\r\nlines "])) == ["one", "two\nlines"]


@pytest.mark.parametrize("word", ["NA", "null", "007", "2020-01-01"])
def test_csv_keeps_words_that_look_like_values(tmp_path: Path, word: str):
    separated(tmp_path / "a.csv", [{"text": word}, {"text": word}])
    assert read_validation(tmp_path / "a.csv") == [word, word]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_byte_order_mark(tmp_path: Path, name: str):
    WRITE[name](tmp_path / name, [{"text": "one"}])
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert read_validation(tmp_path / name) == ["one"]


def test_folder_of_mixed_texts(tmp_path: Path):
    for place, (name, write) in enumerate(WRITE.items()):
        (tmp_path / str(place)).mkdir()
        write(tmp_path / str(place) / name, [{"text": f"{name} {i} " + "x" * 20} for i in range(5)])
    (tmp_path / "notes.md").write_text("first\n\n\nsecond")
    text = load_text(tmp_path)
    documents = [f"{name} {i} " + "x" * 20 for name in WRITE for i in range(5)]
    assert text.train + text.validation == [*documents, "first", "second"]


@pytest.mark.parametrize("held", ["validation", "test"])
def test_saved_splits(tmp_path: Path, held: str):
    parts = {"train": TEXTS, held: ["held out"], "other": ["unused"]}
    datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in parts.items()}).save_to_disk(
        str(tmp_path / "d")
    )
    for validation in (None, tmp_path / "d"):
        text = load_text(tmp_path / "d", validation)
        assert (text.train, text.validation) == (TEXTS, ["held out"])
    assert read_validation(tmp_path / "d") == ["held out"]
    text = load_text(tmp_path / "d", "austen")
    assert text.train == TEXTS
    assert len(text.validation) == 24


def test_saved_splits_without_train(tmp_path: Path):
    def save(name: str, *splits: str) -> Path:
        one = datasets.Dataset.from_dict({"text": TEXTS})
        datasets.DatasetDict(dict.fromkeys(splits, one)).save_to_disk(str(tmp_path / name))
        return tmp_path / name

    text = load_text(save("one", "validation"))
    assert text.train + text.validation == TEXTS
    with pytest.raises(ValueError, match="has the splits a, b, expected one of the name train"):
        load_text(save("two", "a", "b"))


def test_validation_file_is_left_out_of_training(tmp_path: Path):
    jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    separated(tmp_path / "b.csv", [{"text": "held out"}])
    text = load_text(tmp_path, tmp_path / "b.csv")
    assert (text.train, text.validation) == (TEXTS, ["held out"])


BAD: dict[str, tuple[str, bytes, str]] = {
    "json": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": oops}\n',
        r"cannot be read as a .jsonl file \(JSON parse error",
    ),
    "csv": (
        "a.csv",
        b"text,id\na,1\nb,2,3,4\n",
        r"cannot be read as a .csv file \(.*Expected 2 fields in line 3",
    ),
    "parquet": ("a.parquet", b"nothing of the kind", "cannot be read as a .parquet file"),
    "not-utf-8": ("a.jsonl", b'{"text": "caf\xe9"}', "is not UTF-8 text: byte 0xe9 at offset 13"),
    "utf-16": ("a.csv", "text\nabc".encode("utf-16"), "is not a text file: zero byte"),
    "nested": ("a.json", b'{"data": [{"text": "a"}]}', "has no column 'text', .*; it has data"),
    "columns": ("a.json", b'{"text": ["a", "b"]}', "the column 'text' of .* expected text"),
    "mixed": ("a.jsonl", b'{"text": "a"}\n{"text": 2}\n', "the column 'text' of .* expected text"),
    "no-bytes": ("a.csv", b"", "is empty"),
    "blank": ("a.jsonl", b"\n \n", "is empty"),
    "no-rows": ("a.csv", b"text,id\n", "is empty"),
    "ending": ("a.pdf", b"%PDF", r"has the unknown ending .pdf; expected a folder or one of \*.txt, \*.md"),
}


@pytest.mark.parametrize(("name", "raw", "message"), BAD.values(), ids=BAD.keys())
def test_bad_tables(tmp_path: Path, name: str, raw: bytes, message: str):
    (tmp_path / name).write_bytes(raw)
    for read in (load_text, read_validation):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


def test_a_character_may_lie_across_two_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("heedful.data.reading._CHUNK", 3)
    (tmp_path / "a.txt").write_text("aa漢字é" * 9, encoding="utf-8")
    assert read_validation(tmp_path / "a.txt") == ["aa漢字é" * 9]
    (tmp_path / "a.txt").write_bytes("漢".encode() + "漢".encode()[:2])
    with pytest.raises(ValueError, match="byte 0xe6 at offset 3"):
        read_validation(tmp_path / "a.txt")


def test_devices_and_pipes_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to("/dev/zero")
    for path in ("/dev/zero", tmp_path / "pipe.txt", tmp_path / "link.txt"):
        with pytest.raises(ValueError, match="is a device or a pipe, which may never end"):
            load_text(path)
    with pytest.raises(ValueError, match="holds no text"):
        load_text(tmp_path)


def test_a_column_of_plain_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("word " * 100)
    with pytest.raises(
        ValueError, match=r"--text-column body is for tables .*a.txt is plain text; leave it out"
    ):
        load_text(tmp_path / "a.txt", column="body")
    with pytest.raises(ValueError, match="--text-column body does not apply to synthetic"):
        load_data("synthetic:variable-assignment", text_column="body")


def test_damaged_saved_folder(tmp_path: Path):
    saved(tmp_path / "d", [{"text": "a"}])
    next((tmp_path / "d").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=r"d cannot be read as a saved dataset \(.*; check it or save it again"
    ):
        load_text(tmp_path / "d")


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'reading a.jsonl needs datasets .*pip install "heedful\[lm\]"'):
        load_text(tmp_path / "a.jsonl")
