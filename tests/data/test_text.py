"""Reading text: documents, splits that never overlap, and one clear line for every mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heedful.data import load_text, reading
from heedful.data.reading import split_documents
from heedful.data.text import MIN_CHARACTERS, _hold_out_tail

PARAGRAPH = "The quick brown fox jumps over the lazy dog, and no one minds."


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def unique_text(words: int, start: int = 0, separator: str = " ") -> str:
    """Words that occur nowhere else, so that an overlap of two texts is easy to see."""
    return separator.join(f"w{start + i:06d}" for i in range(words))


# The bundled corpus


def test_austen_holds_out_persuasion_whole():
    text = load_text()
    assert text.name == "austen"
    assert len(text.train) == 61 + 50  # Pride and Prejudice, Sense and Sensibility
    assert len(text.validation) == 24
    assert text.train[0].startswith("PRIDE AND PREJUDICE\n\nBy Jane Austen\n\nChapter 1\n")
    assert text.train[61].startswith("SENSE AND SENSIBILITY")
    assert text.validation[0].startswith("Persuasion\n\nby\n\nJane Austen\n")
    assert len("".join(text.train)) == 1_354_347
    assert len("".join(text.validation)) == 464_350


def test_every_austen_document_has_one_chapter_title():
    text = load_text("austen")
    for document in text.train + text.validation:
        assert len(re.findall(r"(?im)^chapter \d+$", document)) == 1


def test_austen_with_another_validation_text(tmp_path):
    file = write(tmp_path / "other.txt", PARAGRAPH)
    text = load_text("austen", validation=file)
    assert text.validation == [PARAGRAPH]
    assert len(text.train) == 111


def test_austen_validates_another_text(tmp_path):
    file = write(tmp_path / "mine.txt", PARAGRAPH * 3)
    text = load_text(file, validation="austen")
    assert text.train == [PARAGRAPH * 3]
    assert len(text.validation) == 24


# Documents inside a file


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("a\nb", ["a\nb"]),
        ("a\n\nb", ["a\n\nb"]),
        ("a\n\n\nb", ["a", "b"]),
        ("a\n \n\t\nb", ["a", "b"]),
        ("\n\n\n\na\n\n\n\n\nb\n\n\n", ["a", "b"]),
        ("a\n<|endoftext|>\nb", ["a", "b"]),
        ("<|endoftext|>\na\n<|endoftext|>", ["a"]),
        ("a\n <|endoftext|> \n<|endoftext|>\nb", ["a", "b"]),
        ("a <|endoftext|> b", ["a <|endoftext|> b"]),
        ("a\n<|endoftext|>b", ["a\n<|endoftext|>b"]),
        (" \n\n \n", []),
    ],
)
def test_split_documents(text, documents):
    assert split_documents(text) == documents


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_newlines_and_byte_order_mark(tmp_path, newline):
    body = newline.join([PARAGRAPH, "", "", PARAGRAPH, PARAGRAPH])
    file = write(tmp_path / "a.txt", "\ufeff" + body)
    validation = write(tmp_path / "b.txt", "é")
    text = load_text(file, validation)
    assert text.train == [PARAGRAPH, PARAGRAPH + "\n" + PARAGRAPH]
    assert text.validation == ["é"]


# What is held out


@pytest.mark.parametrize(
    "separator",
    ["\n\n\n", "\n\n", "\n", " ", ""],
    ids=["document", "paragraph", "line", "word", "-"],
)
def test_file_holds_out_its_tail_at_a_boundary(tmp_path, separator):
    file = write(tmp_path / "book.txt", unique_text(500, separator=separator))
    text = load_text(str(file))
    assert text.name == "book.txt"
    characters = len("".join(text.train)), len("".join(text.validation))
    assert 0.05 <= characters[1] / sum(characters) <= 0.15
    # Cut between words: nothing lost, nothing in both.
    train, held_out = (re.findall(r"w\d{6}", "\n".join(part)) for part in (text.train, text.validation))
    if separator:
        assert train + held_out == unique_text(500).split()
    else:
        assert "".join(text.train + text.validation) == unique_text(500, separator="")


def test_the_best_boundary_wins_over_the_nearest():
    before, after = "a" * 88 + "\n\n" + "b", "c" * 8
    assert _hold_out_tail([f"{before} {after}"]) == (["a" * 88], [f"b {after}"])


@given(st.lists(st.text(alphabet="ab \n<|>é\t", min_size=1, max_size=80), min_size=1, max_size=6))
def test_cut_loses_nothing_and_leaves_both_parts(pieces):
    documents = split_documents("\n\n\n".join(pieces))
    if sum(map(len, documents)) < MIN_CHARACTERS:
        return
    train, held_out = _hold_out_tail(documents)
    assert train and held_out
    joined = "".join("".join(train + held_out).split())
    assert joined == "".join("".join(documents).split())


def test_folder_holds_out_its_last_files(tmp_path):
    for i in range(30):
        write(tmp_path / f"{i:02d}.txt", unique_text(20, start=20 * i))
    text = load_text(tmp_path)
    assert text.name == tmp_path.name
    assert text.train == [unique_text(20, start=20 * i) for i in range(27)]
    assert text.validation == [unique_text(20, start=20 * i) for i in range(27, 30)]


def test_folder_is_read_recursively_sorted_and_without_other_files(tmp_path):
    write(tmp_path / "b" / "z.md", unique_text(20, 20))
    write(tmp_path / "a.TXT", unique_text(20, 0))
    write(tmp_path / "c.txt", unique_text(10, 40))
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "code.py", "no text")
    write(tmp_path / ".hidden" / "d.txt", "hidden")
    text = load_text(tmp_path)
    assert text.train == [unique_text(20, 0), unique_text(20, 20)]
    assert text.validation == [unique_text(10, 40)]


def test_two_files_leave_the_first_for_training_however_short_the_second(tmp_path):
    write(tmp_path / "a.txt", unique_text(100))
    write(tmp_path / "b.txt", "tiny")
    assert load_text(tmp_path).validation == ["tiny"]


def test_a_huge_last_file_is_cut_instead_of_held_out(tmp_path):
    write(tmp_path / "a.txt", "short preface")
    write(tmp_path / "b.txt", unique_text(500))
    text = load_text(tmp_path)
    assert text.train[0] == "short preface"
    assert " ".join(text.train[1:] + text.validation) == unique_text(500)
    assert len(text.validation[0]) < 0.15 * len(unique_text(500))


def test_folder_with_one_file_is_cut_like_a_file(tmp_path):
    file = write(tmp_path / "only.txt", unique_text(200))
    as_folder, as_file = load_text(tmp_path), load_text(file)
    assert (as_folder.train, as_folder.validation) == (as_file.train, as_file.validation)


def test_explicit_validation_files_are_left_out_of_training(tmp_path):
    write(tmp_path / "a.txt", unique_text(50))
    write(tmp_path / "held" / "b.txt", "one")
    write(tmp_path / "held" / "c.txt", "two")
    text = load_text(tmp_path, validation=tmp_path / "held")
    assert text.train == [unique_text(50)]
    assert text.validation == ["one", "two"]


def test_same_file_through_a_link_is_still_left_out(tmp_path):
    write(tmp_path / "corpus" / "a.txt", unique_text(50))
    held = write(tmp_path / "corpus" / "b.txt", "held out")
    link = tmp_path / "link.txt"
    link.symlink_to(held)
    assert load_text(tmp_path / "corpus", validation=link).train == [unique_text(50)]


# Mistakes


def test_missing_file_suggests_its_neighbours(tmp_path):
    write(tmp_path / "shakespeare.txt", PARAGRAPH)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*shakespeare\.txt\?"):
        load_text(tmp_path / "shakespear.txt")


def test_missing_file_without_neighbours_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected .*austen.*a text file or a folder"):
        load_text(tmp_path / "nothing-like-it")


def test_missing_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .* does not exist either"):
        load_text(tmp_path / "no" / "file.txt")


def test_misspelt_austen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='did you mean "austen"'):
        load_text("austn")


def test_missing_validation(tmp_path):
    file = write(tmp_path / "a.txt", PARAGRAPH * 3)
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*b.txt"):
        load_text(file, validation=tmp_path / "b.txt")


def test_folder_without_text(tmp_path):
    write(tmp_path / "code.py", "pass")
    with pytest.raises(ValueError, match=r"holds no text: expected \*\.txt, \*\.md, \*\.jsonl"):
        load_text(tmp_path)


def test_empty_path():
    with pytest.raises(ValueError, match="path is empty"):
        load_text("")


def test_empty_validation_path():
    with pytest.raises(ValueError, match="path is empty"):
        load_text("austen", validation="")


@pytest.mark.parametrize("content", ["", " \n\n\n\n \n", "<|endoftext|>\n"])
def test_empty_file(tmp_path, content):
    with pytest.raises(ValueError, match="is empty"):
        load_text(write(tmp_path / "a.txt", content))
    with pytest.raises(ValueError, match=r"validation text .*a\.txt is empty"):
        load_text("austen", validation=tmp_path / "a.txt")


def test_three_byte_file(tmp_path):
    with pytest.raises(ValueError, match=r"too short to train on: .* 100 characters, got 3"):
        load_text(write(tmp_path / "a.txt", "abc"))


def test_short_training_text_with_explicit_validation(tmp_path):
    write(tmp_path / "a.txt", "abc")
    with pytest.raises(ValueError, match="too short to train on"):
        load_text(tmp_path / "a.txt", validation="austen")


def test_validation_that_takes_every_file(tmp_path):
    file = write(tmp_path / "a.txt", PARAGRAPH * 3)
    with pytest.raises(ValueError, match="takes every training file"):
        load_text(tmp_path, validation=file)


def test_undecodable_byte_is_located(tmp_path):
    file = tmp_path / "latin1.txt"
    file.write_bytes(b"caf\xe9 au lait" * 20)
    with pytest.raises(ValueError, match=r"latin1\.txt is not UTF-8 text: byte 0xe9 at offset 3"):
        load_text(file)


@pytest.mark.parametrize("raw", [b"\x7fELF\x00\x01" * 40, PARAGRAPH.encode("utf-16")])
def test_binary_file(tmp_path, raw):
    file = tmp_path / "model.txt"
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="is not a text file: zero byte at offset"):
        load_text(tmp_path)


def test_every_message_is_one_line(tmp_path):
    for bad in ("", "austn", str(tmp_path), str(write(tmp_path / "b" / "a.txt", "abc"))):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_text(bad)
        assert "\n" not in str(caught.value)


def test_a_text_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("word " * 100)
    (tmp_path / "b.txt").write_text("word " * 100)
    monkeypatch.setattr(reading, "memory_bytes", lambda: 999)
    with pytest.raises(
        ValueError, match="has 1,000 bytes, more than this machine's memory of 999; give a part"
    ):
        load_text(tmp_path)
    load_text(tmp_path / "a.txt")


def test_a_file_that_grows_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is written while it is read does not count."""
    path = tmp_path / "a.txt"
    path.write_text("word " * 1000)
    monkeypatch.setattr(reading, "_CHUNK", 500)
    size = 0
    for piece in reading._decoded(path):
        size += len(piece)
        with path.open("a") as file:
            file.write("more " * 1000)
    assert size == 5000
