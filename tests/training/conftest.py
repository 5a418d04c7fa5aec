"""Runs of a few steps, and one that is interrupted."""

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import heedful.training.run as run_module
from heedful.training import Interrupted, RunResult, TrainSettings, train


@pytest.fixture
def settings(text_file: Path) -> Callable[..., TrainSettings]:
    """Settings of a run that takes a fraction of a second: two epochs of a text of bytes."""

    def make(**more: Any) -> TrainSettings:
        small: dict[str, Any] = {
            "data": str(text_file),
            "tokenizer": "bytes",
            "d_model": 16,
            "n_layers": 1,
            "n_heads": 2,
            "context": 32,
            "batch_size": 8,
            "steps": 16,
            "evaluations": 4,
            "checkpoints": 4,
            "lr": 1e-2,
        }
        return TrainSettings(**{**small, **more})

    return make


@pytest.fixture
def quiet_train() -> Callable[..., RunResult]:
    """`train` that writes to nowhere."""

    def run(settings: TrainSettings, out: Path, **more: Any) -> RunResult:
        return train(settings, out, console=Console(file=io.StringIO()), **more)

    return run


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch, quiet_train: Callable[..., RunResult]) -> Callable[..., None]:
    """Start a run and press Ctrl-C in the middle of a step."""

    def run(settings: TrainSettings, out: Path, step: int = 12) -> None:
        class Pressed(run_module.StepTimer):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                super().on_step_begin(args, state, control, **kwargs)
                if state.global_step == step - 1:
                    os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "StepTimer", Pressed)
            with pytest.raises(Interrupted, match=f"stopped at step {step} of {settings.steps}"):
                quiet_train(settings, out)

    return run
