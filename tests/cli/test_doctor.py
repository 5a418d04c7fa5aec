"""`heedful doctor`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stock import save_stock_model

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


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model without a saved budget."""
    folder = tmp_path_factory.mktemp("doctor")
    stock = save_stock_model(folder / "stock", ["It is a truth universally acknowledged. " * 20])
    return package.convert(stock, folder / "out", per="kv_head", selector="added", select_dim=4)


def test_a_budget_that_is_given_is_proved(heedful: Heedful, converted: Path):
    done = heedful("doctor", converted, "--kv-budget", 16)
    assert (done.code, done.err) == (0, "")
    for part in (
        f"{converted}: heedful_llama, 2 layers",
        "saved            no budget",
        "an added selection head of 4 for each of 2 key heads; votes only say who goes",
        "all votes are zero: not adapted yet, ranks by age",
        "asked for        16 tokens in each layer; who goes: selective",
        "held             16 tokens in each of 2 layers",
        "evicted          39 tokens from each",
        "24 generated, as one pass with the eviction mask says",
    ):
        assert part in done.out, part
    assert done.out.endswith("a budget is active\n")


def test_a_saved_budget_is_proved(heedful: Heedful, converted: Path, tmp_path: Path):
    saved = ["--kv-budget", "12,20", "--kv-grace", 3, "--kv-first", 2, "--kv-policy", "streaming"]
    assert heedful("convert", converted.with_name("stock"), tmp_path / "out", *saved).code == 0
    done = heedful("doctor", tmp_path / "out", "--json")
    report = json.loads(done.out)
    assert report["saved"]["budget"] == [12, 20] == report["proof"]["held"]
    assert (report["silent_layers"], report["proof"]["evicted"]) == (2, [47, 39])
    assert report["proof"]["nbytes"] < report["proof"]["full_bytes"]
    assert report["proof"]["difference"] < 1e-4 < 1e-2 < report["proof"]["effect"]
    shown = heedful("doctor", tmp_path / "out").out
    assert "12, 20 tokens, by layer; who goes: streaming; the newest 3 and the first 2 never" in shown
    assert "held             12 to 20 tokens" in shown


def test_a_trained_model(heedful: Heedful, trained: Path):
    done = heedful("doctor", trained, "--kv-budget=6", "--kv-policy", "tova")
    assert f"{trained}: heedful, 1 layer\n" in done.out and "6 tokens in its layer\n" in done.out
    assert done.code == 0 and "softmax: nobody votes" in done.out and "held             6 tokens" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 1, "no budget is active: none is saved with the model and none is given"),
        (["--kv-budget", "full"], 1, "no budget is active"),
        (["--kv-budget", "512"], 1, "can never be exceeded: the model reads 512 tokens at most"),
        (["--kv-budget", "8,8,8"], 1, "one entry per layer (2), got 3"),
        (["--kv-budget", "1"], 2, "budget must be a whole number >= 2"),
        (["--kv-budget"], 2, "--kv-budget needs a value"),
        (["--kv-budget", "8", "--kv-policy", "best"], 2, "--kv-policy must be one of"),
        (["elsewhere"], 2, "one folder at a time"),
    ],
)
def test_a_budget_that_is_not_active(
    arguments: list[str], code: int, message: str, heedful: Heedful, converted: Path
):
    assert message in heedful("doctor", converted, *arguments).error(code)


def test_a_budget_needs_a_model(heedful: Heedful):
    assert "--kv-budget needs the folder of a model" in heedful("doctor", "--kv-budget", 8).error(2)
