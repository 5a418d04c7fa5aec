"""Fields of `TrainingArguments`: typed, handed through, recorded, and refused where heedful has its own."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import heedful.training.run as run_module
from heedful.training import RunResult, TrainSettings
from heedful.training.run import LanguageModelTrainer
from heedful.training.trainer_options import _OURS, _REFUSED, take_trainer_options, trainer_options

Settings = Callable[..., TrainSettings]
Train = Callable[..., RunResult]
Interrupt = Callable[..., None]

WORDS = [
    "--trainer.adam-beta2",
    "0.9",
    "--steps",
    "3",
    "--trainer.max_grad_norm=0.5",
    "--trainer.lr-scheduler-type",
    "linear",
    "--resume",
]


def test_pairs_are_taken_from_a_command_line():
    rest, options = take_trainer_options(WORDS)
    assert rest == ["--steps", "3", "--resume"]
    assert options == {"adam_beta2": 0.9, "max_grad_norm": 0.5, "lr_scheduler_type": "linear"}
    assert take_trainer_options(["--trainer.max-grad-norm", "-1", "-h"]) == (["-h"], {"max_grad_norm": -1.0})
    assert take_trainer_options(["--trainer.logging-first-step", "--out", "a"]) == (
        ["--out", "a"],
        {"logging_first_step": True},
    )
    assert take_trainer_options(["--trainer.label-names", "a", "b"])[1] == {"label_names": ["a", "b"]}


def test_values_and_words_give_the_same():
    given = {"adam_beta2": 0.9, "gradient_accumulation_steps": 2, "logging_first_step": False}
    assert trainer_options(given) == given
    assert trainer_options({name: str(value) for name, value in given.items()}) == given
    twice = trainer_options({"lr_scheduler_kwargs": {"num_cycles": 2}})
    assert trainer_options(twice) == twice
    assert TrainingArguments(**twice).lr_scheduler_kwargs == {"num_cycles": 2}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"adam_beta": 0.9},
        "no field adam_beta, got --trainer.adam-beta; did you mean --trainer.adam-beta",
    ),
    "nothing-like-it": ({"zzzzz": 1}, "no field zzzzz, got --trainer.zzzzz$"),
    "ours": ({"learning_rate": 0.1}, "--trainer.learning-rate is set by heedful; use --lr instead"),
    "refused": ({"label_smoothing_factor": 0.1}, "is not handed through: Trainer would .*; leave it out"),
    "word": ({"adam_beta2": "x"}, "^--trainer.adam-beta2: invalid float value: 'x'"),
    "float": ({"gradient_accumulation_steps": 2.5}, "gradient-accumulation-steps: invalid int value: '2.5'"),
    "choice": ({"lr_scheduler_type": "foo"}, "--trainer.lr-scheduler-type: invalid choice: 'foo'"),
    "nothing": ({"max_grad_norm": []}, "--trainer.max-grad-norm: expected one argument"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_options(settings: Settings, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        settings(trainer=options)


def test_what_heedful_sets_is_no_longer_open():
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert set(_OURS) | set(_REFUSED) <= fields | {"warmup_ratio"}
    assert not set(_OURS) & set(_REFUSED)
    flags = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(TrainSettings)}
    assert set(_OURS.values()) <= flags | {"--out", "--resume"}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[TrainingArguments]:
    """The arguments of every run."""
    arguments: list[TrainingArguments] = []

    class Spy(LanguageModelTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            arguments.append(self.args)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(run_module, "LanguageModelTrainer", Spy)
    return arguments


def test_options_reach_the_trainer_and_the_record(
    settings: Settings, quiet_train: Train, tmp_path: Path, seen: list[TrainingArguments]
):
    options = {"adam_beta2": 0.9, "max_grad_norm": 0.5, "lr_scheduler_type": "linear"}
    s = settings(trainer=options, steps=2)
    quiet_train(s, tmp_path / "run")
    assert (seen[0].adam_beta2, seen[0].max_grad_norm) == (0.9, 0.5)
    assert seen[0].lr_scheduler_type == "linear"
    assert not seen[0].lr_scheduler_kwargs
    assert json.loads((tmp_path / "run" / "train.json").read_text())["trainer"] == options
    assert TrainSettings.load(tmp_path / "run" / "train.json") == s
    other = dataclasses.replace(s, trainer={"adam_beta2": 0.99})
    with pytest.raises(
        ValueError, match=r"trainer was .*0\.9, .* and is {'adam_beta2': 0\.99}; leave those out"
    ):
        quiet_train(other, tmp_path / "run", resume=True)


def test_unsound_combination_leaves_nothing(settings: Settings, quiet_train: Train, tmp_path: Path):
    s = settings(
        trainer={"load_best_model_at_end": True, "optim": "adamw_torch"}, evaluations=3, checkpoints=4
    )
    with pytest.raises(ValueError, match="load_best_model_at_end requires"):
        quiet_train(s, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_accumulated_steps_are_steps_of_more_rows(settings: Settings, quiet_train: Train, tmp_path: Path):
    whole = quiet_train(settings(steps=4), tmp_path / "whole")
    parts = settings(steps=4, batch_size=4, trainer={"gradient_accumulation_steps": 2})
    accumulated = quiet_train(parts, tmp_path / "parts")
    assert accumulated.tokens == whole.tokens
    assert [tokens for tokens, _, _ in accumulated.curve] == [tokens for tokens, _, _ in whole.curve]
    assert accumulated.val_loss == pytest.approx(whole.val_loss, abs=1e-4)


def test_resume_continues_exactly(
    settings: Settings, quiet_train: Train, interrupt: Interrupt, tmp_path: Path
):
    s = settings(trainer={"gradient_accumulation_steps": 2, "adam_beta2": 0.9}, batch_size=4)
    quiet_train(s, tmp_path / "whole")
    interrupt(s, tmp_path / "parts", 5)
    quiet_train(s, tmp_path / "parts", resume=True)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
