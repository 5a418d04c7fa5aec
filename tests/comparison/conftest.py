"""Comparisons of a few steps."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from heedful.comparison import CompareSettings, compare
from heedful.training import RunResult, TrainSettings


@pytest.fixture
def settings(text_file: Path) -> Callable[..., CompareSettings]:
    """Two attentions, one score, one seed, three steps; `TrainSettings` by name too."""

    def make(**more: Any) -> CompareSettings:
        small: dict[str, Any] = {
            "data": str(text_file),
            "tokenizer": "bytes",
            "d_model": 16,
            "n_layers": 1,
            "n_heads": 2,
            "context": 32,
            "batch_size": 4,
            "steps": 3,
            "evaluations": 3,
            "checkpoints": 1,
        }
        own: dict[str, Any] = {"attention": ("mha", "sas"), "score": ("softmax",), "seeds": 1}
        for name, value in more.items():
            (own if name in CompareSettings.__dataclass_fields__ else small)[name] = value
        return CompareSettings(**own, train=TrainSettings(**small))

    return make


@pytest.fixture
def quiet_compare() -> Callable[..., list[RunResult]]:
    """`compare` that writes to nowhere."""

    def run(settings: CompareSettings, out: Path, **how: Any) -> list[RunResult]:
        return compare(settings, out, console=Console(file=io.StringIO()), **how)

    return run
