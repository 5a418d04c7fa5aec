"""`heedful convert`, and what the other commands make of its result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.stock import save_stock_model

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want. "
    * 8
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_stock_model(tmp_path / "stock", [TEXT])


def test_there_and_back(heedful: Callable[..., Any], source: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = heedful(
        "convert", source, out, "--per", "kv_head", "--select-dim", 8, "--kv-budget", 32, "--kv-grace", 4
    )
    assert done.code == 0, done.err
    assert f"{out}: converted, " in done.out and "1,192 added" in done.out
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "README.md"} <= {
        p.name for p in out.iterdir()
    }
    settings = json.loads((out / "config.json").read_text())["heedful"]
    assert settings["eviction"]["budget"] == 32 and settings["eviction"]["grace"] == 4
    text = heedful("generate", out, "It is a truth", "--max-new-tokens", 60, "--stats")
    assert text.code == 0 and text.out.startswith("It is a truth")
    assert "32, 32 kept per layer" in text.err
    done = heedful("convert", out, tmp_path / "back", "--back")
    assert done.code == 0 and "1,192 parameters of selectors were dropped" in done.out
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_it_is_measured_under_budgets(heedful: Callable[..., Any], source: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert heedful("convert", source, out).code == 0
    (tmp_path / "book.txt").write_text(TEXT)
    how = ["--context", 64, "--rows", 2, "--kv-budget", "16,full", "--kv-grace", 4, "--kv-first", 4]
    done = heedful("eval", out, "--data", tmp_path / "book.txt", *how)
    assert done.code == 0, done.err
    assert "book.txt, 2 of" in done.out and "64 tokens" in done.out
    rows = [line.split(",") for line in (out / "eval" / "eval.csv").read_text().splitlines()]
    assert [row[:2] for row in rows[1:]] == [
        ["", "full"],
        *([p, "16"] for p in ("selective", "streaming", "h2o")),
    ]
    assert rows[2][4] == rows[3][4]  # without votes the oldest goes
    assert "name a text it has not seen with --data" in heedful("eval", out).error(1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["stock", "out", "--selector", "tail"], 2, "--selector"),
        (["stock", "out", "--kv-budget", "8", "--kv-grace", "9"], 2, "budget must be a whole number >= 10"),
        (["stock", "out", "--kv-grace", "9"], 2, "grace=9 needs a budget or a threshold"),
        (["nowhere", "out"], 1, "has no config.json"),
        (["stock", "stock"], 1, "is the source itself"),
        (["stock", "out", "--back"], 1, "is no converted model"),
        (["stock", "out", "--per", "kv_head", "--selector", "head"], 1, "needs selector='retention'"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    code: int,
    message: str,
    heedful: Callable[..., Any],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert message in heedful("convert", *arguments).error(code)
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def test_commands_for_trained_models_say_what_a_stock_one_needs(heedful: Callable[..., Any], source: Path):
    assert "`heedful convert` makes one of it" in heedful("generate", source, "a").error(1)


def test_a_budget_for_each_layer_is_found_and_used(heedful: Callable[..., Any], source: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert heedful("convert", source, out, "--kv-budget", 40).code == 0
    (tmp_path / "book.txt").write_text(TEXT * 3)
    how = ["--data", tmp_path / "book.txt", "--context", 24, "--rows", 3, "--tolerance", 0.05, "--kv-grace"]
    done = heedful("budget", out, *how, 4)
    assert done.code == 0, done.err
    eviction = json.loads((out / "config.json").read_text())["heedful"]["eviction"]
    assert eviction["grace"] == 4 and all(5 <= budget <= 24 for budget in eviction["budget"])
    assert (
        "book.txt: 3 rows of 24 tokens" in done.err
        and "finished before" in heedful("budget", out, *how, 4).err
    )
    assert json.loads(heedful("doctor", out, "--json").out)["proof"]["held"] == eviction["budget"]
    assert "grace was 4, is 3" in heedful("budget", out, *how, 3).error(1)
    assert "more than the 24 tokens that never go, got 24" in heedful("budget", out, *how, 23).error(2)
    other = ["--data", tmp_path / "book.txt", "--baseline", tmp_path]
    assert "--baseline compares runs of heedful train" in heedful("budget", out, *other).error(2)
    assert "name a text it has not seen with --data" in heedful("budget", out).error(1)


def test_a_model_that_selects_nothing_is_measured_under_its_own_policies(
    heedful: Callable[..., Any], source: Path, tmp_path: Path
):
    """It may have been adapted to recency; with --source alone the source would run, and learn nothing of that."""
    out, book = tmp_path / "out", tmp_path / "book.txt"
    assert heedful("convert", source, out, "--score", "softmax").code == 0
    weights = load_file(out / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 3
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    book.write_text(TEXT)
    how = ["--data", book, "--context", 64, "--rows", 2, "--kv-budget", "16", "--policy", "streaming"]

    def kl(*more: Any) -> float:
        done = heedful("eval", out, *how, *more)
        assert done.code == 0, done.err
        row, names = (out / "eval" / "eval.csv").read_text().splitlines()[::-1]
        return float(dict(zip(names.split(","), row.split(","), strict=True))["kl"])

    assert kl("--source", source) > 1.2 * kl()
