"""`heedful train` and `heedful compare`: tables as data, `--trainer.*`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Heedful = Callable[..., Any]


def saved(run: Path) -> dict[str, Any]:
    return json.loads((run / "train.json").read_text())


def test_trainer_options_are_recorded_and_kept_on_resume(heedful: Heedful, small: list[str], tmp_path: Path):
    out = tmp_path / "run"
    done = heedful(
        "train", *small, "--trainer.adam-beta2", "0.9", "--out", out, "--trainer.max-grad-norm=0.5"
    )
    assert done.code == 0, done.err
    assert saved(out)["trainer"] == {"adam_beta2": 0.9, "max_grad_norm": 0.5}
    assert heedful("train", "--resume", "--out", out).code == 0
    message = heedful("train", "--resume", "--out", out, "--trainer.adam-beta2", "0.99").error(1)
    assert "a resumed run keeps its settings, but trainer was" in message


@pytest.mark.parametrize(
    ("given", "trainer"),
    [
        (["--trainer.adam-beta2", "0.9"], {"adam_beta2": 0.9}),
        pytest.param(["--compile"], {"torch_compile": True}, marks=pytest.mark.slow),
    ],
    ids=["handed through", "compiled"],
)
def test_trainer_options_of_a_comparison(
    heedful: Heedful, small: list[str], tmp_path: Path, given: list[str], trainer: dict[str, Any]
):
    flags = ["--attention", "mha", "--score", "softmax", "--seeds", "1", *given]
    assert heedful("compare", *small, *flags, "--out", tmp_path / "cmp").code == 0
    assert saved(tmp_path / "cmp" / "runs" / "mha-softmax-seed0")["trainer"] == trainer


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.adam-bta2", "1"], "did you mean --trainer.adam-beta2"),
        (["--trainer.learning-rate", "1"], "is set by heedful; use --lr instead"),
        (["--trainer.adam-beta2", "x"], "--trainer.adam-beta2: invalid float value: 'x'"),
        (["--trainer.adam-beta2"], "--trainer.adam-beta2: expected one argument"),
    ],
    ids=["unknown", "ours", "type", "missing"],
)
def test_wrong_trainer_options(
    heedful: Heedful, small: list[str], tmp_path: Path, command: str, flags: list[str], message: str
):
    out = tmp_path / "out"
    assert message in heedful(command, *small, *flags, "--out", out).error(2)
    assert not out.exists()


def test_help_names_them(heedful: Heedful):
    assert "--trainer.gradient-accumulation-steps" in heedful("train", "--help").out
    assert "--trainer.*" in heedful("compare", "--help").out


@pytest.mark.slow
def test_compiled_training_is_the_same_training(heedful: Heedful, small: list[str], tmp_path: Path):
    form = ["--attention", "sas", "--score", "selective"]
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        done = heedful("train", *small, *form, *flags, "--out", tmp_path / name)
        assert done.code == 0, done.err
    assert saved(tmp_path / "compiled")["trainer"] == {"torch_compile": True}
    plain, compiled = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("plain", "compiled"))
    assert compiled["val_loss"] == pytest.approx(plain["val_loss"], abs=1e-5)
    assert heedful("generate", tmp_path / "compiled", "the", "--max-new-tokens", "3").code == 0


def test_json_lines(heedful: Heedful, small: list[str], text_file: Path, tmp_path: Path):
    rows = text_file.read_text().split("\n\n")
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"body": row, "id": i}) + "\n" for i, row in enumerate(rows)))
    flags = [*small, "--data", file, "--out", tmp_path / "run"]
    message = heedful("train", *flags).error(1)
    assert f"{file} has no column 'text'" in message
    assert "it has body, id: name one with --text-column" in message
    assert not (tmp_path / "run").exists()
    assert heedful("train", *flags, "--text-column", "body", "--tokenizer", "chars").code == 0
    assert saved(tmp_path / "run")["text_column"] == "body"
