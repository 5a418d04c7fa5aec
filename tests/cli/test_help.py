"""Help, lists and explanations."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import heedful as package
from heedful.cli import COMMANDS
from heedful.cli.parsing import flag, parse
from heedful.comparison import CompareSettings
from heedful.training import TrainSettings
from heedful.training.settings import ModelSettings

NAMES = [name for names in package.available().values() for name in names]
Heedful = Callable[..., Any]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_help(heedful: Heedful, arguments: list[str]):
    done = heedful(*arguments)
    assert (done.code, done.err) == (0, "")
    for command, text in COMMANDS.items():
        assert command in done.out
        assert text in done.out


def test_version(heedful: Heedful):
    assert heedful("--version").out == f"heedful {package.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(heedful: Heedful, command: str):
    done = heedful(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"heedful {command}" in done.out


def test_help_shows_the_options_of_the_chosen_form(heedful: Heedful):
    sas = heedful("train", "--attention", "sas", "--help").out
    assert "--attention.sim-heads" in sas
    assert "--attention.kernel-size" in sas
    for chosen in ([], ["--attention", "mha"], ["--attention=mqa"]):
        assert "--attention.sim-heads" not in heedful("train", *chosen, "--help").out
    assert "--attention.sim-heads" in heedful("train", "--attention=sas", "--help").out
    assert "--score.impl" in heedful("train", "--score", "selective", "--help").out
    assert "--attention.sim-heads" in heedful("compare", "--help").out
    assert "--attention.sim-heads" not in heedful("compare", "--attention", "mha,mqa", "--help").out


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", None),
        ("--qk-norm", True),
        ("--no-qk-norm", False),
        ("--qk_norm", True),
        ("--qk-norm=False", False),
    ],
)
def test_a_switch_may_be_left_to_the_form(typed: str, expected: bool | None):
    fields = [
        flag(f.name, f.type, f.default, "help")
        for f in dataclasses.fields(ModelSettings)
        if f.name == "qk_norm"
    ]
    assert parse("train", "", fields, typed.split()) == {"qk_norm": expected}


@pytest.mark.parametrize("settings", [TrainSettings, CompareSettings])
def test_every_setting_is_explained(settings: Any):
    for field in dataclasses.fields(settings):
        assert field.metadata["help"].strip(), field.name
        assert "\n" not in field.metadata["help"], field.name


def test_ls(heedful: Heedful):
    done = heedful("ls")
    assert done.code == 0
    for name in NAMES:
        assert f"\n {name} " in done.out or f"\n{name} " in done.out
    assert "sim-heads" in done.out
    narrow = subprocess.run(
        [sys.executable, "-m", "heedful", "ls"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "60", "HEEDFUL_FORMS": ""},
    )
    assert narrow.returncode == 0, narrow.stderr
    assert max(map(len, narrow.stdout.splitlines())) <= 60


@pytest.mark.parametrize("name", NAMES)
def test_show(heedful: Heedful, name: str):
    done = heedful("show", name)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(name)
    assert "formula" in done.out
    assert "parameters" in done.out
    assert "FLOPs/token" in done.out
    assert "cache bytes/token" in done.out
    if name != "softmax":
        assert "arXiv" in done.out or name in ("gqa", "mqa")


def test_show_sas(heedful: Heedful):
    out = heedful("show", "sas").out
    for part in ("arXiv 2507.07694", "--attention.sim-heads", "--attention.init", "mha x softmax", "(1.00x)"):
        assert part in out


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "heedful", "trian"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "unknown command 'trian'; did you mean 'train'?" in done.stderr


def test_a_formula_where_signs_are_missing():
    """What a terminal cannot write is a question mark there."""
    plain = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run([sys.executable, "-m", "heedful", "show", "sas"], capture_output=True, env=plain)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"formula" in done.stdout
    assert b"?" in done.stdout
    assert done.stdout.isascii()


@pytest.mark.parametrize("words", ["train --help", "show sas", "ls", "--help"])
def test_who_has_seen_enough_is_not_told_of_a_broken_pipe(words: str):
    command = [sys.executable, "-m", "heedful", *words.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + 13
