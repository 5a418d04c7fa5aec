"""The whole way of a checkpoint on the command line: convert, adapt, measure, prove."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.stock import save_stock_model

from heedful.data.austen import load_austen

QUICK = ["--context", 128, "--kv-grace", 4, "--local-tokens", 128 * 10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    text = load_austen()[0][0]
    (folder / "my.txt").write_text(text[:16_000])
    (folder / "other.txt").write_text(load_austen()[0][1][:2000])
    save_stock_model(folder / "stock", [text[:5000]], std=0.3)
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "eval" / "eval.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_whole_way(heedful: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    assert "heedful adapt out --data my.txt" in heedful("convert", "stock", "out").out
    done = heedful("adapt", "out", "--data", "my.txt", *QUICK, "--lora", 2, "--distill-tokens", 128 * 6)
    assert done.code == 0, done.err
    for part in (
        "selectors, layer by layer  step 10/10  KL to the source ",
        "LoRA against the source  step 6/6  KL to the source ",
        "KL to the source with 32 of 128 tokens held: ",
        "it holds 32 tokens by default now; measure it on text of another kind: heedful eval out --source STOCK ",
    ):
        assert part in done.err
    measured = ["--data", "other.txt", "--context", 128, "--rows", 2, "--policy", "selective,streaming"]
    done = heedful("eval", "out", "--source", "stock", *measured)
    assert done.code == 0, done.err
    rows = table(Path("out"))
    budgets = [str(budget) for budget in (16, 32, 64)]
    assert [(r["policy"], r["kv_budget"]) for r in rows] == [
        ("", "full"),
        *(("selective", budget) for budget in budgets),
        *(("streaming", budget) for budget in budgets),
    ]
    assert float(rows[0]["kl"]) > 0 and float(rows[0]["agreement"]) < 1  # LoRA changed it
    assert "is the model itself" in heedful("eval", "out", "--source", "out", *measured).error(2)
    heedful("convert", "stock", "plain")
    assert heedful("eval", "plain", *measured, "--kv-grace", 4, "--kv-first", 4).code == 0
    for ours, alone in zip(rows[4:], table(Path("plain"))[4:], strict=True):
        assert ours["loss"] == alone["loss"] and ours["kl"] == alone["kl"]  # recency, on the source
    done = heedful("doctor", "out")
    assert done.code == 0 and "32 tokens in each of 2 layers" in done.out, done.err
    assert "retention" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["out", "--target-held", "2"], 2, "--target-held must be greater than 0 and less than 1, got 2"),
        (["out", "--lora", "-3"], 2, "--lora must be a whole number, 0 or more, got -3"),
        (["out", "--trainer.nonsense", "3"], 2, "has no field nonsense"),
        (["nowhere"], 1, "nowhere does not exist; expected the folder of a trained model"),
        (["stock"], 1, "holds a 'llama' model, expected a heedful one; `heedful convert` makes one of it"),
        (["stock", "--resume"], 1, "there is no adaptation to resume"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    code: int,
    message: str,
    heedful: Callable[..., Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(folder)
    assert message in heedful("adapt", *arguments).error(code)
