"""A whole small run on every kind of data."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch

from heedful.data import load_text
from heedful.hf.load import load_tokenizer
from heedful.training import RunResult, TrainSettings, held_out
from heedful.training.run import load_settings_data

Settings = Callable[..., TrainSettings]
Train = Callable[..., RunResult]


def as_text(path: Path, rows: list[str]) -> Path:
    path.with_suffix(".txt").write_text("\n\n\n".join(rows))
    return path.with_suffix(".txt")


def as_folder(path: Path, rows: list[str]) -> Path:
    path.mkdir()
    as_text(path / "a", rows[:4])
    as_lines(path / "b", rows[4:])
    return path


def as_lines(path: Path, rows: list[str]) -> Path:
    path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path.with_suffix(".jsonl")


def as_list(path: Path, rows: list[str]) -> Path:
    path.with_suffix(".json").write_text(json.dumps([{"text": row} for row in rows]))
    return path.with_suffix(".json")


def as_csv(path: Path, rows: list[str]) -> Path:
    datasets.Dataset.from_dict({"text": rows}).to_csv(str(path.with_suffix(".csv")))
    return path.with_suffix(".csv")


def as_parquet(path: Path, rows: list[str]) -> Path:
    datasets.Dataset.from_dict({"text": rows}).to_parquet(str(path.with_suffix(".parquet")))
    return path.with_suffix(".parquet")


def as_saved(path: Path, rows: list[str]) -> Path:
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("write", [as_text, as_folder, as_lines, as_list, as_csv, as_parquet, as_saved])
def test_a_run(
    settings: Settings,
    quiet_train: Train,
    tmp_path: Path,
    text_file: Path,
    write: Callable[[Path, list[str]], Path],
):
    """The same documents give the same rows, whatever they are stored in."""
    rows = load_text(text_file, validation="austen").train[0].split("\n\n")
    s = settings(
        data=str(write(tmp_path / "data", rows)),
        val_data=str(text_file),
        tokenizer="chars",
        steps=2,
        evaluations=1,
        checkpoints=1,
    )
    plain = dataclasses.replace(s, data=str(as_text(tmp_path / "plain", rows)))
    kinds, texts = load_settings_data(s).train.tensors, load_settings_data(plain).train.tensors
    assert all(torch.equal(kinds[name], texts[name]) for name in texts)

    assert quiet_train(s, tmp_path / "run").val_bpb is not None
    tokenizer = load_tokenizer(tmp_path / "run")
    assert len(tokenizer) == 257 + len(set("".join(rows)))  # characters of the texts alone, no braces
    assert held_out(tmp_path / "run", tokenizer).n_bytes == len(text_file.read_bytes())


def test_another_column_and_a_split_of_its_own(
    settings: Settings, quiet_train: Train, tmp_path: Path, text_file: Path
):
    rows = text_file.read_text().split("\n\n")
    parts = {"train": rows[:-1], "validation": rows[-1:]}
    tables = {name: datasets.Dataset.from_dict({"body": part}) for name, part in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "data"))
    s = settings(data=str(tmp_path / "data"), text_column="body", steps=2, evaluations=1, checkpoints=1)
    quiet_train(s, tmp_path / "run")
    held = held_out(tmp_path / "run", load_tokenizer(tmp_path / "run"))
    assert held.n_bytes == len(rows[-1].encode())
    again = held_out(tmp_path / "run", load_tokenizer(tmp_path / "run"), str(tmp_path / "data"))
    assert again.n_bytes == held.n_bytes
