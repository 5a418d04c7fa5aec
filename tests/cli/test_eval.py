"""`heedful eval`: the table, what it leaves, and what it refuses."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from rich.console import Console

import heedful.cli.eval as command
import heedful.evaluation.kv_budget as kv_budget
from heedful.data import TokenDataset, count_bytes, token_bytes
from heedful.evaluation import evaluate
from heedful.hf.load import load_model, load_tokenizer
from heedful.training import TrainSettings, held_out, train

Heedful = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]


def trained_in(folder: Path, **changes: Any) -> Path:
    settings = TrainSettings(
        **{"d_model": 16, "n_layers": 2, "n_heads": 2, "context": 32, "steps": 2, "batch_size": 4, **changes}
    )
    train(settings, folder, console=Console(file=io.StringIO()))
    return folder


@pytest.fixture(scope="module")
def selective(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a selective model, trained on text."""
    folder = tmp_path_factory.mktemp("selective") / "run"
    return trained_in(folder, data=str(text_file), tokenizer="bytes", score="selective")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a selective model, trained on a task."""
    folder = tmp_path_factory.mktemp("synthetic") / "run"
    return trained_in(folder, data="synthetic:variable-assignment", score="selective")


def table_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "eval.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_text(heedful: Heedful, selective: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = heedful("eval", selective, "--kv-budget", "4,full,100", "--rows", "6")
    assert done.code == 0
    assert all("% of all rows" in line for line in done.err.splitlines())  # said where it takes long
    out = selective / "eval"
    assert sorted(p.name for p in out.iterdir()) == ["eval.csv", "eval.png"]
    assert min(matplotlib.image.imread(out / "eval.png").shape[:2]) > 500
    rows = table_in(out)
    policies = ("selective", "streaming", "h2o")
    assert [(row["policy"], row["kv_budget"]) for row in rows] == [
        ("", "full"),
        *((policy, budget) for policy in policies for budget in ("4", "100")),
    ]

    held = held_out(selective, load_tokenizer(selective))
    spread = [i * len(held.rows) // 6 for i in range(6)]
    measured = TokenDataset({name: tensor[spread] for name, tensor in held.rows.tensors.items()})
    model = load_model(selective)
    n_bytes = count_bytes(measured.tensors["labels"], token_bytes(load_tokenizer(selective)))
    for row in rows:
        budget = "full" if row["kv_budget"] == "full" else int(row["kv_budget"])
        expected = evaluate(model, measured, kv_budget=budget, kv_policy=row["policy"] or "h2o")
        assert float(row["loss"]) == pytest.approx(expected.loss, rel=1e-6)
        assert float(row["bits_per_byte"]) == pytest.approx(expected.bits_per_byte(n_bytes), rel=1e-6)
        assert int(row["tokens"]) == expected.tokens
        assert float(row["tokens_per_second"]) > 0
        assert (float(row["kl"]) > 1e-6) == (budget == 4)

    lines = done.out.splitlines()
    assert max(map(len, lines[:-1])) <= 80  # the last names the files, however long their paths are
    assert lines[0] == f"words.txt (validation), 6 of {len(held.rows)} rows of 32 tokens"
    header = next(line.split() for line in lines if "policy" in line)
    assert header == ["policy", "tokens", "loss", "bits/byte", "KL", "same", "bytes", "tokens/s"]
    full = next(line.split() for line in lines if "full cache" in line)
    assert full[:5] == [
        "full",
        "cache",
        "32",
        f"{float(rows[0]['loss']):.4f}",
        f"{float(rows[0]['bits_per_byte']):.4f}",
    ]
    assert lines[-1] == f"written: {out / 'eval.csv'}, {out / 'eval.png'}"


def test_a_column_of_a_table(heedful: Heedful, selective: Path, tmp_path: Path):
    table = tmp_path / "rows.csv"
    table.write_text("id,body\n" + "".join(f"{n},the cat sat on a mat and saw dog {n}\n" for n in range(9)))
    flags = ("--data", table, "--kv-budget", "6", "--policy", "streaming", "--out", tmp_path / "out")
    assert "has no column 'text'" in heedful("eval", selective, *flags).error(1)
    done = heedful("eval", selective, *flags, "--text-column", "body")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].startswith("rows.csv, ")
    message = heedful("eval", selective, "--text-column", "body", "--out", tmp_path / "other").error(2)
    assert "--text-column body belongs to --data" in message


def test_synthetic(heedful: Heedful, synthetic: Path, tmp_path: Path):
    done = heedful(
        "eval", synthetic, "--kv-budget", "6", "--policy", "tova", "--rows", "8", "--out", tmp_path
    )
    assert done.code == 0, done.err
    (row,) = table_in(tmp_path)
    assert (row["policy"], row["kv_budget"], row["bits_per_byte"]) == ("tova", "6", "")
    lines = done.out.splitlines()
    assert lines[0] == "synthetic:variable-assignment, 8 of 512 rows of 31 tokens"
    assert next(line.split() for line in lines if "policy" in line)[3] == "right"
    assert f"{float(row['accuracy']):.1%}" in done.out
    assert (tmp_path / "eval.png").exists()
    assert not (synthetic / "eval").exists()
    assert "reads no text; leave out --data" in heedful("eval", synthetic, "--data", tmp_path).error(1)


def test_other_data_and_few_rows(heedful: Heedful, trained: Path, text_file: Path, tmp_path: Path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[:500])
    out = tmp_path / "out"
    flags = ["--data", other, "--kv-budget", "8", "--policy", "streaming", "--rows", "1000", "--out", out]
    done = heedful("eval", trained, *flags)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].startswith("other.txt, ")
    assert " of 1" not in done.out.splitlines()[0]  # all rows: nothing was left out
    assert int(table_in(out)[0]["tokens"]) == len(other.read_bytes())


def test_without_a_limit_256_rows(heedful: Heedful, trained: Path, tmp_path: Path):
    long = tmp_path / "long.txt"
    long.write_text("the cat sat on a mat. " * 400)
    flags = ["--data", long, "--kv-budget", "full", "--out", tmp_path / "out"]
    heading = heedful("eval", trained, *flags).out.splitlines()[0]
    total = -(-22 * 400 // 31)
    assert heading == f"long.txt, 256 of {total} rows of 32 tokens (for all: --rows {total})"
    assert not (tmp_path / "out" / "eval.png").exists()  # there is no line to draw


def test_policies_that_go_with_the_model(heedful: Heedful, trained: Path, tmp_path: Path):
    small = ["--kv-budget", "8", "--rows", "2", "--out", tmp_path]
    assert heedful("eval", trained, *small).code == 0
    assert [row["policy"] for row in table_in(tmp_path)] == ["streaming", "h2o"]
    assert heedful("eval", trained, *small, "--policy", "snapkv,keydiff").code == 0
    assert [row["policy"] for row in table_in(tmp_path)] == ["snapkv", "keydiff"]
    assert all(float(row["kl"]) > 0 for row in table_in(tmp_path))
    message = heedful("eval", trained, "--policy", "h2o,selective", "--out", tmp_path / "out").error(2)
    assert "--policy: the policy 'selective' needs a model with score 'selective'" in message
    assert "layer 0 has 'softmax'; use another policy, e.g. 'streaming'" in message
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_measured(
    heedful: Heedful, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "eval.png").write_text("of an earlier table")
    flags = ["--kv-budget", "4,8", "--rows", "2", "--out", tmp_path]
    measure, calls = kv_budget._measure, []

    def pressed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == pressed_at:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(kv_budget, "_measure", pressed)
    pressed_at = 1
    stopped = heedful("eval", trained, *flags)
    assert "stopped after 0 of 4 measurements; nothing was written" in stopped.error(130)
    assert [p.name for p in tmp_path.iterdir()] == ["eval.png"]

    calls.clear()
    pressed_at = 3
    stopped = heedful("eval", trained, *flags)
    assert f"stopped after 2 of 4 measurements; those done are in {tmp_path / 'eval.csv'}" in stopped.error(
        130
    )
    assert [row["kv_budget"] for row in table_in(tmp_path)] == ["4", "8"]
    assert stopped.out.count("streaming") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["eval.csv"]  # no figure of another table


WRONG: dict[str, tuple[list[str], str]] = {
    "no-number": (
        ["--kv-budget", "8,x"],
        "--kv-budget takes whole numbers and full, separated by commas, got '8,x'",
    ),
    "fraction": (["--kv-budget", "8.5"], "--kv-budget takes whole numbers and full"),
    "small": (["--kv-budget", "1"], "--kv-budget: budget must be a whole number >= 2"),
    "negative": (["--kv-budget=-4"], "got -4"),
    "budget-twice": (["--kv-budget", "8,16,8"], "--kv-budget: the budget 8 is named twice"),
    "full-twice": (["--kv-budget", "full,full"], "the budget full is named twice"),
    "no-budget": (["--kv-budget", ","], "--kv-budget: expected one budget or more"),
    "policy": (["--policy", "selektive"], "unknown eviction policy 'selektive'; did you mean 'selective'?"),
    "policy-twice": (["--policy", "h2o,tova,h2o"], "--policy: the policy h2o is named twice"),
    "no-policy": (["--policy", ","], "--policy takes names separated by commas, got ','"),
    "rows": (["--rows", "0"], "--rows must be 1 or more, got 0"),
    "flag": (["--kv-budgets", "8"], "did you mean --kv-budget?"),
}


@pytest.mark.parametrize(("flags", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_usage(heedful: Heedful, trained: Path, contents: Contents, flags: list[str], said: str):
    before = contents(trained)
    done = heedful("eval", trained, *flags)
    assert said in done.error(2)
    assert done.out == ""
    assert contents(trained) == before


def test_bad_folders(heedful: Heedful, trained: Path, tmp_path: Path, contents: Contents):
    before = contents(trained)
    assert "nowhere does not exist" in heedful("eval", tmp_path / "nowhere").error(1)
    assert "holds no model" in heedful("eval", tmp_path).error(1)
    (tmp_path / "file").write_text("mine")
    message = heedful("eval", trained, "--out", tmp_path / "file").error(1)
    assert "file is a file, expected a folder for the results" in message
    assert "there is no file or folder" in heedful("eval", trained, "--data", tmp_path / "no.txt").error(1)
    assert (tmp_path / "file").read_text() == "mine"
    assert contents(trained) == before


def test_a_line_now_and_then_without_a_terminal(
    heedful: Heedful, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "LINE_EVERY", -1.0)
    done = heedful("eval", trained, "--kv-budget", "4,8", "--rows", "2", "--out", tmp_path)
    assert done.code == 0
    assert "streaming, 4 tokens  1 of 4" in done.err
    assert "100% of all rows" in done.err


def test_the_same_twice(heedful: Heedful, selective: Path, tmp_path: Path):
    """All but the time it took."""
    torch.manual_seed(1)
    tables = []
    for _ in range(2):
        heedful("eval", selective, "--kv-budget", "4", "--rows", "3", "--out", tmp_path)
        tables.append([{**row, "tokens_per_second": ""} for row in table_in(tmp_path)])
    assert tables[0] == tables[1]
