"""Compiling, keeping and refusing the C++ operator; each case in a process and a cache of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from heedful.ops.native import build, status

ACTIVE = status().active
NEEDS_COMPILER = pytest.mark.skipif(not ACTIVE, reason=status().reason)

REPORT = """
import json, logging, sys
class Kept(logging.Handler):
    def emit(self, record): lines.append(record.getMessage())
lines = []
logging.getLogger("heedful").addHandler(Kept())
import torch
from heedful.ops import selective_attention
from heedful.ops.native import status
q = torch.ones(1, 2, 9, 8)
out = {}
for impl in ("auto", "native"):
    try:
        found = selective_attention(q, q, q, impl=impl)[0].sum().item()
        again = selective_attention(q, q, q, impl=impl)[0].sum().item()
        assert found == again
    except ValueError as error:
        found = str(error)
    out[impl] = found
print(json.dumps([out, status().active, status().reason, status().path, lines]))
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", REPORT],
        env={**os.environ, "HEEDFUL_CACHE": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def report(process: subprocess.Popen[str]) -> tuple[dict, bool, str, str | None, list[str]]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return tuple(json.loads(out))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that two processes filled at the same time."""
    cache = tmp_path_factory.mktemp("cache")
    for found, active, _, path, lines in map(report, [start(cache), start(cache)]):
        assert active and not lines
        assert found == {"auto": 144, "native": 144}
        assert Path(path).parent == cache / "native"
    assert len(list((cache / "native").glob("*.so"))) == 1
    return cache


def test_without_a_compiler_auto_says_so_once_and_native_raises(tmp_path: Path):
    found, active, reason, path, lines = report(start(tmp_path, PATH="", CXX=""))
    assert not active and path is None
    assert found["auto"] == 144
    assert "impl='native' is not available" in found["native"] and "install a C++ compiler" in found["native"]
    assert "install a C++ compiler" in reason
    assert len(lines) == 1 and reason in lines[0]


def test_a_compiler_that_fails_is_quoted(tmp_path: Path):
    broken = tmp_path / "c++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho no such luck >&2; exit 1\n'
    )
    broken.chmod(0o755)
    found, active, reason, _, lines = report(start(tmp_path, CXX=str(broken)))
    assert not active and found["auto"] == 144 and len(lines) == 1
    assert "broken 1.0 failed: no such luck" in reason


def test_it_can_be_switched_off(tmp_path: Path):
    found, active, reason, _, lines = report(start(tmp_path, HEEDFUL_NATIVE="0"))
    assert not active and reason == "it is switched off by HEEDFUL_NATIVE=0"
    assert found["auto"] == 144 and not lines
    assert not list(tmp_path.iterdir())


def test_it_is_active_where_there_is_a_compiler():
    """Else most tests of it would be left out without a word."""
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    assert ACTIVE or not found or os.environ.get("HEEDFUL_NATIVE") == "0", status().reason


@NEEDS_COMPILER
def test_two_processes_build_once_and_the_check_is_kept(built: Path):
    (note,) = (built / "native").glob("*.json")
    kept = json.loads(note.read_text())
    assert {"output", "F", "gradient of q", "decoded output"} < set(kept["errors"])
    assert max(kept["errors"].values()) < 2e-5
    _, active, *_ = report(start(built, HEEDFUL_CACHE=str(built)))
    assert active


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_broken_file_in_the_cache_is_built_again(built: Path):
    (library,) = (built / "native").glob("*.so")
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    found, active, *_ = report(start(built))
    assert active and found["native"] == 144
    assert len(library.read_bytes()) > len(whole) // 2


@NEEDS_COMPILER
def test_a_refused_build_stays_refused(built: Path):
    (note,) = (built / "native").glob("*.json")
    kept = note.read_text()
    try:
        note.write_text(json.dumps({**json.loads(kept), "refused": "its results are off: F by 1"}))
        found, active, reason, _, lines = report(start(built))
    finally:
        note.write_text(kept)
    assert not active and "F by 1" in reason and len(lines) == 1
    assert found["auto"] == 144 and "F by 1" in found["native"]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path))
    folder = build.cache_folder()
    folder.chmod(0o777)
    with pytest.raises(build.Unavailable, match="others may write to"):
        build.cache_folder()


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path))
    monkeypatch.setattr(build.os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(build.Unavailable, match="belongs to another user"):
        build.cache_folder()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.Unavailable, match="set HEEDFUL_CACHE"):
        build.cache_folder()


def test_a_wrong_library_is_refused():
    """The check sees wrong numbers: here F is never written and outputs are zeros."""
    import torch

    from heedful.ops.selective.native.verify import check

    class Nothing:
        def heedful_forward(self, job: object) -> None: ...
        def heedful_backward(self, job: object) -> None: ...
        def heedful_slots(self, job: object) -> None: ...

    _, refused = check(Nothing(), torch.float32)
    assert refused.startswith("its results are off: ")
