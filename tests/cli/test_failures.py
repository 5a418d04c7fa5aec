"""Bad files and folders: exit code 1, one line, nothing created or overwritten."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Heedful = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]
COMMANDS = ["train", "compare"]


def write(folder: Path, kind: str) -> Path:
    path = folder / "data.txt"
    if kind == "empty":
        path.touch()
    elif kind == "three-bytes":
        path.write_bytes(b"abc")
    elif kind == "binary":
        path.write_bytes(b"\x00\x01" * 500)
    elif kind == "not-utf-8":
        path.write_bytes("é".encode("latin-1") * 500)
    elif kind == "folder-without-text":
        path.mkdir()
    return path


BAD_DATA = {
    "missing": "there is no file or folder",
    "empty": "is empty; give a file or a folder with text in it",
    "three-bytes": "is too short to train on: expected at least 100 characters, got 3",
    "binary": "is not a text file: zero byte at offset 0",
    "not-utf-8": "is not UTF-8 text: byte 0xe9 at offset 0",
    "folder-without-text": "holds no text: expected *.txt, *.md",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data(heedful: Heedful, command: str, kind: str, tmp_path: Path):
    path = write(tmp_path, kind)
    done = heedful(command, "--data", path, "--out", tmp_path / "out")
    message = done.error(1)
    assert BAD_DATA[kind] in message
    assert str(path) in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_task(heedful: Heedful, command: str, tmp_path: Path):
    message = heedful(command, "--data", "synthetic:variable", "--out", tmp_path / "out").error(2)
    assert "expected one of: synthetic:variable-assignment" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [*COMMANDS, "demo"])
def test_out_is_a_file(heedful: Heedful, small: list[str], command: str, tmp_path: Path):
    out = tmp_path / "out"
    out.write_text("mine")
    flags = [] if command == "demo" else small
    assert "out is a file, expected a folder" in heedful(command, *flags, "--out", out).error(1)
    assert out.read_text() == "mine"
    below = heedful(command, *flags, "--out", out / "below").error(1)
    assert str(out) in below
    assert "Not a directory" in below
    assert out.read_text() == "mine"


@pytest.mark.parametrize("command", COMMANDS)
def test_out_holds_something_else(
    heedful: Heedful, small: list[str], command: str, tmp_path: Path, contents: Contents
):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "is not empty" in heedful(command, *small, "--out", tmp_path).error(1)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("command", COMMANDS)
def test_out_cannot_be_written(heedful: Heedful, small: list[str], command: str, tmp_path: Path):
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    assert "/proc" in heedful(command, *small, "--out", "/proc/heedful").error(1)
    if os.geteuid() == 0:
        return  # root may write everywhere else
    tmp_path.chmod(0o500)
    assert "Permission denied" in heedful(command, *small, "--out", tmp_path / "out").error(1)


def test_a_finished_run_is_not_overwritten(
    heedful: Heedful, small: list[str], trained: Path, contents: Contents
):
    before = contents(trained)
    assert "already holds a run; use --resume" in heedful("train", *small, "--out", trained).error(1)
    assert contents(trained) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 kB."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def last_line(done: Any) -> str:
    """The last line, after the progress; never a traceback."""
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("heedful")
    return line


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "compare"])
def test_full_disk(small: list[str], command: str, small_disk: Path):
    """The disk fills with the first checkpoint, in the middle of the run."""
    done = subprocess.run(
        [sys.executable, "-m", "heedful", command, *small, "--out", small_disk / "run"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert "space" in last_line(done)


def test_file_too_large(small: list[str], tmp_path: Path):
    """As on a full disk, where nothing may be mounted: no file may grow beyond 8 kB."""
    done = subprocess.run(
        [sys.executable, "-m", "heedful", "train", *small, "--out", tmp_path / "run"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),
    )
    assert "large" in last_line(done)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_generate_from_a_corrupt_checkpoint(heedful: Heedful, trained: Path, file: str, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    whole = (run / file).read_bytes()
    for damage in (b"", b"abc", whole[: len(whole) // 2]):
        (run / file).write_bytes(damage)
        message = heedful("generate", run, "the").error(1)
        assert "cannot be read" in message
        assert str(run) in message
        assert (run / file).read_bytes() == damage
    (run / file).unlink()
    assert str(run) in heedful("generate", run, "the").error(1)


def test_generate_from_nothing(heedful: Heedful, tmp_path: Path):
    assert "nowhere does not exist" in heedful("generate", tmp_path / "nowhere").error(1)
    assert "holds no model (no config.json)" in heedful("generate", tmp_path).error(1)
    (tmp_path / "file").touch()
    assert "holds no model" in heedful("generate", tmp_path / "file").error(1)


def test_generate_with_a_policy_that_does_not_go_with_the_model(heedful: Heedful, trained: Path):
    done = heedful("generate", trained, "the", "--kv-budget", "8")
    assert "needs score 'selective', this layer has 'softmax'" in done.error(1)
    assert "--kv-policy streaming" in done.err
    assert done.out == ""  # the prompt would be printed first


def test_generate_from_another_model(heedful: Heedful, trained: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert "holds a 'llama' model, expected a heedful one" in heedful("generate", run).error(1)
    (run / "config.json").write_text(json.dumps({**config, "attention": "theirs"}))
    message = heedful("generate", run).error(1)
    assert "unknown attention 'theirs'" in message
    assert "HEEDFUL_FORMS=my_form.py" in message


def test_resume_from_nothing(heedful: Heedful, tmp_path: Path):
    assert "holds no run to resume" in heedful("train", "--resume", "--out", tmp_path / "run").error(1)
    assert not (tmp_path / "run").exists()


def test_damaged_settings(heedful: Heedful, tmp_path: Path):
    (tmp_path / "train.json").write_text("{")
    assert "train.json is damaged" in heedful("train", "--resume", "--out", tmp_path).error(1)
    for damage in ("{", "[]", "{}"):
        (tmp_path / "compare.json").write_text(damage)
        assert "compare.json is damaged" in heedful("compare", "--out", tmp_path).error(1)
