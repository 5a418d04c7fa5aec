"""`heedful doctor`."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import heedful as package
from heedful import doctor

Heedful = Callable[..., Any]


def test_what_is_active(heedful: Heedful):
    done = heedful("doctor")
    assert (done.code, done.err) == (0, "")
    assert f"heedful {package.__version__} in " in done.out
    assert f"torch            {torch.__version__}" in done.out
    assert f"{torch.get_num_threads()} of " in done.out
    for part in (
        "transformers ",
        "lm               complete",
        'impl="auto" on ',
        "native ",
        "triton ",
        "none: ",
    ):
        assert part in done.out, part
    assert max(map(len, done.out.splitlines())) < 200


def test_json(heedful: Heedful):
    done = heedful("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["libraries"]["torch"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert set(report["kernels"]["auto"].values()) <= {"native", "blocked", "sdpa", "reference", "triton"}
    assert report["extras"]["lm"] == {"missing": [], "install": None}


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "tyro" else real(name))
    report = doctor.examine()
    assert report["extras"]["lm"] == {"missing": ["tyro"], "install": 'pip install "heedful[lm]"'}
    shown = "\n".join(doctor.lines(report))
    assert 'missing tyro: pip install "heedful[lm]"' in shown
    assert "tyro             -" in shown


def test_without_the_extras():
    """It says what to install where every other command needs it first."""
    code = """
import sys
sys.modules.update(dict.fromkeys(["tyro", "rich", "transformers", "tokenizers", "matplotlib", "datasets"]))
from heedful.cli import main
assert main(["doctor"]) == 0
assert main(["ls"]) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'impl="auto"' in done.stdout
    assert done.stderr.count("\n") == 1
    assert 'the command line needs: pip install "heedful[lm]"' in done.stderr


def test_wrong_usage(heedful: Heedful):
    assert "unknown option --jsn; did you mean '--json'? see heedful doctor --help" in heedful(
        "doctor", "--jsn"
    ).error(2)
