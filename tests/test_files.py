"""Files are written whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from heedful.files import write_bytes, write_json, write_text


def test_text_and_json(tmp_path: Path):
    write_text(tmp_path / "a.txt", "Ĥ = 3H\n")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Ĥ = 3H\n"
    write_json(tmp_path / "a.json", {"b": 1, "a": [2]}, sort_keys=True)
    assert (tmp_path / "a.json").read_text() == json.dumps({"a": [2], "b": 1}, indent=2) + "\n"
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.txt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as broken, pytest.raises(OSError, match="No space"):
            broken.setattr(f"heedful.files.os.{step}", full)
            write_bytes(path, b"new")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]


def test_a_figure_is_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from heedful.plotting import new_figure, save

    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    figure, _ = new_figure()
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr("heedful.files.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        save(figure, path)
    assert path.read_bytes() == b"old"
    save(figure, path)
    assert path.read_bytes().startswith(b"\x89PNG")
